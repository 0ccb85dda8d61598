"""`rlfr diagnose` of a flow that has learnt nothing, every number worked out here a second time from the policy.

Its velocity is 0, so a token's score is 4 times the mean square of latent less noise: little but the latent's norm,
deaf to its context. The responses are right chains of the embedded problems and the same with one wrong digit, whose
place is known.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, rollout_table
from rlfr_cli.cli import app
from rlfr_cli.config.diagnose import DiagnoseConfig
from rlfr_cli.config.flow import NetworkConfig
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.noise import response_noise
from rlfr_cli.flow.pairing import Pairing
from rlfr_cli.policy.prompts import PromptRenderer
from rlfr_cli.report.diagnosis_plots import PLOTS
from rlfr_cli.stages import diagnose
from rlfr_cli.stages.flows import new_flow, new_header, write_flow

LAYERS, HIDDEN, SEED = (2, 5), 128, 3
NUM_PROBLEMS, DRAWS = 12, (1, 4, 16)


@dataclass(frozen=True)
class Artifacts:
    folder: Path
    policy: Path
    rollouts: Path
    flow: Path


@dataclass
class Known:
    """What is worked out here of one response; arrays hold its valid tokens, all but the last."""

    row: RolloutRow
    first_result: int  # where the first digit of the first step's result stands
    score: np.ndarray
    norm: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray
    draws_TS: np.ndarray
    errors_JD: np.ndarray
    all_nll: float
    all_entropy: float
    latents: torch.Tensor  # [1 + T, layers, HIDDEN], the last prompt token first

    @property
    def ids(self) -> np.ndarray:
        return np.array(self.row.response_token_ids[:-1])

    @property
    def rewards(self) -> np.ndarray:
        return -0.01 * shaped(self.score)


def shaped(scores: np.ndarray) -> np.ndarray:
    """Min-max, above 0.6, the 15 largest."""
    shares = (scores - scores.min()) / (scores.max() - scores.min())
    kept = np.zeros_like(shares)
    best = np.argsort(-shares, kind="stable")[:15]
    kept[best] = shares[best]
    return np.where(kept > 0.6, kept, 0)


def with_wrong_digit(solution: str, turn: int) -> str:
    """The first digit after the first equals sign is another one; what follows stays as it is."""
    at = solution.index("=") + 1
    digit = str((int(solution[at]) + 1 + turn) % 10)
    return solution[:at] + digit + solution[at + 1 :]


def make_rows(policy: Path, data: Path) -> list[RolloutRow]:
    """Two right and two wrong responses to each problem; one problem has only right ones."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    renderer = PromptRenderer(tokenizer, "", None)
    rows = []
    for number, line in enumerate((data / "expert.jsonl").read_text().splitlines()[:NUM_PROBLEMS]):
        problem = json.loads(line)
        for sample in range(4):
            wrong = sample % 2 == 1 and number != 5
            text = with_wrong_digit(problem["solution"], sample) if wrong else problem["solution"]
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            rows.append(
                RolloutRow(
                    problem_id=problem["id"],
                    sample_index=sample,
                    problem=problem["problem"],
                    answer=[problem["answer"]],
                    prompt_token_ids=renderer.render(problem["problem"]),
                    response_token_ids=ids,
                    response_logprobs=[-1.0] * len(ids),
                    response=text,
                    finish_reason="stop",
                    reward=float(not wrong),
                    correct=not wrong,
                    grade="wrong" if wrong else "correct",
                    source="policy",
                )
            )
    return rows


@pytest.fixture(scope="module")
def artifacts(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    folder, policy = tmp_path_factory.mktemp("known"), repository / "data" / "policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        header = new_header(
            NetworkConfig(width=8, depth=1), model=model_fingerprint(policy), layer_indices=LAYERS, rms_epsilon=1e-6
        )
        write_flow(folder / "flow.safetensors", header, new_flow(header, 0, torch.device("cpu")))
        rollouts = StageFolder.open_for_writing(
            folder / "rollouts", kind="rollouts", config={}, inputs={}, seed=0, num_units=1
        )
        rollouts.write_table(0, rollout_table(make_rows(policy, repository / "data")))
        rollouts.finish()
        found = Artifacts(folder, policy, folder / "rollouts", folder / "flow.safetensors")
        config = DiagnoseConfig(
            flow=found.flow,
            model=str(policy),
            rollouts=found.rollouts,
            out=folder / "diagnosis",
            device="cpu",
            seed=SEED,
            examples=3,
        )
        diagnose.run(config)
    return found


