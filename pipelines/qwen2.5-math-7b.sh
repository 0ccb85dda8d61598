#!/usr/bin/env bash
# RLFR on Qwen2.5-Math-7B with the published settings: the flow is fitted on the fly, no latents are stored,
# on one node of 4 or 8 GPUs.
#     MODEL=folder/of/Qwen2.5-Math-7B DATA=folder bash pipelines/qwen2.5-math-7b.sh
# Run nowhere yet on GPUs; with the embedded policy on two CPU cores. Variables: pipelines/reasoning.sh.
RECIPE=qwen2.5-math-7b FIT=fly exec bash "$(dirname "${BASH_SOURCE[0]}")/reasoning.sh"
