#!/usr/bin/env bash
# RLFR on Qwen2.5-Math-1.5B with the published settings: latents are stored, and the flow is fitted on them,
# on one node of 4 or 8 GPUs.
#     MODEL=folder/of/Qwen2.5-Math-1.5B DATA=folder bash pipelines/qwen2.5-math-1.5b.sh
# Run nowhere yet on GPUs; with the embedded policy on two CPU cores. Variables: pipelines/reasoning.sh.
RECIPE=qwen2.5-math-1.5b FIT=stored exec bash "$(dirname "${BASH_SOURCE[0]}")/reasoning.sh"
