"""Several launches of a program beside this file one after another, each of its processes a fork of this one: what
takes time to import, transformers above all, is imported once.

Started with the path of a JSON object: the `program`, `modules` to import besides, and the `launches`: `world`, `port`
to meet at, and `runs` as the program takes them. The exit codes of each launch's processes go to stdout, a JSON list a
line; what they print goes to `log-WORLD-RANK.txt` beside the list.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

SLOW_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor")
"""What torch itself would import in every process: the first when an optimizer is made."""
LONGEST_S = 100
"""After so many seconds a process that still waits for another says where, and ends; a program may have its own."""


def main() -> None:
    listed = Path(sys.argv[1])
    content = json.loads(listed.read_text())
    for module in (*SLOW_IMPORTS, *content["modules"]):
        importlib.import_module(module)
    program = importlib.import_module(content["program"])
    for number, launch in enumerate(content["launches"]):
        spec = listed.with_name(f"runs-{number}.json")
        spec.write_text(json.dumps(launch["runs"]))
        print(json.dumps(run(program, launch, spec)), flush=True)


def run(program: ModuleType, launch: dict[str, Any], spec: Path) -> list[int]:
    """Start the processes of a launch and wait for them; once one has failed, the others are ended."""
    children = [fork(program, launch, rank, spec) for rank in range(launch["world"])]
    codes = dict.fromkeys(children, 0)
    for _ in children:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in children:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return list(codes.values())


def fork(program: ModuleType, launch: dict[str, Any], rank: int, spec: Path) -> int:
    """A process of a launch; returns its id."""
    child = os.fork()
    if child:
        return child
    log = os.open(spec.with_name(f"log-{launch['world']}-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(getattr(program, "LONGEST_S", LONGEST_S), exit=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(launch["world"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch["port"])}
    sys.argv = [program.__name__, str(spec)]
    code = 1
    try:
        program.main()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
