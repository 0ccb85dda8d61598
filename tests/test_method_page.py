"""`docs/method.md` names what is there, and its example and its list of refusals are computed from the code."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.common import ProblemsConfig, SamplingConfig
from rlfr_cli.config.fields import leaf_options
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import FlowRewardConfig, NetworkConfig, ScoreSource
from rlfr_cli.config.rl import OnlineConfig, PolicyLossConfig, RolloutConfig
from rlfr_cli.config.train_rl import RunEvalConfig, TrainRlConfig
from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.choices import Context, Normalise
from rlfr_cli.flow.deviation import deviations, keyed_noise, score_weights
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.pairing import Pairing
from rlfr_cli.flow.reference import RULES, BoundRule
from rlfr_cli.flow.shaping import ShapingOptions, shape_scores
from rlfr_cli.rl.advantages import advantages, normalise_outcomes, token_rewards
from rlfr_cli.rl.choices import Aggregation, Estimator
from rlfr_cli.rl.measuring import flow_rewards, measure
from rlfr_cli.rl.policy_loss import PolicyLossOptions, policy_loss, token_weights
from tiny_policies import HIDDEN, ModelFolders, rollout_rows, tiny_flow

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
NAMED_TESTS = re.compile(r"\[`([\w/.]+\.py)`\]\(\.\./tests/([\w/.]+)\)(?::((?:,?\s+`test_\w+`)+))?")


NUMBER = re.compile(r"-?[\d.]+")


def rows_of(heading: str) -> list[list[str]]:
    """Cells of the table rows below a heading, without header rows."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    rules = [at for at, row in enumerate(rows) if row[0].startswith("---")]
    return [row for at, row in enumerate(rows) if at not in rules and at + 1 not in rules]


# What the page names


def test_every_function_that_is_named_exists_in_the_file_it_links_to() -> None:
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./src/rlfr_cli/([\w/]+)\.py\)", PAGE)
    assert len(links) > 80
    assert len(links) == PAGE.count("](../src/")
    for name, path in links:
        module = path.replace("/", ".")
        assert name.startswith(f"{module}."), name
        attributes = name.removeprefix(f"{module}.").split(".")
        found = reduce(getattr, attributes, importlib.import_module(f"rlfr_cli.{module}"))
        assert getattr(found, "__module__", f"rlfr_cli.{module}") == f"rlfr_cli.{module}", f"{name} is only imported"


def test_every_test_that_is_named_exists_in_the_file_it_links_to() -> None:
    seen = 0
    for text, path, names in NAMED_TESTS.findall(PAGE):
        assert text in (path, f"tests/{path}")
        source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        for name in re.findall(r"test_\w+", names):
            assert f"\ndef {name}(" in source, f"{name} is not in {path}"
            seen += 1
    assert seen == len(re.findall(r"`test_\w+`", PAGE)) > 150


def test_every_option_that_is_named_exists_and_takes_the_value_that_is_named() -> None:
    cli = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    choices = {leaf.flag: leaf.type.base for command in COMMANDS.values() for leaf in leaf_options(command.config)}
    for flag, value in re.findall(r"(?<!\w)(--[a-z][\w-]*)(?: ([\w.-]+)`)?", PAGE):
        assert flag in choices or f"`{flag}`" in cli, flag
        if value and issubclass(choices.get(flag, str), Enum):
            assert value in list(choices[flag]), f"{flag} {value}"


def test_every_reference_rule_and_estimator_is_named() -> None:
    for name, rule in RULES.items():
        assert f"`{name}=" in PAGE if isinstance(rule, BoundRule) else f"| `{name}`" in PAGE, name
    for choice in (*Estimator, *Aggregation, *Normalise):
        assert re.search(rf"(^|\s){choice.value}(\s|,|$)", PAGE, re.MULTILINE), choice