@pytest.fixture(scope="module")
def results(artifacts: Artifacts) -> dict[str, Any]:
    return json.loads((artifacts.folder / "diagnosis" / "diagnosis.json").read_text())


@pytest.fixture(scope="module")
def known(artifacts: Artifacts, repository: Path) -> list[Known]:
    model = AutoModelForCausalLM.from_pretrained(artifacts.policy)
    return [known_of(model, row) for row in make_rows(artifacts.policy, repository / "data")]


@torch.no_grad()
def known_of(model: Any, row: RolloutRow) -> Known:
    prompt, ids = row.prompt_token_ids, row.response_token_ids
    output = model(input_ids=torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
    latents = [output.hidden_states[layer + 1][0, len(prompt) :] for layer in LAYERS]
    key = f"{row.problem_id}\n{row.sample_index}"
    squares = [
        torch.stack(
            [
                (latent - response_noise(SEED, key, layer, draw, num_tokens=len(ids), size=HIDDEN))[:-1].square()
                for draw in range(2 * DRAWS[-1])
            ]
        )
        for latent, layer in zip(latents, LAYERS, strict=True)
    ]
    draws_ST = 4 * torch.stack(squares).mean(dim=(0, 3))
    distribution = output.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    nll = -distribution.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    norms = torch.stack([latent.square().mean(-1).sqrt() for latent in latents]).mean(0)
    return Known(
        row=row,
        first_result=row.response.index("=") + 1,
        score=draws_ST[0].double().numpy(),
        norm=norms[:-1].double().numpy(),
        nll=nll[:-1].numpy(),
        entropy=entropy[:-1].numpy(),
        draws_TS=draws_ST.T.double().numpy(),
        errors_JD=torch.stack([of_layer[0].sum(0) for of_layer in squares]).double().numpy(),
        all_nll=float(nll.mean()),
        all_entropy=float(entropy.mean()),
        latents=torch.stack([output.hidden_states[layer + 1][0, len(prompt) - 1 :] for layer in LAYERS], dim=1),
    )


def auc(positive: list[float], negative: list[float]) -> float:
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in positive for b in negative]))


def ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + 0.5 * (values[:, None] == values).sum(1)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def areas(known: list[Known], values: list[float]) -> tuple[float, float]:
    """Area of wrong over correct, overall, and as the mean over problems with both."""
    wrong = [not item.row.correct for item in known]
    overall = auc(
        [v for v, bad in zip(values, wrong, strict=True) if bad],
        [v for v, bad in zip(values, wrong, strict=True) if not bad],
    )
    by_problem: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for item, value in zip(known, values, strict=True):
        by_problem[item.row.problem_id][int(item.row.correct)].append(value)
    within = [auc(bad, good) for bad, good in by_problem.values() if bad and good]
    assert len(within) == NUM_PROBLEMS - 1
    return overall, float(np.mean(within))


# Velocity


def test_its_velocity_error_is_that_of_zero_velocity_and_it_is_said_to_have_learnt_nothing(
    results: dict[str, Any],
) -> None:
    rows = results["velocity_error"]["rows"]
    assert {row["layer"] for row in rows} == set(LAYERS)
    assert len({row["timestep"] for row in rows}) >= 10
    for row in rows:
        assert row["flow"] == pytest.approx(row["zero"], rel=1e-6)
        assert row["share_of_gaussian_removed"] == pytest.approx(1 - row["zero"] / row["gaussian"], rel=1e-6)
        assert row["share_of_gaussian_removed"] < 0
    assert "does NOT beat a per-channel Gaussian at any layer" in results["velocity_error"]["verdict"]
    assert "does NOT beat a per-channel Gaussian" in results["answer"]["in_words"]


# Responses and tokens


@pytest.mark.parametrize("measure", ["score", "negative_logprob", "entropy", "length", "latent_norm"])
def test_areas_of_the_score_and_its_controls(measure: str, results: dict[str, Any], known: list[Known]) -> None:
    values = {
        "score": [float(item.score.mean()) for item in known],
        "negative_logprob": [item.all_nll for item in known],
        "entropy": [item.all_entropy for item in known],
        "length": [float(len(item.ids)) for item in known],
        "latent_norm": [float(item.norm.mean()) for item in known],
    }[measure]
    row = next(row for row in results["separation"]["rows"] if row["measure"] == measure)
    assert (row["auc"], row["within_problems"]) == pytest.approx(areas(known, values), abs=1e-6)
    assert row["low"] <= row["auc"] <= row["high"]
    assert row["within_low"] <= row["within_problems"] <= row["within_high"]
    assert row["problems"] == NUM_PROBLEMS - 1


