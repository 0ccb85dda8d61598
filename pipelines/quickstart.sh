#!/usr/bin/env bash
# The main job on the embedded policy and problems, with no download: all six stages, on two CPU cores.
#     bash pipelines/quickstart.sh
# QUICKSTART_OUT names the output folder (default: runs/quickstart), QUICKSTART_STEPS the training steps of each run,
# QUICKSTART_SEED the seed. Run it again and it goes on where it stopped; what is complete is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source pipelines/environment.sh

out="${QUICKSTART_OUT:-runs/quickstart}"
steps="${QUICKSTART_STEPS:-70}"
seed="${QUICKSTART_SEED:-0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
begin=$SECONDS
step() { printf '\n== %s\n' "$*" >&2; }
stage() { rlfr "$1" --config pipelines/quickstart.toml --seed "$seed" "${@:2}"; }

step "1/6 sample: the base policy answers training problems"
stage sample --model data/policy --data data/train.jsonl --out "$out/rollouts"

step "2/6 extract-latents: the policy reads expert solutions"
stage extract-latents --model data/policy --data data/expert.jsonl --out "$out/latents"

step "3/6 fit-flow: a flow learns the velocity field of those latents"
stage fit-flow "$out/latents" --out "$out/flow.safetensors"

step "4/6 score: how far each token of the sampled responses deviates"
stage score --flow "$out/flow.safetensors" --model data/policy --rollouts "$out/rollouts" --out "$out/scores"

train() {
    stage train-rl --model data/policy --data data/train.jsonl --steps "$steps" --resume --out "$out/$1" "${@:2}"
}
step "5/6 train-rl: plain RLVR"
train rlvr
step "5/6 train-rl: RLFR, with the flow's scores; and beside it the control, with random scores, one core each"
# The control's flow need not learn: random scores do not come from it.
OMP_NUM_THREADS=1 train random --flow "$out/flow.safetensors" --scores random --online-steps 0 2> "$out/random.log" &
control=$!
trap 'kill "$control" 2>/dev/null || true' EXIT
OMP_NUM_THREADS=1 train rlfr --flow "$out/flow.safetensors"
wait "$control" || { cat "$out/random.log" >&2; exit 1; }
trap - EXIT

evaluate() { stage eval --model "$2" --data data/heldout.jsonl --out "$out/eval-$1"; }
checkpoint() { printf '%s/%s/checkpoints/%s/model' "$out" "$1" "$(cat "$out/$1/latest")"; }
step "6/6 eval: held-out problems, four responses each at temperature 1"
evaluate base data/policy
for run in rlvr rlfr random; do evaluate "$run" "$(checkpoint "$run")"; done

step "what the runs did: tokens and what they were paid, and their metrics side by side"
rlfr show "$out/rlfr" --html "$out/tokens.html" > /dev/null
rlfr plot "RLVR=$out/rlvr" "RLFR=$out/rlfr" "random scores=$out/random" --out "$out/runs.png"

printf '\n' >&2
python -m rlfr_cli.report.compare "base=$out/eval-base" "RLVR=$out/eval-rlvr" "RLFR=$out/eval-rlfr" \
    "random scores=$out/eval-random"
cat <<TABLE

$((SECONDS - begin)) s. What was made, each explained by \`rlfr show PATH\`:
  $out/rollouts            responses of the base policy, graded
  $out/latents             its hidden states on expert solutions
  $out/flow.safetensors    the flow, and how it was judged: $out/flow.fit/evaluation.json
  $out/scores              deviation, score and flow reward of every token
  $out/rlvr, rlfr, random  runs: metrics.jsonl, rollouts, checkpoints (plain Hugging Face folders)
Open in a browser: $out/tokens.html (which tokens the flow rewarded), $out/runs.png (the runs side by side).
TABLE