def test_every_recorded_family_is_named(shared: Path) -> None:
    named = [row[0].strip("`") for row in rows_of("Recorded families")]
    files = [path.stem for path in (shared / "conformance").iterdir() if path.stem not in ("README", "FINDINGS")]
    assert {name[:2] for name in named} == {f"{number:02}" for number in range(1, 11)}
    assert all(sum(file.startswith(name) for name in named) == 1 for file in files)
    assert all(any(file.startswith(name) for file in files) for name in named)


# The example


def test_the_example_by_hand() -> None:
    written = {row[0]: [cell.replace("−", "-") for cell in row[1:]] for row in rows_of("By hand")}
    rows = {name: [float(cell) for cell in cells if NUMBER.fullmatch(cell)] for name, cells in written.items()}
    deviation, offsets = torch.tensor(rows["deviation"][:3]), torch.tensor([0, 3, 5])
    scores = [deviation * score_weights((0.8,)), torch.full((2,), 3.0)]
    found: dict[str, Any] = {"deviation": deviation, "score": scores[0]}
    for name, options in {
        "min-max": ShapingOptions(threshold=0, top_k=0),
        "above the threshold": ShapingOptions(),
    }.items():
        found[name] = shape_scores(torch.cat(scores), torch.ones(5, dtype=torch.bool), offsets, options).shaped_K[:3]
    outcomes, group = torch.tensor([1.0, 0.5]), torch.tensor([0, 0])
    relative = normalise_outcomes(outcomes, group, Estimator.GROUP_NORM)
    plain_K, centred_K = (torch.cat(flow_rewards(scores, FlowRewardConfig(centre_reward=c))) for c in (False, True))
    advantages_K = advantages(outcomes, group, plain_K, offsets)
    found |= {
        "flow reward": plain_K[:3],
        "token reward": token_rewards(relative, plain_K, offsets)[:3],
        "advantage": advantages_K[:3],
        "centred flow reward": centred_K[:3],
        "centred advantage": advantages(outcomes, group, centred_K, offsets)[:3],
    }
    assert advantages_K[3:].tolist() == pytest.approx([-0.70711] * 2, abs=5e-6)
    logprobs_K = torch.full((5,), -1.0)
    for aggregation in Aggregation:
        weights_K = token_weights(aggregation, offsets.diff(), constant_length=1024)
        loss, _ = policy_loss(logprobs_K, logprobs_K, advantages_K, weights_K, PolicyLossOptions())
        found[aggregation.value] = loss[None]
    assert rows.keys() == found.keys()
    for name, values in found.items():
        assert rows[name] == pytest.approx(values.tolist(), abs=5.1e-6), name


# The refusals


def train(**options: Any) -> TrainRlConfig:
    return TrainRlConfig(model="m", problems=ProblemsConfig(data="d"), **options)


def of_a_new_flow() -> list[Callable[[], object]]:
    changes = {"context": ("self",), "shift": 2, "context_layer": "3", "depth": 2, "width": 8, "time_scale": 2.0}
    networks = [NetworkConfig(**{key: value}) for key, value in {**changes, "normalisation": "channel"}.items()]
    return [lambda n=n: train(flow="f", network=n) for n in networks] + [lambda: train(flow="f", layer_fraction=(0.5,))]


