"""The online update inside `train-rl`: the same flow with and without checkpointing, and one that learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlfr_cli.artifacts.flow_file import read_flow
from rlfr_cli.artifacts.rollouts import iter_rollouts
from rlfr_cli.config.flow import NetworkConfig
from rlfr_cli.config.train_rl import OnlineConfig, OptimiserConfig, RolloutConfig, RunConfig
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import accumulate_matching_gradients
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.policy.forward import forward_batches
from rlfr_cli.policy.loading import load_policy
from rlfr_cli.rl.measuring import sequences_of
from rlfr_cli.stages import train_rl
from rlfr_cli.stages.flows import load_flow
from stages.tiny_stages import rows_of_metrics, train_config
from tiny_policies import CPU

STEPS = 6


@pytest.fixture(scope="module")
def runs(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A run of six steps of a new flow, without and with gradient checkpointing."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [json.loads(line) for line in (repository / "data" / "train.jsonl").read_text().splitlines()]
    easy = [row for row in rows if row["level"] == 1][:6]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in easy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for checkpointing in (False, True):
            train_rl.run(
                train_config(
                    repository / "data" / "policy",
                    folder / "problems.jsonl",
                    folder / f"{checkpointing}",
                    new_flow=True,
                    network=NetworkConfig(width=24, depth=1),
                    layer_fraction=(0.25, 0.625),
                    rollout=RolloutConfig(prompts_per_step=4, group_size=4, steps=STEPS),
                    optimiser=OptimiserConfig(learning_rate=1e-5, gradient_checkpointing=checkpointing),
                    online=OnlineConfig(flow_warmup=0, online_learning_rate=3e-3, online_steps=4),
                    run=RunConfig(tensorboard=False, save_every=1, keep_checkpoints=STEPS),
                )
            )
    return {checkpointing: folder / f"{checkpointing}" for checkpointing in (False, True)}


def flow_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}" / "flow.safetensors"


def test_checkpointing_the_policy_changes_nothing_of_the_flows_first_update(runs: dict[bool, Path]) -> None:
    """The first batch is measured before the policy has moved, so its latents and the flow's steps are the same."""
    first, second = (read_flow(flow_of(runs[checkpointing], 1))[1] for checkpointing in (False, True))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for run in runs.values():
        assert all(line["flow/steps"] == 0 or line["flow/loss"] > 0 for line in rows_of_metrics(run))
        assert sum(line["flow/steps"] for line in rows_of_metrics(run)) >= 4


def accepted_loss(run: Path, flow: Flow, step: int) -> float:
    """The fitting loss on the accepted rollouts of a step, read by the policy that drew them."""
    before = run / "checkpoints" / f"step-{step - 1:06d}" / "model"
    rows = [row for row in iter_rollouts(run / "rollouts" / f"step-{step:06d}") if row.correct]
    assert len(rows) >= 2
    latents: list[torch.Tensor] = []
    for batch in forward_batches(load_policy(before, CPU), sequences_of(rows), temperature=1.0, tapped=flow.tapped):
        latents += batch.latents
    generator = keyed_generator("cpu", "fresh")
    result = accumulate_matching_gradients(flow.network, flow.pair(latents), generator, noise_repeats=8, backward=False)
    return float(result.loss)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_on_accepted_rollouts_that_the_flow_has_not_seen_falls(
    checkpointing: bool, runs: dict[bool, Path]
) -> None:
    """On the last step's rollouts, by the flows before it: those of later checkpoints do better."""
    run = runs[checkpointing]
    losses = [
        accepted_loss(run, load_flow(flow_of(run, step), torch.device("cpu"))[1], STEPS) for step in (1, 3, STEPS - 1)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
