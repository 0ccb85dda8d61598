"""`rlfr diagnose`: whether a flow's scores carry signal, before GPUs are spent on them.

Reads a flow, its policy and graded rollouts; writes ``diagnosis.json`` and plots, and says in plain words what follows.
The policy reads each response once, and the half of the problems that the Gaussian baseline is fitted on once more.
What is measured is in ``diagnosis_measuring.py``, the statistics in ``report/diagnosis_statistics.py``, and the rules
of the words in ``report/diagnosis_words.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from rlfr_cli import console
from rlfr_cli.artifacts.files import read_json, write_atomically
from rlfr_cli.artifacts.flow_file import FlowHeader, check_flow_fits, flow_fingerprint
from rlfr_cli.artifacts.rollouts import RolloutsFolder
from rlfr_cli.artifacts.run_folder import run_config_of
from rlfr_cli.config.diagnose import DiagnoseConfig
from rlfr_cli.errors import InputError, during_work
from rlfr_cli.flow.diagnostics import num_top_channels, top_channel_share
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.policy.loading import load_policy, resolve_placement
from rlfr_cli.report.diagnosis import (
    ResponseTable,
    by_token,
    correlations,
    explained_by_identity,
    reward_of_classes,
    separation_of_responses,
    separation_of_tokens,
)
from rlfr_cli.report.diagnosis_plots import PLOTS, draw_plots
from rlfr_cli.report.diagnosis_statistics import draws_needed
from rlfr_cli.report.diagnosis_words import conclude
from rlfr_cli.report.scores import token_examples
from rlfr_cli.report.tables import Drawing
from rlfr_cli.report.text_plots import interval_lines, share_lines
from rlfr_cli.stages.choosing_draws import chosen_on_rollouts
from rlfr_cli.stages.common import ModelInput, open_model, open_output, stopping
from rlfr_cli.stages.diagnosis_measuring import NUM_DRAWS, Measured, channel_statistics, measure, problem_halves
from rlfr_cli.stages.flow_evaluation import velocity_rows, verdict
from rlfr_cli.stages.flows import load_flow
from rlfr_cli.stages.responses import Responses, check_prompts_hold, check_vocabulary, read_rollout_responses

RESULTS = "diagnosis.json"
PROBLEMS_AT_ONCE = 64


def run(config: DiagnoseConfig) -> dict[str, Any]:
    """Diagnose a flow; returns the short form of what ``diagnosis.json`` holds.

    Raises:
        RlfrError: anything wrong with config, inputs or output folder, before work starts.
    """
    header, flow = load_flow(config.flow, resolve_placement(config.device, config.dtype).device)
    model = open_model(config.model, config)
    for warning in check_flow_fits(header, model=model.fingerprint):
        console.warn(warning)
    responses = read_rollout_responses(config.rollouts, PROBLEMS_AT_ONCE, limit=config.limit)
    check_vocabulary(responses, model)
    check_prompts_hold(responses, flow.num_prompt)
    seen, judged = problem_halves(responses)
    if not judged:
        raise InputError(
            f"{config.rollouts} holds responses to one problem only, and a flow is judged on two halves of problems",
            hint="sample responses to more problems",
        )
    temperature = config.temperature if config.temperature is not None else _temperature(config)
    if config.flow_reward.draw_agreement > 0:
        chosen = chosen_on_rollouts(config.flow_reward, flow, model, responses, config.seed, config.tokens_per_batch)
        config = replace(config, flow_reward=chosen)
    inputs = {
        "flow": flow_fingerprint(config.flow),
        "model": model.fingerprint.to_dict(),
        "rollouts": responses.fingerprint,
    }
    folder = open_output(config, "diagnosis", inputs, 0, files=[RESULTS, *PLOTS])
    plan = {"out": str(config.out), "responses": responses.num_rows, "tokens": responses.num_response_tokens()}
    if folder is None:
        return {"dry_run": True, **plan}
    if not folder.complete:
        with during_work(), stopping(config.out):
            policy = load_policy(model.folder, model.placement)
            statistics = channel_statistics(policy, flow, responses, seen, config.tokens_per_batch)
            measured = measure(policy, flow, responses, statistics, judged, config, temperature)
            results = {
                "settings": _settings(config, header, responses, seen, judged, temperature),
                **_results(config, model, header, flow, statistics, measured),
            }
            # Not sorted by key: tables are printed in the order that is written here.
            write_atomically(config.out / RESULTS, json.dumps(results, indent=2, allow_nan=False).encode())
            draw_plots(config.out, results)
            folder.finish()
    results = read_json(config.out / RESULTS)
    return {**plan, "complete": True, **short_form(results)}


def _temperature(config: DiagnoseConfig) -> float:
    """That of the rollouts, or of the run that they are of; 1 where neither names it."""
    rollouts = RolloutsFolder(config.rollouts)
    stage = run_config_of(rollouts.path) or rollouts.folders[0].stage
    return float(stage["config"].get("sampling", {}).get("temperature", 1.0))


def _settings(
    config: DiagnoseConfig,
    header: FlowHeader,
    responses: Responses,
    seen: list[int],
    judged: list[int],
    temperature: float,
) -> dict[str, Any]:
    return {
        "responses": responses.num_rows,
        "problems": len(set(responses.table["problem_id"].to_pylist())),
        "layers": list(header.layer_indices),
        "pairings": list(header.pairings),
        "context_layer": header.context_layer,
        "timesteps": list(config.flow_reward.timestep),
        "num_draws": config.flow_reward.num_draws,
        "temperature": temperature,
        "gaussian_fitted_on_responses": len(seen),
        "velocity_judged_on_responses": len(judged),
        "seed": config.seed,
    }


def _results(
    config: DiagnoseConfig,
    model: ModelInput,
    header: FlowHeader,
    flow: Flow,
    statistics: LatentStatistics,
    measured: Measured,
) -> dict[str, Any]:
    """Everything that is reported, from what was measured."""
    responses, tokens, seed = measured.responses, measured.tokens, config.seed
    errors = velocity_rows(flow, measured.velocity_errors)
    results: dict[str, Any] = {
        "graded": int(responses.graded.sum()),
        "wrong": int((responses.graded & responses.wrong).sum()),
        "both_classes": responses.of_both_classes,
        "why_one_class": _why_one_class(responses),
        "separation": separation_of_responses(responses, tokens, seed=seed),
        "first_wrong_token": separation_of_tokens(responses, tokens, seed=seed),
        "flow_reward": reward_of_classes(responses, tokens),
        "velocity_error": {"rows": errors, "verdict": verdict(errors)["text"]},
        "noise_agreement": _noise_agreement(measured),
        "context_agreement": _context_agreement(header.contexts, measured),
        "top_channels": _top_channels(flow, statistics, measured),
        "correlations": correlations(responses, tokens, seed=seed),
        "token_identity": explained_by_identity(tokens),
        "mean_score": float(tokens.score.mean()) if len(tokens.score) else None,
        "valid_tokens": len(tokens.score),
        **token_examples(by_token(tokens), config.examples, lambda token: repr(model.tokenizer.decode([token]))),
    }
    return {"answer": conclude(results), **results}


def _why_one_class(responses: ResponseTable) -> str | None:
    if responses.of_both_classes:
        return None
    if not responses.graded.any():
        return "no response is graded"
    return f"every graded response is {'wrong' if responses.wrong[responses.graded].all() else 'correct'}"


def _noise_agreement(measured: Measured) -> dict[str, Any]:
    """Means over responses of the agreement of two independent sets of draws."""
    rows = [
        {
            "draws": num,
            "spearman": _mean(measured.agreements[:, place, 0]),
            "jaccard_of_rewarded": _mean(measured.agreements[:, place, 1]),
        }
        for place, num in enumerate(NUM_DRAWS)
    ]
    most, agreement = NUM_DRAWS[-1], rows[-1]["spearman"]
    return {
        "responses": len(measured.agreements),
        "rows": rows,
        "draws_needed": None if agreement is None else draws_needed(agreement, most),
    }


def _context_agreement(contexts: list[str], measured: Measured) -> dict[str, Any]:
    between = contexts if len(contexts) > 1 else [contexts[0], "shuffled within the response"]
    return {"between": between, "spearman": _mean(measured.context_agreements)}


def _top_channels(flow: Flow, statistics: LatentStatistics, measured: Measured) -> list[dict[str, Any]]:
    """Shares of the deviation, and of the raw latents' squared norm, that lie in its own largest 1 % of channels."""
    squares_JD = (statistics.mean_JD.square() + statistics.std_JD.square()).cpu()
    channels = squares_JD.shape[1]
    top = num_top_channels(channels)
    return [
        {
            "layer": layer,
            "channels": top,
            "of": channels,
            "share_if_even": top / channels,
            "share_of_deviation": top_channel_share(measured.channel_error_JD[column]),
            "share_of_squared_norm": top_channel_share(squares_JD[column]),
        }
        for column, layer in enumerate(flow.layers.indices)
    ]


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def short_form(results: dict[str, Any]) -> dict[str, Any]:
    """What is printed: the tables, the same in pictures, and the words."""
    velocity = results["velocity_error"]["rows"]
    found = results["first_wrong_token"]
    return {
        "graded": results["graded"],
        "wrong": results["wrong"],
        "velocity_error": velocity,
        "share_of_gaussian_error_removed": Drawing(
            share_lines(
                [(f"block {row['layer']}, t = {row['timestep']}", row["share_of_gaussian_removed"]) for row in velocity]
            )
        ),
        "separation_of_wrong_from_correct": results["separation"]["rows"],
        "within_problems": Drawing(
            interval_lines(
                [
                    (row["measure"], row["within_problems"], row["within_low"], row["within_high"])
                    for row in results["separation"]["rows"]
                ]
            )
        ),
        "first_wrong_tokens": {key: found[key] for key in ("wrong_responses", "located", "compared")},
        "separation_of_first_wrong_tokens": found["rows"],
        "at_first_wrong_tokens": Drawing(
            interval_lines([(row["measure"], row["auc"], row["low"], row["high"]) for row in found["rows"]])
        ),
        "noise_agreement": results["noise_agreement"]["rows"],
        "draws_needed_for_0.95": results["noise_agreement"]["draws_needed"],
        "context_agreement": results["context_agreement"]["spearman"],
        "top_channels": results["top_channels"],
        "rank_correlation_of_score": results["correlations"],
        "variance_explained_by_token_identity": results["token_identity"],
        "flow_reward": results["flow_reward"],
        **{key: results[key] for key in ("most_penalised_tokens", "least_penalised_tokens") if key in results},
        "answer": results["answer"],
    }
