"""`rlfr sample`: a policy answers problems, and the responses are graded.

Reads a model folder and a problem file; writes rollouts (Arrow shards, one a unit of ``--problems-per-shard``
problems). A unit's random numbers are keyed by (seed, unit), so parts and stops change nothing with the hf engine;
with vLLM the rows are the same and tokens may differ.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from rlfr_cli import console
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, rollout_table
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.engines.opening import choose_engine
from rlfr_cli.errors import ConfigError, during_work
from rlfr_cli.flow.reference import ReferenceRules
from rlfr_cli.grading.rewards import load_reward
from rlfr_cli.rl.rollouts import Responder
from rlfr_cli.stages.common import (
    ModelInput,
    PromptedProblems,
    grading_pool,
    most_rollout_bytes,
    open_model,
    open_output,
    parse_part,
    prompt_problems,
    reward_inputs,
    sampling_of,
    stopping,
    units_of,
)
from rlfr_cli.stages.rules import facts_of, load_rules, rule_inputs


@dataclass(frozen=True)
class _Plan:
    """Everything checked and opened, nothing computed."""

    config: SampleConfig
    model: ModelInput
    problems: PromptedProblems
    rules: ReferenceRules
    units: list[range]

    def describe(self) -> dict[str, Any]:
        responses = len(self.problems.prompted) * self.config.group_size
        return {
            "problems": len(self.problems.prompted),
            "skipped_problems": self.problems.skipped,
            "responses": responses,
            "shards": len(self.units),
            "most_new_tokens": responses * self.config.sampling.max_new_tokens,
            "most_bytes": most_rollout_bytes(
                self.problems, self.config.group_size, self.config.sampling.max_new_tokens
            ),
            "out": str(self.config.out),
        }


def run(config: SampleConfig) -> dict[str, Any]:
    """Sample and grade responses; returns a summary.

    Raises:
        RlfrError: anything wrong with config, inputs or output folder, before work starts.
    """
    rules = load_rules(config.keep, "--keep")
    if rules.token_rules:
        raise ConfigError(
            f"--keep {', '.join(config.keep)}: a rule for tokens cannot choose responses",
            hint="such rules (min-entropy is one) are for `rlfr train-rl --accept`; leave it out here",
        )
    reward = load_reward(config.grading.reward)
    model = open_model(config.model, config)
    with grading_pool(config.grading) as pool:
        problems = prompt_problems(config.problems, config.prompt, model, pool, config.sampling.max_new_tokens)
        units = units_of(len(problems.prompted), config.problems_per_shard)
        plan = _Plan(config, model, problems, rules, units)
        inputs = {
            "model": model.fingerprint.to_dict(),
            **problems.inputs(),
            **reward_inputs(config.grading, config.prompt),
            **rule_inputs(config.keep),
        }
        prompts = [entry.prompt_token_ids for entry in problems.prompted]
        engine = choose_engine(config.generation, config.sampling, model, prompts)
        facts = {
            "num_problems": len(problems.prompted),
            "skipped_problems": problems.skipped,
            "engine": engine.name,
        }
        folder = open_output(config, "rollouts", inputs, len(units), extra=facts)
        if folder is None:
            return {"dry_run": True, **plan.describe()}
        missing = folder.missing_units(parse_part(config.part))
        if missing:
            engine.warn_of_other(folder.stage["extra"].get("engine"))
            with during_work(), stopping(config.out), Responder(engine.open(), pool, reward) as responder:
                _sample_units(plan, folder, missing, responder)
        folder.finish()
        return _summary(plan, folder)


def _sample_units(plan: _Plan, folder: StageFolder, missing: list[int], responder: Responder) -> None:
    config, sampling = plan.config, sampling_of(plan.config.sampling)
    total = sum(len(plan.units[unit]) for unit in missing) * config.group_size
    with console.progress("sampling", total=total, unit="responses") as bar:
        for unit in missing:
            rows = responder.respond(
                [plan.problems.prompted[index] for index in plan.units[unit]],
                config.group_size,
                sampling,
                key=(config.seed, unit),
                on_finished=lambda responses, tokens: bar.advance(responses),
            )
            folder.write_table(unit, rollout_table(keep_rows(rows, plan.rules)))


def keep_rows(rows: list[RolloutRow], rules: ReferenceRules) -> list[RolloutRow]:
    """The rows to which the reference rules give weight: rejection sampling."""
    return [row for row, facts in zip(rows, facts_of(rows), strict=True) if rules.response_weight(facts) > 0]


def _summary(plan: _Plan, folder: StageFolder) -> dict[str, Any]:
    missing = set(folder.missing)
    grades: Counter[str] = Counter()
    rows = correct = cut = tokens = 0
    reward = 0.0
    for unit in range(folder.num_units):
        if unit in missing:
            continue
        table = folder.read_table(unit)
        rows += table.num_rows
        grades.update(table["grade"].to_pylist())
        correct += pc.sum(table["correct"]).as_py() or 0
        cut += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
        tokens += pc.sum(pc.list_value_length(table["response_token_ids"])).as_py() or 0
        reward += pc.sum(table["reward"]).as_py() or 0.0
    return {
        "out": str(plan.config.out),
        "complete": folder.complete,
        "units_missing": len(missing),
        "problems": len(plan.problems.prompted),
        "skipped_problems": plan.problems.skipped,
        "responses": rows,
        "accuracy": correct / rows if rows else None,
        "mean_reward": reward / rows if rows else None,
        "mean_response_tokens": tokens / rows if rows else None,
        "cut_off": cut,
        "grades": dict(sorted(grades.items())),
    }
