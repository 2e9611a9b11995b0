"""How long `shardwright profile` takes for a job file: as a whole process, the profile proper, and out of the cache.

    python benchmarks/profile_time.py [JOB ...]

Seconds of processor time (user and system), which a busy machine changes least, beside a bare `import torch` in the
same minute: quote the ratio, since machines differ. Each row is the median of `RUNS` processes after one that warms the
file cache; `memory` is the largest resident set of any of them.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUNS = 3
PROPER = """
import json, sys, time
from pathlib import Path
from shardwright.planner import needed_dtypes
from shardwright.schemas import load_job
loaded = load_job(Path(sys.argv[1]))
import gc
gc.disable()
from shardwright.passes import profile_model, pipeline
import torch.export._trace, networkx
if loaded.job.model.hf is not None:
    import transformers.modeling_layers, transformers.models.auto.modeling_auto
before = time.process_time()
profile_model(loaded.job, loaded.folder, needed_dtypes(loaded.job))
print(json.dumps(time.process_time() - before))
"""
"""A first profile in a fresh process that has imported what profiling imports."""


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    stdout: str


def run(*command: str, cache: str = "off") -> Cost:
    """Processor time of a Python process and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"SHARDWRIGHT_CACHE": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout)


def median(*command: str, cache: str = "off") -> float:
    """Median over `RUNS` processes, after one more."""
    return statistics.median([run(*command, cache=cache).seconds for _ in range(RUNS + 1)][1:])


def main() -> None:
    """Print one block of rows a job."""
    jobs = [Path(name) for name in sys.argv[1:]] or [EXAMPLES / "llama3.1-405b-512xh100.yaml"]
    torch = median("-c", "import torch")
    print(f"{'import torch':44} {torch:6.2f} s")
    for job in jobs:
        command = ("-m", "shardwright", "profile", str(job))
        with tempfile.TemporaryDirectory() as cache:
            run(*command, cache=cache)
            rows = {
                "whole process": median(*command),
                "profile proper": statistics.median(
                    json.loads(run("-c", PROPER, str(job)).stdout) for _ in range(RUNS)
                ),
                "whole process, out of the cache": median(*command, cache=cache),
            }
        for name, seconds in rows.items():
            print(f"{job.stem + ': ' + name:44} {seconds:6.2f} s   {seconds / torch:4.1f} x import torch")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{'memory':44} {memory:6.2f} GiB")


if __name__ == "__main__":
    main()