def test_token_identity_alone_is_the_mean_score_of_the_same_token_elsewhere(
    results: dict[str, Any], known: list[Known]
) -> None:
    elsewhere = []
    for item in known:
        others = [other for other in known if other is not item]
        scores, ids = np.concatenate([o.score for o in others]), np.concatenate([o.ids for o in others])
        elsewhere.append(float(np.mean([scores[ids == token].mean() for token in item.ids])))
    row = next(row for row in results["separation"]["rows"] if row["measure"] == "token_identity")
    assert (row["auc"], row["within_problems"]) == pytest.approx(areas(known, elsewhere), abs=1e-6)


def test_a_flow_that_is_deaf_to_its_context_does_not_care_that_it_is_shuffled(results: dict[str, Any]) -> None:
    rows = {row["measure"]: row for row in results["separation"]["rows"]}
    given, shuffled = ({**rows[name], "measure": ""} for name in ("score", "shuffled_context"))
    assert given == shuffled
    assert results["separation"]["above_shuffled_context"]["value"] == 0
    assert results["context_agreement"]["spearman"] == pytest.approx(1)
    assert results["context_agreement"]["between"] == ["next 1", "shuffled within the response"]


def test_random_latents_are_other_ones_and_separate_nothing(results: dict[str, Any]) -> None:
    rows = {row["measure"]: row for row in results["separation"]["rows"]}
    assert rows["random_latents"]["auc"] != rows["score"]["auc"]
    assert rows["random_latents"]["low"] < 0.5 < rows["random_latents"]["high"]


def test_the_first_wrong_token_is_the_changed_digit(results: dict[str, Any], known: list[Known]) -> None:
    """Each is compared with the first digit of the first result of all correct responses, whatever the problem."""
    found = results["first_wrong_token"]
    wrong = [item for item in known if not item.row.correct]
    right = [item for item in known if item.row.correct]
    assert found["wrong_responses"] == found["located"] == found["compared"] == len(wrong) == 2 * (NUM_PROBLEMS - 1)
    assert found["with_tokens"] == len(right)
    rows = {row["measure"]: row for row in found["rows"]}
    for measure, name in (
        ("score", "score"),
        ("negative_logprob", "nll"),
        ("entropy", "entropy"),
        ("latent_norm", "norm"),
    ):
        wanted = auc(*([float(getattr(i, name)[i.first_result]) for i in items] for items in (wrong, right)))
        assert rows[measure]["auc"] == pytest.approx(wanted, abs=1e-6), measure
        assert rows[measure]["low"] <= rows[measure]["auc"] <= rows[measure]["high"]
    # A policy that was trained on right chains is surprised by a wrong digit.
    assert rows["negative_logprob"]["low"] > 0.8
    assert rows["entropy"]["auc"] != rows["negative_logprob"]["auc"]
    assert {"token_identity", "random_latents", "shuffled_context", "score_beyond_controls"} < rows.keys()


# The token score


def test_rank_correlations_with_all_simple_quantities(results: dict[str, Any], known: list[Known]) -> None:
    ids = np.concatenate([item.ids for item in known])
    counts = {token: int((ids == token).sum()) for token in set(ids.tolist())}
    quantities = {
        "latent norm": np.concatenate([item.norm for item in known]),
        "position in response": np.concatenate([np.arange(len(item.ids)) for item in known]),
        "response length": np.concatenate([np.full(len(item.ids), len(item.ids) + 1) for item in known]),
        "token frequency": np.array([counts[token] for token in ids.tolist()]),
        "entropy": np.concatenate([item.entropy for item in known]),
        "log-probability": -np.concatenate([item.nll for item in known]),
    }
    score = np.concatenate([item.score for item in known])
    rows = {row["with"]: row for row in results["correlations"]}
    assert rows.keys() == quantities.keys()
    for name, values in quantities.items():
        assert rows[name]["spearman"] == pytest.approx(rank_correlation(score, values), abs=1e-3), name
        assert rows[name]["low"] <= rows[name]["spearman"] <= rows[name]["high"]
    assert rows["latent norm"]["low"] > 0.9  # this score is the norm
    assert len({round(row["spearman"], 3) for row in rows.values()}) == 6


