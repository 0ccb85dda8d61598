#!/usr/bin/env bash
# Installs DeepSpeed, and what it needs, into the active Python environment.
#     source .venv/bin/activate && bash tests/engines/install_deepspeed.sh
# It is built here from its source distribution: that takes a minute, and no compiler, since its operators are compiled
# where they are first used, and rlfr uses none of them. The build must see the torch that is installed, so it is not
# isolated. torch is the one that pip is set up for: with PyPI alone, give the CPU build's index,
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tests/engines/install_deepspeed.sh
# Run again, it finds everything there and changes nothing.
set -euo pipefail

deepspeed_version=0.19.8
torch_version=2.13.0

python -m pip install -qq --disable-pip-version-check "torch==$torch_version" setuptools wheel packaging
python -m pip install -qq --disable-pip-version-check --no-build-isolation "deepspeed==$deepspeed_version"

DS_ACCELERATOR=cpu python -c 'import deepspeed; print("DeepSpeed", deepspeed.__version__, "is installed")'
