#!/bin/sh
# One command for a bare machine with a GPU: runs everything under tests/gpu/out (see prepare.sh) and writes one JSON
# into tests/gpu/results. Builds nothing, fetches nothing; every step has a time limit and a status of its own.
#
#   tests/gpu/run.sh [NAME OF THE RESULT]      environment: DEVICE (cuda), PYTHON (python3), KEEP (folder of raw lines)
set -u
cd "$(dirname "$0")"
exec "${PYTHON:-python3}" run.py "$@"
