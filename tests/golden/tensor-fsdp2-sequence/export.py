"""Write the model of a checkpoint as a folder that `from_pretrained` of transformers loads.

    python export.py FOLDER                                   # of the newest checkpoint in ./out
    python export.py FOLDER --checkpoint out/step_00000100    # of this one

One process does it, and holds no more than a stretch of one tensor at a time. Compiled by shardwright, as train.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM

from shardwright_runtime.export import export_model
from shardwright_runtime.hugging_face import stored_form
from shardwright_runtime.tensorfile import FormatError

HERE = Path(__file__).resolve().parent
DTYPE = "float32"  # of floating-point numbers, as they are trained


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to write; must not exist yet")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "out", help="a checkpoint, or the folder of a run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=DTYPE)
    args = parser.parse_args(argv)
    content = json.loads((HERE / "model_config.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(HERE / "model_config.json")
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    try:
        done = export_model(
            args.checkpoint,
            args.folder,
            dtype=getattr(torch, args.dtype),
            form=stored_form(model),
            config={**content, "architectures": [type(model).__name__]},
        )
    except FormatError as error:
        raise SystemExit(f"nothing is written: {error}") from error
    size = f"{done.tensors} tensors, {done.total_bytes / 1e9:.3f} GB in {args.dtype}"
    print(f"{args.folder}: step {done.step}, {size}")


if __name__ == "__main__":
    main()
