"""Predicted peak memory against PyTorch's FSDP memory tracker, phase by phase (docs/memory-oracle.md).

    python benchmarks/memory_oracle.py           # the cases that take seconds
    python benchmarks/memory_oracle.py --all     # and those of hundreds of devices and many layers: some ten minutes

The first table has the peaks; the second, for the phase in which the tracker sees the peak, every category; the third,
for every case, the phases that differ by more than one part in a thousand.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.oracle_cases import Case, Comparison, compare  # type: ignore[import-not-found]

GIB, MIB = 2**30, 2**20
CATEGORIES = {
    "parameters": "parameters",
    "gathered_parameters": "gathered",
    "gradients": "gradients",
    "communication_buffers": "buffers of reductions",
    "optimizer_states": "optimizer states",
    "activations": "activations and temporaries",
    "inputs": "inputs",
    "buffers": "model buffers",
}

QUICK = (
    Case(model="llama3.1-8b", layers=8, checkpointed="none"),
    Case(model="llama3.1-8b", layers=8, checkpointed="full"),
    Case(model="llama3.1-8b", layers=8, checkpointed=5, shard=2, micro_batch=2, sequence=2048),
    Case(model="llama3.1-8b", layers=4, checkpointed="full", accumulation=3, kept=True),
    Case(model="llama3.1-8b", layers=4, checkpointed="full", accumulation=3, whole_gradients=True, sequence=1024),
    Case(model="gpt2-124m", layers=12, checkpointed="none", micro_batch=8, sequence=1024),
    Case(model="qwen3-8b", layers=6, checkpointed="full", sequence=4096),
    Case(model="llama3-70b", layers=8, checkpointed="none", world=64),
    Case(model="mixtral-8x7b", layers=4, checkpointed="none", sequence=4096),
    Case(model="mixtral-8x7b", layers=4, checkpointed="full", world=64, sequence=4096),
    Case(model="deepseek-v3", layers=5, checkpointed="full", world=64, sequence=4096),
    Case(model="qwen3-30b-a3b", layers=4, checkpointed="none", world=32, shard=8, sequence=4096),
    Case(model="llama3.1-8b", layers=8, checkpointed="none", second=2),
    Case(
        model="gpt2-124m",
        layers=12,
        checkpointed="none",
        micro_batch=8,
        sequence=1024,
        accumulation=3,
        shard=1,
        gradients=1,
    ),
    Case(model="llama3.1-8b", layers=8, checkpointed="full", accumulation=3, shard=1, gradients=8),
    Case(model="llama3.1-8b", layers=8, checkpointed=5, world=64, shard=8, gradients=64),
    Case(model="llama3-70b", layers=8, checkpointed="full", world=512, shard=8, gradients=64, accumulation=2),
    Case(model="llama3-70b", layers=8, checkpointed="none", world=64, gradients=64, axes=(8, 8), second=8),
    Case(model="mixtral-8x7b", layers=4, checkpointed="full", world=64, gradients=64, sequence=4096),
    Case(
        model="mixtral-8x7b",
        layers=4,
        checkpointed="none",
        world=64,
        gradients=64,
        axes=(8, 8),
        int8=(1,),
        int4=(1,),
        sequence=4096,
    ),
)
LONG = (
    Case(model="llama3.1-8b", layers=32, checkpointed="none"),
    Case(model="llama3.1-8b", layers=32, checkpointed=20),
    Case(model="llama3.1-8b", layers=32, checkpointed="full", world=64),
    Case(model="qwen3-8b", layers=36, checkpointed="none", sequence=4096),
    Case(model="llama3-70b", layers=80, checkpointed="full", world=64),
    Case(model="mixtral-8x7b", layers=32, checkpointed="full", sequence=4096),
    Case(model="mixtral-8x7b", layers=32, checkpointed="none", world=64, shard=8, sequence=4096),
    Case(model="deepseek-v3", layers=61, checkpointed="full", world=256, sequence=4096),
    Case(model="llama3.1-405b", layers=126, checkpointed="full", world=512),
)


def main() -> None:
    """Print the tables, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the long cases too")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    cases = [case for case in QUICK + LONG * arguments.all if arguments.only in case.name]
    found: list[tuple[Case, Comparison]] = []
    for case in cases:
        began = time.perf_counter()
        found.append((case, compare(case)))
        print(f"{case.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print_peaks(found)
    print_categories(found)
    print_phases(found)


def print_peaks(found: list[tuple[Case, Comparison]]) -> None:
    """One row a case: the highest phase of both sides."""
    print("| case | peak in | predicted | tracked | difference |\n|---|---|---:|---:|---:|")
    for case, comparison in found:
        expected = "" if comparison.predicted_peak == comparison.peak else f" (predicted: {comparison.predicted_peak})"
        predicted = comparison.phases[comparison.predicted_peak].predicted.total() / GIB
        tracked = comparison.phases[comparison.peak].tracked.total() / GIB
        difference = f"{100 * comparison.difference:+.4f} %"
        print(f"| {case.name} | {comparison.peak}{expected} | {predicted:.3f} | {tracked:.3f} | {difference} |")
    print()


def print_categories(found: list[tuple[Case, Comparison]]) -> None:
    """One row a case: tracked GiB of every category at the peak, and the difference of the prediction in MiB."""
    print(f"| case | {' | '.join(CATEGORIES.values())} |\n|---|{'---:|' * len(CATEGORIES)}")
    for case, comparison in found:
        peak = comparison.phases[comparison.peak]
        differences = peak.differences()
        cells = [f"{peak.tracked[name] / GIB:.3f} ({differences.get(name, 0) / MIB:+.3f})" for name in CATEGORIES]
        print(f"| {case.name} | {' | '.join(cells)} |")
    print()


def print_phases(found: list[tuple[Case, Comparison]]) -> None:
    """One row for every phase of every case that differs by more than 0.1 %."""
    print("| case | phase | of the peak | difference | in MiB |\n|---|---|---:|---:|---|")
    for case, comparison in found:
        highest = comparison.phases[comparison.peak].tracked.total()
        for name, phase in comparison.phases.items():
            if abs(phase.difference) > 1e-3:
                parts = [f"{CATEGORIES[key]} {size / MIB:+.1f}" for key, size in phase.differences().items() if size]
                share = f"{100 * phase.tracked.total() / highest:.0f} %"
                print(f"| {case.name} | {name} | {share} | {100 * phase.difference:+.2f} % | {', '.join(parts)} |")


if __name__ == "__main__":
    main()
