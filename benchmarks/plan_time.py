"""How long `shardwright plan` takes for a job file, and how much of it is importing torch and transformers.

    python benchmarks/plan_time.py [JOB ...]

Each row is the median of five runs of a whole process, beside a bare `import torch` in the same minute: quote the
ratio, since machines differ.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUNS = 5
NO_CACHE = os.environ | {"SHARDWRIGHT_CACHE": "off"}
"""Every run profiles the model."""
PLANNED = (0, 1)
"""Exit codes: a plan, or the answer that none fits."""


def median_seconds(*command: str) -> float:
    """Median wall time of a command over `RUNS` runs, after one that warms the file cache."""
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, env=NO_CACHE)
        assert done.returncode in PLANNED, done.stderr
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main() -> None:
    """Print one row a job."""
    jobs = [Path(name) for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*h100.yaml")) + sorted(
        EXAMPLES.glob("*a100.yaml")
    )
    torch = median_seconds("-c", "import torch")
    print(f"{'import torch':32} {torch:6.2f} s")
    for job in jobs:
        seconds = median_seconds("-m", "shardwright", "plan", str(job), "--json")
        print(f"{'plan ' + job.stem:32} {seconds:6.2f} s   {seconds / torch:4.1f} x import torch")


if __name__ == "__main__":
    main()
