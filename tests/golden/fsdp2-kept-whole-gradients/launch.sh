#!/usr/bin/env bash
# Run this on each of the 2 nodes, with HEAD naming the same one of them everywhere:
#     HEAD=node0 ./launch.sh [--resume]
# Flags are those of train.py. --out must be a folder that all nodes share.
set -euo pipefail
: "${HEAD:?set HEAD to the host name of one of the nodes, the same on all of them}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python3}" -m torch.distributed.run --nnodes 2 --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${RUN_ID:-train}" \
    "$here/train.py" "$@"
