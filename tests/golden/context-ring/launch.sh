#!/usr/bin/env bash
# Start 4 processes on this machine, or with --resume go on. Flags are those of train.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Background jobs ignore Ctrl-C unless told otherwise. --shutdown-timeout: if torchrun itself gets a SIGTERM, it kills
# its processes so many seconds later; the 30 that it allows by default may be too few to save a checkpoint.
(
    trap - INT QUIT
    exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node 4 \
        --shutdown-timeout 1800 "$here/train.py" "$@"
) &
torchrun=$!
# A SIGTERM goes to the training processes: they save, end with 0, and so does this script. torchrun would end with 1
# and a traceback although they saved; it gets the signal only while it has no processes (or when all of this script's
# process group does: then expect the 1).
trap 'again=yes; pkill -TERM -P "$torchrun" || kill -TERM "$torchrun" || true' TERM
trap 'again=yes' INT
again=yes
while [[ -n $again ]]; do # a signal ends `wait` early
    again="" code=0
    wait "$torchrun" || code=$?
done
exit "$code"