def test_variance_explained_by_token_identity(results: dict[str, Any], known: list[Known]) -> None:
    score, ids = np.concatenate([item.score for item in known]), np.concatenate([item.ids for item in known])
    tokens = set(ids.tolist())
    left = sum(float(((score[ids == t] - score[ids == t].mean()) ** 2).sum()) for t in tokens)
    unexplained = left / float(((score - score.mean()) ** 2).sum())
    wanted = 1 - unexplained * (len(score) - 1) / (len(score) - len(tokens))
    assert results["token_identity"]["identities"] == len(tokens)
    assert results["token_identity"]["adjusted"] == pytest.approx(wanted, abs=1e-5)
    missed = baseline = 0.0
    for item in known:
        others = [other for other in known if other is not item]
        other_scores, other_ids = np.concatenate([o.score for o in others]), np.concatenate([o.ids for o in others])
        guesses = np.array([other_scores[other_ids == token].mean() for token in item.ids])
        missed += float(((item.score - guesses) ** 2).sum())
        baseline += float(((item.score - other_scores.mean()) ** 2).sum())
    assert results["token_identity"]["cross_validated"] == pytest.approx(1 - missed / baseline, abs=1e-5)
    assert results["mean_score"] == pytest.approx(float(score.mean()), rel=1e-5)
    assert results["valid_tokens"] == len(score)


def test_agreement_of_two_sets_of_noise_draws(results: dict[str, Any], known: list[Known]) -> None:
    noise, half = results["noise_agreement"], DRAWS[-1]
    assert noise["responses"] == len(known)
    for row, num in zip(noise["rows"], DRAWS, strict=True):
        correlations, shares = [], []
        for item in known:
            a, b = item.draws_TS[:, :num].mean(1), item.draws_TS[:, half : half + num].mean(1)
            correlations.append(rank_correlation(a, b))
            chosen = [set(np.flatnonzero(shaped(scores)).tolist()) for scores in (a, b)]
            shares.append(len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1]))
        assert row["draws"] == num
        assert row["spearman"] == pytest.approx(np.mean(correlations), abs=1e-3)
        assert row["jaccard_of_rewarded"] == pytest.approx(np.mean(shares), abs=1e-2)
    agreed = [row["spearman"] for row in noise["rows"]]
    assert agreed == sorted(agreed)
    assert agreed[0] < agreed[-1]
    r = agreed[-1]
    assert noise["draws_needed"] == max(1, math.ceil(half * 0.95 * (1 - r) / (r * 0.05)))


def test_share_of_the_deviation_in_the_largest_channels(results: dict[str, Any], known: list[Known]) -> None:
    """One in a hundred of 128 channels, rounded up, are 2."""
    errors_JD = np.sum([item.errors_JD for item in known], axis=0)
    for column, row in enumerate(results["top_channels"]):
        assert (row["layer"], row["channels"], row["of"]) == (LAYERS[column], 2, HIDDEN)
        of_layer = np.sort(errors_JD[column])[::-1]
        assert row["share_of_deviation"] == pytest.approx(of_layer[:2].sum() / of_layer.sum(), rel=1e-4)
        assert row["share_if_even"] == 2 / HIDDEN < row["share_of_deviation"] < row["share_of_squared_norm"] < 1


