#!/usr/bin/env bash
# The quickstart with three seeds (80 steps in place of 70), and a longer run of plain RLVR: the figures of docs/quickstart.md. About 45 minutes on
# two CPU cores.
#     bash pipelines/quickstart_seeds.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source pipelines/environment.sh

out="${OUT:-runs/seeds}"
long_steps="${LONG_STEPS:-240}"
for seed in 0 1 2; do
    QUICKSTART_STEPS=80 QUICKSTART_SEED=$seed QUICKSTART_OUT="$out/seed-$seed" bash pipelines/quickstart.sh
done

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
rlfr train-rl --config pipelines/quickstart.toml --seed 0 --model data/policy --data data/train.jsonl \
    --steps "$long_steps" --resume --out "$out/long/rlvr"
rlfr eval --config pipelines/quickstart.toml --seed 0 --data data/heldout.jsonl --out "$out/long/eval-rlvr" \
    --model "$out/long/rlvr/checkpoints/$(cat "$out/long/rlvr/latest")/model"

printf '\nThree seeds, accuracy in percent (avg@4 on held-out problems):\n\n'
python -m rlfr_cli.report.seeds "$out/seed-0" "$out/seed-1" "$out/seed-2"
printf '\nPlain RLVR for %s steps, seed 0:\n\n' "$long_steps"
python -m rlfr_cli.report.compare "base=$out/seed-0/eval-base" "RLVR, $long_steps steps=$out/long/eval-rlvr"
