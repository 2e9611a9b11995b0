#!/usr/bin/env bash
# Start 2 processes on this machine, or with --resume go on. Flags are those of train.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node 2 "$here/train.py" "$@"
