#!/usr/bin/env bash
# Install what is missing and run the tests. Arguments go to pytest: bash scripts/test.sh -m long
set -euo pipefail
source "$(dirname "$0")/install.sh" requirements.txt requirements-dev.txt
export HF_HUB_OFFLINE=1
exec python -m pytest -q "$@"