# In the order of the page's table.
REFUSED: list[list[Callable[[], object]]] = [
    [lambda: train(flow="f", new_flow=True)],
    of_a_new_flow(),
    [lambda: train(new_flow=True, network=NetworkConfig(normalisation="channel"))],
    [lambda: train(new_flow=True, online=OnlineConfig(online_steps=0))],
    [
        lambda: OnlineConfig(online_steps=0, buffer_responses=1),
        lambda: OnlineConfig(online_steps=0, expert_latents=Path("l")),
    ],
    [lambda: train(scores="random"), lambda: train(scores="shuffled")],
    [
        lambda: train(flow="f", rollout=RolloutConfig(dynamic_sampling=True)),
        lambda: train(scores="entropy", rollout=RolloutConfig(dynamic_sampling=True)),
    ],
    [lambda: train(sampling=SamplingConfig(top_p=0.9)), lambda: train(sampling=SamplingConfig(top_k=5))],
    [lambda: train(sampling=SamplingConfig(temperature=0.0))],
    [lambda: train(evaluation=RunEvalConfig(eval_temperature=0.0, eval_samples=2))],
    [lambda: PolicyLossConfig(kl_coef=0.1)],
    [lambda: PolicyLossConfig(kl_in="reward", reference_model="r")],
    [
        lambda: PolicyLossConfig(kl_ratio=True),
        lambda: PolicyLossConfig(kl_ratio=True, kl_coef=0.1, kl_in="reward", reference_model="r"),
    ],
    [lambda: PolicyLossConfig(ratio_cap=1.0), lambda: PolicyLossConfig(dual_clip=0.5)],
    [lambda: PolicyLossConfig(entropy_advantage_cap=1.0)],
    [lambda: FlowRewardConfig(antithetic=True, num_draws=3)],
    [lambda: FlowRewardConfig(draw_agreement=0.9, num_draws=8, max_draws=4)],
    [lambda: NetworkConfig(context=("next", "next"))],
    [lambda: train(dtype="float16"), lambda: FitFlowConfig(latents=(Path("l"),), dtype="float16")],
    [lambda: train(overwrite=True, resume=True)],
]


def test_what_excludes_each_other_is_refused() -> None:
    for (given, _), makers in zip(rows_of("Options that exclude each other"), REFUSED, strict=True):
        flags = re.findall(r"--[\w-]+", given)
        for make in makers:
            with pytest.raises(ConfigError) as refused:
                make()
            assert any(flag in str(refused.value) for flag in flags), given
    assert train(flow="f").has_flow
    assert PolicyLossConfig(kl_ratio=True, kl_coef=0.1, reference_model="r").kl_ratio


# The work of a score


def rows_through(flow: Flow) -> Counter[str]:
    """Rows that go through each part of the network from now on."""
    rows: Counter[str] = Counter()
    block = flow.network.blocks[0]
    parts = {"condition": flow.network.cond_embed, "time": flow.network.time_embed, "layer": flow.network.layer_embed}
    for name, part in {**parts, "modulation": block.adaLN_modulation[1], "block": block.mlp}.items():
        part.register_forward_hook(lambda _m, inputs, _o, name=name: rows.update({name: inputs[0].shape[0]}))
    return rows


def test_draws_share_what_does_not_depend_on_the_noise() -> None:
    """Of 2 layers, 2 pairings, 3 timesteps and 4 draws, those of each token that a part has to be computed for."""
    flow = tiny_flow()
    flow.pairings = (Pairing(Context.NEXT), Pairing(Context.PREVIOUS))
    pairs = flow.pair([torch.randn(tokens, 2, HIDDEN) for tokens in (8, 5)])
    valid = pairs.paired.num_valid
    assert valid == 6 + 3
    rows = rows_through(flow)
    deviations(flow.network, pairs, keyed_noise(0, ["a", "b"], pairs), timesteps=(0.5, 0.8, 0.9), num_draws=4)
    assert rows == {
        "layer": 2,
        "time": 2 * 3,
        "condition": valid * 2 * 2,
        "modulation": valid * 2 * 2 * 3,
        "block": valid * 2 * 2 * 3 * 4,
    }


def test_a_batch_is_read_once_and_only_its_valid_tokens_are_scored(model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow()
    responses = rollout_rows([(40, 9), (7, 20), (3, 12), (5, 1)])
    rows, read = rows_through(flow), []
    policy.decoder.register_forward_pre_hook(
        lambda _m, _i, named: read.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    measure(
        policy,
        flow,
        responses,
        [True] * 4,
        temperature=1.0,
        reward=FlowRewardConfig(),
        scores_from=ScoreSource.FLOW,
        key=(0, 1),
        tokens_per_batch=80,
    )
    assert len(read) > 1
    assert sum(read) == 4
    assert rows["block"] == rows["condition"] == 2 * (8 + 19 + 11 + 0)
