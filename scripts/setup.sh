#!/usr/bin/env bash
# Make .venv and install the project with the extras named (default: dev), at the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
extras=${1:-dev}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "posttrain needs Python 3.11 or newer, $python is older: make PYTHON=python3.x" >&2; exit 1; }
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  # Debian splits these off into a package of their own.
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq python3-venv
  else
    echo "python3-venv is missing: run 'apt-get install python3-venv' as root" >&2; exit 1
  fi
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
# torch first and pinned: left to itself pip would choose a CUDA build of several gigabytes.
.venv/bin/python -m pip install --quiet --constraint constraints.txt torch
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$extras]"
touch .venv/.ready
