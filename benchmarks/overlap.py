"""Seconds a step of `rlfr train-rl --engine vllm` with and without --overlap, runs taking turns.

    python benchmarks/overlap.py --rounds 3 --steps 8
    python benchmarks/overlap.py --model runs/smollm2/model --steps 4 -- --max-new-tokens 128

What stands after -- goes to both. The first two steps of a run, of which one draws its batch in turn in any case, are
left out. Prints both medians with their range over the rounds, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
RECIPE = DATA.parent / "pipelines" / "quickstart.toml"
FIRST_STEPS = 2


def seconds_per_step(options: argparse.Namespace, overlap: bool, out: Path) -> float:
    """Median over the steps of one run."""
    command = [
        *(sys.executable, "-m", "rlfr_cli.cli", "train-rl", "--engine", "vllm", "--config", str(RECIPE)),
        *("--model", options.model, "--data", str(options.data), "--steps", str(options.steps + FIRST_STEPS)),
        *("--no-tensorboard", "--out", str(out), "--quiet", *options.more),
        *(["--overlap"] if overlap else []),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[FIRST_STEPS:]
    return statistics.median(json.loads(line)["time/step_s"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "policy"))
    parser.add_argument("--data", type=Path, default=DATA / "train.jsonl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("more", nargs="*", metavar="-- OPTION", help="further options of train-rl")
    options = parser.parse_args()

    seconds: dict[str, list[float]] = {"in turn": [], "overlap": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in seconds:
                out = Path(folder) / f"{name.replace(' ', '-')}-{number}"
                seconds[name].append(seconds_per_step(options, name == "overlap", out))
                print(f"round {number + 1}, {name}: {seconds[name][-1]:.2f} s a step", flush=True)
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s a step ({min(values):.2f} to {max(values):.2f})")
    ratio = statistics.median(seconds["in turn"]) / statistics.median(seconds["overlap"])
    print(f"{ratio:.2f} times as fast with --overlap")


if __name__ == "__main__":
    main()
