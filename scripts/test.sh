#!/usr/bin/env bash
# Install what is missing and run the tests, by two processes of one thread each. Arguments go to pytest, for instance
# -m long for the long forms, or -n 0 for one process.
set -euo pipefail
source "$(dirname "$0")/install.sh" requirements.txt requirements-dev.txt
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -q -n 2 --dist loadfile "$@"
