"""Starting a handful of processes for a test, and reading what they left."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shardwright.backends.emission import write
from shardwright.backends.pytorch import emit
from shardwright.schemas.plan import Plan

SUPPORT = Path(__file__).parent


def make_job_folder(folder: Path) -> Path:
    """A job's folder: a model, a corpus that repeats itself a little, and a mask that leaves some stretches out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tiny.py", "custom.py"):
        shutil.copy(SUPPORT / name, folder)
    generator = torch.Generator().manual_seed(0)
    corpus = torch.randint(97, 123, (3000,), generator=generator, dtype=torch.uint8).tolist()
    (folder / "corpus.txt").write_bytes(bytes(corpus))
    kept = torch.rand(300, generator=generator).repeat_interleave(10) < 0.6
    (folder / "corpus.mask").write_bytes(bytes(kept.to(torch.uint8).tolist()))
    (folder / "held-out.txt").write_bytes(bytes(corpus[:500]))
    (folder / "corpus.u16").write_bytes(b"".join(value.to_bytes(2, "little") for value in corpus))
    return folder


def emit_into(plan: Plan, job_folder: Path, name: str) -> Path:
    """The folder of an emitted script below the job's folder."""
    out = job_folder / name
    write(emit(plan, job_folder, out), out)
    return out


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run_all(
    world: int, runs: Sequence[dict[str, Any]], folder: Path, timeout: float = 120, program: str = "worker.py"
) -> list[int]:
    """Run scripts one after another in `world` processes of a program beside this file; returns the exit codes."""
    spec = folder / "runs.json"
    spec.write_text(json.dumps(runs))
    port = free_ports(1)[0]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(SUPPORT / program), str(spec)]
        log = (folder / f"log-{world}-{rank}.txt").open("w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run_forked(
    launches: Sequence[tuple[int, Sequence[dict[str, Any]]]],
    folder: Path,
    modules: Sequence[str],
    timeout: float = 240,
    program: str = "worker",
) -> None:
    """As `run_all`, for several (processes, runs) one after another that import `modules`; all must end well."""
    ports = free_ports(len(launches))
    listed = [{"world": world, "runs": runs, "port": port} for (world, runs), port in zip(launches, ports, strict=True)]
    spec = folder / "launches.json"
    spec.write_text(json.dumps({"program": program, "modules": modules, "launches": listed}))
    command = [sys.executable, str(SUPPORT / "forked.py"), str(spec)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    codes = [json.loads(line) for line in done.stdout.splitlines()]
    for (world, _), found in zip(launches, codes, strict=True):
        assert found == [0] * world, (folder / f"log-{world}-0.txt").read_text()[-4000:]


def results_of(
    launches: Sequence[tuple[int, Sequence[dict[str, Any]]]], folder: Path, model: str, program: str
) -> list[list[dict[str, Any]]]:
    """`run_forked` with a program and the module of its model: what each process of each launch wrote of its runs."""
    run_forked(launches, folder, [model], timeout=400, program=program)
    return [
        [json.loads((folder / f"runs-{number}-{rank}.json").read_text()) for rank in range(world)]
        for number, (world, _) in enumerate(launches)
    ]


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def outcomes(script: Path) -> list[str]:
    """How a script ended in each process."""
    return [path.read_text() for path in sorted(script.glob("outcome-*.txt"))]


def read_checkpoint(out: Path) -> dict[str, Tensor]:
    """Whole tensors of the newest checkpoint, put together with the safetensors library and the index alone."""
    folder = out / (out / "LATEST").read_text().strip()
    index = json.loads((folder / "index.json").read_text())
    dtypes = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "I64": torch.int64}
    tensors = {
        name: torch.full(entry["shape"], -7, dtype=dtypes[entry["dtype"]]) for name, entry in index["tensors"].items()
    }
    for path in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 -- it is no mapping
                match = re.fullmatch(r"(.+)\[(.*)\]", key)
                assert match is not None
                spans = [slice(*map(int, span.split(":"))) for span in match[2].split(",") if span]
                tensors[match[1]][tuple(spans)] = file.get_tensor(key)
    return tensors


def parameters_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters of a checkpoint, by their own names."""
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
