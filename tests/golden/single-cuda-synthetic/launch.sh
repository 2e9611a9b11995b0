#!/usr/bin/env bash
# Start training, or with --resume go on. Flags are those of train.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python3}" "$here/train.py" "$@"
