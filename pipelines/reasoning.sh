#!/usr/bin/env bash
# RLFR on a base model for competition mathematics, with the published settings: fit, diagnose, train, evaluate. Called by
# the wrappers beside it, each with a recipe of its own, on one node or in pipelines/reasoning.slurm on several:
#     MODEL=folder DATA=folder bash pipelines/qwen2.5-math-7b.sh
# Run nowhere yet on GPUs; with the embedded policy on two CPU cores. What DATA holds is in docs/pipelines.md.
#
# MODEL  Hugging Face folder of the policy                DATA   folder of the eight problem files
# OUT    output folder (default: runs/ and the recipe)    GPUS   processes of one node (default: its GPUs; 1 without)
# ARMS   what is trained: rlvr, rlfr, random              GATE   off: train rlfr whatever the diagnosis says
# LIMIT  problems and expert solutions of every stage     STEPS  steps of train-rl      FIT_STEPS  steps of fit-flow
# EXPERTS        expert solutions of the fit (default: 10000, or 5000 where latents are stored)
# EVALUATIONS    which of the six files are evaluated     DRY_RUN=1  check every stage whose input exists, and do nothing
# EXTRA_SAMPLE, EXTRA_FIT_FLOW, EXTRA_TRAIN_RL, …         options for that command, after all others
#
# Run it again and it goes on where it stopped; what is complete is not done again.
set -euo pipefail
calling="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source pipelines/environment.sh

: "${RECIPE:?call one of the wrappers, such as pipelines/qwen2.5-math-7b.sh}" "${FIT:?stored or fly}"
in_caller() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s' "$calling/$1" ;; esac; }
model="$(in_caller "${MODEL:?name the folder of the policy with MODEL=}")"
data="$(in_caller "${DATA:?name the folder of the problem files with DATA=}")"
out="$(in_caller "${OUT:-$PWD/runs/$RECIPE}")"
arms="${ARMS:-rlvr rlfr}"
evaluations="${EVALUATIONS:-math500 aime24 aime25 amc23 minerva olympiad_bench}"
dry="${DRY_RUN:-}"
gpus="${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}"
[ "$gpus" -ge 1 ] || gpus=1
for name in math_level3to5 openr1_math $evaluations; do
    [ -f "$data/$name.jsonl" ] || { echo "no $name.jsonl in $data; docs/pipelines.md says what it holds" >&2; exit 2; }
done
for arm in $arms; do
    case "$arm" in rlvr | rlfr | random) ;; *) echo "ARMS may hold rlvr, rlfr and random, got $arm" >&2; exit 2 ;; esac
done

step() { printf '\n== %s (%s s)\n' "$*" "$SECONDS" >&2; }
skip() { echo "dry run: $1 is skipped, since $2 does not exist yet" >&2; }

# As many processes as there are GPUs: those of this node by torchrun, those of all nodes of a Slurm job by srun.
launch() {
    if [ -n "$dry" ]; then
        "$@"
    elif [ "${LAUNCHER:-}" = srun ]; then
        srun --ntasks-per-node "$gpus" --gpus-per-node "$gpus" --kill-on-bad-exit=1 --wait 0 "$@"
    elif [ "$gpus" -gt 1 ]; then
        torchrun --standalone --nproc-per-node "$gpus" --no-python "$@"
    else
        "$@"
    fi
}

# One command with the preset, the recipe, its EXTRA_ options and the options given, by one process or by all.
stage() {
    local extra="${1^^}"
    extra="EXTRA_${extra//-/_}"
    # EXTRA_ options are words, so they are not quoted.
    # shellcheck disable=SC2086
    ${launcher:-} rlfr "$1" --preset paper --config "pipelines/$RECIPE.toml" "${@:2}" ${dry:+--dry-run} ${!extra:-}
}
on_all() { launcher=launch stage "$@"; }
limit="${LIMIT:+--limit $LIMIT}"
# On the fly nothing is stored; stored latents of 5,000 long solutions are some 90 GB.
[ "$FIT" = fly ] && experts=10000 || experts=5000
experts="${EXPERTS:-${LIMIT:-$experts}}"
fit_steps="${FIT_STEPS:+--steps $FIT_STEPS}"
train_steps="${STEPS:+--steps $STEPS}"

step "1/6 a flow of the policy's latents on expert solutions"
expert=(--model "$model" --data "$data/openr1_math.jsonl" --limit "$experts")
flow="$out/flow.safetensors"
if [ "$FIT" = fly ]; then
    on_all fit-flow "${expert[@]}" --out "$flow" $fit_steps
else
    on_all extract-latents "${expert[@]}" --out "$out/latents"
    if [ -n "$dry" ] && [ ! -f "$out/latents/manifest.json" ]; then
        skip fit-flow "$out/latents"
    else
        on_all fit-flow "$out/latents" --out "$flow" $fit_steps
    fi
fi

step "2/6 the policy's own answers to training problems, eight to each"
on_all sample --model "$model" --data "$data/math_level3to5.jsonl" --limit "${LIMIT:-256}" --out "$out/rollouts"

step "3/6 the gate: does the flow know more than simple quantities?"
if [ -n "$dry" ] && [ ! -f "$flow" -o ! -f "$out/rollouts/manifest.json" ]; then
    skip diagnose "$flow or $out/rollouts"
else
    stage diagnose --flow "$flow" --model "$model" --rollouts "$out/rollouts" --out "$out/diagnosis"
    [ -n "$dry" ] || python - "$out/diagnosis/diagnosis.json" "${GATE:-on}" <<'PYTHON'
import json, sys

answer = json.load(open(sys.argv[1], encoding="utf-8"))["answer"]
print(answer["in_words"], file=sys.stderr)
if answer["responses"] != "yes" and sys.argv[2] != "off":
    sys.exit(f"stopped before training, since the gate's answer is {answer['responses']!r}; GATE=off trains nevertheless")
PYTHON
fi

train() {
    on_all train-rl --model "$model" --data "$data/math_level3to5.jsonl" $limit $train_steps --resume \
        --out "$out/$1" "${@:2}"
}
step "4/6 train-rl: $arms"
for arm in $arms; do
    if [ "$arm" = rlvr ]; then
        train rlvr
    elif [ -n "$dry" ] && [ ! -f "$flow" ]; then
        skip "train-rl ($arm)" "$flow"
    elif [ "$arm" = rlfr ]; then
        train rlfr --flow "$flow"
    else
        # The control's flow need not learn: random scores do not come from it.
        train random --flow "$flow" --scores random --online-steps 0
    fi
done

step "5/6 eval of the policy before and after, greedy, on: $evaluations"
for name in base $arms; do
    policy="$model"
    if [ "$name" != base ]; then
        [ -f "$out/$name/latest" ] || { skip "eval ($name)" "$out/$name/latest"; continue; }
        policy="$out/$name/checkpoints/$(cat "$out/$name/latest")/model"
    fi
    for evaluation in $evaluations; do
        on_all eval --model "$policy" --data "$data/$evaluation.jsonl" $limit --out "$out/eval/$evaluation/$name"
    done
done
[ -z "$dry" ] || { step "dry run: done"; exit 0; }

step "6/6 what the runs did, and the evaluations side by side"
for arm in $arms; do rlfr show "$out/$arm"; done
for evaluation in $evaluations; do
    printf '\n%s\n\n' "$evaluation"
    results=("base=$out/eval/$evaluation/base")
    for arm in $arms; do results+=("$arm=$out/eval/$evaluation/$arm"); done
    python -m rlfr_cli.report.compare "${results[@]}"
done
step "done: $out"