def test_agreement_of_two_contexts(artifacts: Artifacts, known: list[Known], tmp_path: Path) -> None:
    """A random flow of two pairings: the mean over responses of the rank correlation of its two scores."""
    header = new_header(
        NetworkConfig(width=8, depth=1, context=(Context.NEXT, Context.PREVIOUS)),
        model=model_fingerprint(artifacts.policy),
        layer_indices=LAYERS,
        rms_epsilon=1e-6,
    )
    flow = new_flow(header, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in flow.network.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    write_flow(tmp_path / "flow.safetensors", header, flow)
    given = {"model": str(artifacts.policy), "rollouts": artifacts.rollouts, "limit": 3, "device": "cpu"}
    diagnose.run(DiagnoseConfig(flow=tmp_path / "flow.safetensors", out=tmp_path / "d", seed=SEED, **given))
    found = json.loads((tmp_path / "d" / "diagnosis.json").read_text())["context_agreement"]
    assert found["between"] == ["next 1", "previous 1"]

    agreements = []
    for item in known[:12]:
        key = f"{item.row.problem_id}\n{item.row.sample_index}"
        alone = []
        for context in (Context.NEXT, Context.PREVIOUS):
            one = replace(flow, pairings=(Pairing(context),))
            scores_M = one.deviations(one.pair([item.latents]), [key], seed=SEED, timesteps=(0.8,)).score_M
            alone.append(scores_M[: len(item.ids)].double().numpy())
        agreements.append(rank_correlation(*alone))
    assert found["spearman"] == pytest.approx(np.mean(agreements), abs=2e-3)
    assert -0.9 < found["spearman"] < 0.999


# What is paid


def test_summed_flow_rewards_of_correct_and_wrong_responses(results: dict[str, Any], known: list[Known]) -> None:
    sums = {item.row.problem_id + str(item.row.sample_index): float(item.rewards.sum()) for item in known}
    correct = [sums[i.row.problem_id + str(i.row.sample_index)] for i in known if i.row.correct]
    wrong = [sums[i.row.problem_id + str(i.row.sample_index)] for i in known if not i.row.correct]
    reward = results["flow_reward"]
    assert reward["sum_of_correct"] == pytest.approx(np.mean(correct), rel=1e-4)
    assert reward["sum_of_wrong"] == pytest.approx(np.mean(wrong), rel=1e-4)
    differences = []
    for name in {item.row.problem_id for item in known}:
        bad, good = (
            [sums[name + str(i.row.sample_index)] for i in known if i.row.problem_id == name and i.row.correct is ok]
            for ok in (False, True)
        )
        if bad and good:
            differences.append(np.mean(bad) - np.mean(good))
    within = reward["wrong_less_correct_within_problems"]
    assert within["value"] == pytest.approx(np.mean(differences), rel=1e-3, abs=1e-5)
    assert within["low"] <= within["value"] <= within["high"]
    rewards = np.concatenate([item.rewards for item in known])
    assert reward["share_of_tokens_rewarded"] == pytest.approx((rewards != 0).mean())


def test_the_most_and_least_penalised_tokens_with_their_counts(
    artifacts: Artifacts, results: dict[str, Any], known: list[Known]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artifacts.policy)
    rewards, ids = np.concatenate([i.rewards for i in known]), np.concatenate([i.ids for i in known])
    score = np.concatenate([i.score for i in known])
    seen = {
        repr(tokenizer.decode([t])): (int((ids == t).sum()), rewards[ids == t].mean(), score[ids == t].mean())
        for t in set(ids.tolist())
    }
    often = {token: facts for token, facts in seen.items() if facts[0] >= 5}
    most, least = results["most_penalised_tokens"], results["least_penalised_tokens"]
    assert len(most) == len(least) == 3
    for row in (*most, *least):
        wanted = seen[row["token"]]
        assert row["count"] == wanted[0]
        assert (row["mean_flow_reward"], row["mean_score"]) == pytest.approx(wanted[1:], rel=1e-4, abs=1e-7)
    assert most[0]["mean_flow_reward"] == pytest.approx(min(facts[1] for facts in often.values()), rel=1e-4)
    assert least[0]["mean_flow_reward"] == pytest.approx(max(facts[1] for facts in often.values()), abs=1e-7)
    assert most[0]["mean_flow_reward"] < least[0]["mean_flow_reward"]


# What is printed


def test_the_command_prints_tables_and_the_paragraph_and_draws(
    artifacts: Artifacts, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(artifacts.folder / "cache"))
    arguments = ["--flow", artifacts.flow, "--model", artifacts.policy, "--rollouts", artifacts.rollouts]
    arguments += ["--out", artifacts.folder / "diagnosis", "--device", "cpu", "--seed", SEED, "--examples", 3]
    told = CliRunner().invoke(app, ["diagnose", *map(str, arguments)])
    assert told.exit_code == 0, told.output
    printed = told.stderr
    assert results["answer"]["in_words"] in printed
    for title in (
        "share_of_gaussian_error_removed",
        "separation_of_wrong_from_correct",
        "separation_of_first_wrong_tokens",
        "noise_agreement",
        "context_agreement",
        "top_channels",
        "rank_correlation_of_score",
        "variance_explained_by_token_identity",
        "flow_reward/sum_of_correct",
        "flow_reward/sum_of_wrong",
        "most_penalised_tokens",
        "least_penalised_tokens",
    ):
        assert title in printed, title
    for measure in ("negative_logprob", "entropy", "length", "random_latents", "shuffled_context", "token_identity"):
        assert printed.count(measure) >= 1, measure
    for name in PLOTS:
        assert (artifacts.folder / "diagnosis" / name).read_bytes().startswith(b"\x89PNG")
    short = CliRunner().invoke(app, ["diagnose", *map(str, arguments), "--json"])
    assert json.loads(short.stdout)["answer"] == results["answer"]
