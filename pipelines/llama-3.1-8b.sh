#!/usr/bin/env bash
# RLFR on Llama-3.1-8B with the published settings: the flow is fitted on the fly, no latents are stored,
# on one node of 4 or 8 GPUs.
#     MODEL=folder/of/Llama-3.1-8B DATA=folder bash pipelines/llama-3.1-8b.sh
# Run nowhere yet on GPUs; with the embedded policy on two CPU cores. Variables: pipelines/reasoning.sh.
RECIPE=llama-3.1-8b FIT=fly exec bash "$(dirname "${BASH_SOURCE[0]}")/reasoning.sh"
