"""`rlfr score`: how far each token of responses deviates from a flow, and the flow reward that it earns.

Reads a flow and either rollouts with the policy or latents; writes scores (Arrow shards, one row a response). For
graded rollouts it says how well scores separate wrong from correct responses, beside the control of the mean negative
log-probability. The formulas are in ``flow/deviation.py`` and ``flow/shaping.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlfr_cli import console
from rlfr_cli.artifacts.flow_file import FlowHeader, check_flow_fits, flow_fingerprint
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.artifacts.scores import ScoreRow, score_table
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.config.score import ScoreConfig
from rlfr_cli.errors import during_work
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.policy.batching import token_budget_batches
from rlfr_cli.policy.forward import decoder_latents
from rlfr_cli.policy.loading import Placement, load_decoder, resolve_placement
from rlfr_cli.policy.tapping import tap
from rlfr_cli.report.page_inputs import write_scores_page
from rlfr_cli.report.scores import ScoreSummary
from rlfr_cli.rl.measuring import flow_rewards
from rlfr_cli.stages.choosing_draws import RESPONSES_TO_CHOOSE_ON, chosen_on_rollouts, with_chosen_draws
from rlfr_cli.stages.common import ModelInput, open_model, open_output, parse_part, stopping
from rlfr_cli.stages.flows import load_flow
from rlfr_cli.stages.latent_sequences import check_latents_fit, columns_of
from rlfr_cli.stages.responses import Responses, check_prompts_hold, check_vocabulary, read_rollout_responses

# Response latents [prompt tokens kept + T, J, D] with the row they belong to.
LatentRow = tuple[int, torch.Tensor]


def run(config: ScoreConfig) -> dict[str, Any]:
    """Score responses; returns a summary.

    Raises:
        RlfrError: anything wrong with config, inputs or output folder, before work starts.
    """
    header, flow = load_flow(config.flow, resolve_placement(config.device, config.dtype).device)
    if config.latents is not None:
        return _score_latents(config, header, flow)
    return _score_rollouts(config, header, flow)


def _score_rollouts(config: ScoreConfig, header: FlowHeader, flow: Flow) -> dict[str, Any]:
    assert config.model is not None
    assert config.rollouts is not None
    model = open_model(config.model, config)
    for warning in check_flow_fits(header, model=model.fingerprint):
        console.warn(warning)
    responses = read_rollout_responses(config.rollouts, config.problems_per_shard, limit=config.limit)
    num_prompt = max(pairing["shift"] for pairing in header.pairings)
    check_vocabulary(responses, model)
    check_prompts_hold(responses, num_prompt)
    if config.flow_reward.draw_agreement > 0:
        chosen = chosen_on_rollouts(config.flow_reward, flow, model, responses, config.seed, config.tokens_per_batch)
        config = replace(config, flow_reward=chosen)
    inputs = {
        "flow": flow_fingerprint(config.flow),
        "model": model.fingerprint.to_dict(),
        "rollouts": responses.fingerprint,
    }
    folder = open_output(config, "scores", inputs, len(responses.units), extra=_extra(config, header))
    plan = {
        "out": str(config.out),
        "responses": responses.num_rows,
        "tokens": responses.num_response_tokens(),
    }
    if folder is None:
        return {"dry_run": True, **plan}
    missing = folder.missing_units(parse_part(config.part))
    if missing:
        with during_work(), stopping(config.out):
            _score_rollout_units(config, model, flow, responses, folder, missing)
    if not folder.finish():
        if config.html is not None:
            console.log(f"{config.html} is not written yet: it shows the scores of all parts")
        return {**plan, "complete": False, "units_missing": len(folder.missing)}
    summary = ScoreSummary(config.seed, config.examples, model.tokenizer)
    tables = [folder.read_table(unit) for unit in range(len(responses.units))]
    for table, rows in zip(tables, responses.units, strict=True):
        summary.add(table, responses.rows(rows))
    if config.html is not None:
        with during_work():
            plan["html"] = str(config.html)
            plan["responses_on_page"] = write_scores_page(
                config.html,
                scores=tables,
                rollouts=responses.table,
                tokenizer=model.tokenizer,
                header=header,
                flow=(config.flow.name, flow_fingerprint(config.flow)),
                model=model.fingerprint,
                reward=config.flow_reward,
                num_responses=config.html_responses,
            )
    return {**plan, "complete": True, **summary.result()}


def _score_rollout_units(
    config: ScoreConfig,
    model: ModelInput,
    flow: Flow,
    responses: Responses,
    folder: StageFolder,
    missing: Sequence[int],
) -> None:
    decoder = load_decoder(model.folder, model.placement, flow.tapped)
    total = sum(len(responses.units[unit]) for unit in missing)
    with console.progress("scoring", total=total, unit="responses") as bar, tap(decoder, flow.tapped) as taps:
        for unit in missing:
            rows = responses.units[unit]
            sequences = responses.sequences(rows)

            def batches() -> Iterator[list[LatentRow]]:
                for batch in token_budget_batches([len(s) for s in sequences], config.tokens_per_batch):  # noqa: B023
                    chosen = [sequences[index] for index in batch]  # noqa: B023
                    kept = decoder_latents(decoder, taps, chosen, flow.num_prompt, model.placement.device)
                    bar.advance(len(batch))
                    yield list(zip(batch, kept, strict=True))

            scored = _score(config, flow, responses.names(rows), batches(), flow.num_prompt, model.placement.dtype)
            folder.write_table(unit, score_table(scored, per_layer_timestep=config.per_layer))


def _score_latents(config: ScoreConfig, header: FlowHeader, flow: Flow) -> dict[str, Any]:
    assert config.latents is not None
    latents = LatentsFolder(config.latents)
    check_latents_fit(header, latents)
    columns = columns_of(latents, flow.tapped)
    placement = resolve_placement(config.device, config.dtype)
    if config.flow_reward.draw_agreement > 0:
        config = replace(config, flow_reward=_chosen_on_latents(config, flow, latents, columns, placement))
    inputs = {"flow": flow_fingerprint(config.flow), "latents": latents.fingerprint}
    folder = open_output(config, "scores", inputs, latents.num_shards, extra=_extra(config, header))
    plan = {"out": str(config.out), "responses": latents.num_sequences, "tokens": latents.num_tokens}
    if folder is None:
        return {"dry_run": True, **plan}
    missing = folder.missing_units(parse_part(config.part))
    if missing:
        with (
            during_work(),
            stopping(config.out),
            console.progress("scoring", total=len(missing), unit="shards") as bar,
        ):
            for unit in missing:
                scored = _score(
                    config,
                    flow,
                    latents.read_names(unit),
                    _shard_batches(latents, unit, columns, config.tokens_per_batch, placement.device),
                    latents.info.num_prompt_tokens,
                    placement.dtype,
                )
                folder.write_table(unit, score_table(scored, per_layer_timestep=config.per_layer))
                bar.advance()
    if not folder.finish():
        return {**plan, "complete": False, "units_missing": len(folder.missing)}
    tokenizer = None if config.model is None else open_model(config.model, config).tokenizer
    summary = ScoreSummary(config.seed, config.examples, tokenizer)
    for unit in range(latents.num_shards):
        summary.add_unlabelled(folder.read_table(unit), latents.read_response_tokens(unit))
    return {**plan, "complete": True, **summary.result()}


def _chosen_on_latents(
    config: ScoreConfig, flow: Flow, latents: LatentsFolder, columns: list[int], placement: Placement
) -> FlowRewardConfig:
    """The options of flow rewards with the draws chosen on the first sequences of the latents."""
    names = latents.read_names(0)[:RESPONSES_TO_CHOOSE_ON]
    shard = latents.read_sequences(0, 0, len(names))
    return with_chosen_draws(
        config.flow_reward,
        flow,
        [shard.sequence(index)[0][:, columns].to(placement.device) for index in range(len(names))],
        names,
        num_prompt=latents.info.num_prompt_tokens,
        seed=config.seed,
        placement=placement,
    )[0]


def _shard_batches(
    latents: LatentsFolder, unit: int, columns: list[int], tokens_per_batch: int, device: torch.device
) -> Iterator[list[LatentRow]]:
    """Runs of consecutive sequences of a shard within the token budget."""
    lengths = latents.read_offsets(unit)[0].diff().tolist()
    start = 0
    while start < len(lengths):
        stop, tokens = start + 1, lengths[start]
        while stop < len(lengths) and tokens + lengths[stop] <= tokens_per_batch:
            tokens += lengths[stop]
            stop += 1
        shard = latents.read_sequences(unit, start, stop)
        yield [(start + index, shard.sequence(index)[0][:, columns].to(device)) for index in range(shard.num_sequences)]
        start = stop


def _score(
    config: ScoreConfig,
    flow: Flow,
    names: Sequence[tuple[str, int]],
    batches: Iterator[list[LatentRow]],
    num_prompt: int,
    dtype: torch.dtype,
) -> list[ScoreRow]:
    """Score rows of one unit, in order."""
    reward = config.flow_reward
    rows: list[ScoreRow | None] = [None] * len(names)
    for batch in batches:
        pairs = flow.pair([latents for _, latents in batch], num_prompt)
        result = flow.deviations(
            pairs,
            [response_key(*names[index]) for index, _ in batch],
            seed=config.seed,
            timesteps=reward.timestep,
            num_draws=reward.num_draws,
            antithetic=reward.antithetic,
            autocast_dtype=dtype,
        )
        lengths = pairs.paired.response_offsets.diff().tolist()
        scores = pairs.paired.over_responses(result.score_M, torch.nan).split(lengths)
        deviations = pairs.paired.over_responses(result.deviation_M, torch.nan).split(lengths)
        errors = pairs.paired.over_responses(result.errors_MJK, torch.nan).split(lengths)
        rewards = flow_rewards(scores, reward)
        for place, (index, _) in enumerate(batch):
            valid = (~scores[place].isnan()).tolist()
            rows[index] = ScoreRow(
                problem_id=names[index][0],
                sample_index=names[index][1],
                deviation=_masked(deviations[place].tolist(), valid),
                score=_masked(scores[place].tolist(), valid),
                flow_reward=_masked(rewards[place].tolist(), valid),
                per_layer_timestep=_masked(errors[place].tolist(), valid) if config.per_layer else None,
            )
    return [row for row in rows if row is not None]


def _masked(values: list[Any], valid: list[bool]) -> list[Any]:
    return [value if ok else None for value, ok in zip(values, valid, strict=True)]


def _extra(config: ScoreConfig, header: FlowHeader) -> dict[str, Any]:
    return {
        "layer_indices": list(header.layer_indices),
        "pairings": list(header.pairings),
        "context_layer": header.context_layer,
        "timesteps": list(config.flow_reward.timestep),
        "num_draws": config.flow_reward.num_draws,
        "policy_step": header.policy_step,
    }
