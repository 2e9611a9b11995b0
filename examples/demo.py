"""The main job from end to end, as `make demo` runs it: corpus, plan, script, training, and where everything lies.

python examples/demo.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from make_corpus import write_corpus

ROOT = Path(__file__).resolve().parent.parent
JOB = Path("examples/bytes-gpt.yaml")
OUT = Path("runs/bytes-gpt")


def run(*command: str) -> None:
    """Show a command and run it from the root of the checkout; stop when it fails."""
    print("\n$ " + " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)


def main() -> None:
    """Run the demo; exits with 1 if the loss has not clearly fallen."""
    for name, size in write_corpus(ROOT / "examples" / "corpus").items():
        print(f"examples/corpus/{name}: {size:,} bytes of Python's own standard library")
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    run("shardwright", "plan", str(JOB))
    run("shardwright", "compile", str(JOB), "-o", str(OUT))
    run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(OUT / "train.py"))

    lines = (ROOT / OUT / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    first, last = losses[0], sum(losses[-10:]) / 10
    checkpoint = OUT / "out" / (ROOT / OUT / "out" / "LATEST").read_text().strip()
    print(f"\nloss per byte  {first:.3f} -> {last:.3f} (mean of the last ten of {len(losses)} steps)")
    print(f"script         {OUT / 'train.py'}\nplan           {OUT / 'plan.json'}\ncheckpoint     {checkpoint}")
    if last > 0.6 * first:
        sys.exit("the loss has not fallen: something is wrong")


if __name__ == "__main__":
    main()
