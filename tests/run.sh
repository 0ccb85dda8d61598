#!/usr/bin/env bash
# Makes the environment if it is not there, and runs the tests. Arguments go to pytest:
#     bash tests/run.sh                 everything
#     bash tests/run.sh -m 'not slow'   the quick ones
#     bash tests/run.sh tests/flow      one folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source pipelines/environment.sh
# Tiny models are slower on several threads than on one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "$@"
