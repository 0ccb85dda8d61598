"""`rlfr eval`: how often a policy is right: accuracy, avg@k, unbiased pass@k, majority@k, with 95 % intervals.

Reads a model folder and a problem file; writes per-response Arrow shards, as rollouts, and ``results.json``.
Intervals treat the problem as the unit, since responses to one problem are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlfr_cli import console
from rlfr_cli.artifacts.files import canonical_json, write_atomically
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, rollout_table, table_rows
from rlfr_cli.config.evaluate import EvalConfig
from rlfr_cli.engines.opening import choose_engine
from rlfr_cli.errors import during_work
from rlfr_cli.grading.answers import AnswerFallback, extract_answer
from rlfr_cli.grading.rewards import is_accepted, load_reward
from rlfr_cli.grading.statistics import majority_at_k, mean_with_interval, pass_at_k
from rlfr_cli.rl.rollouts import PromptedProblem, Responder
from rlfr_cli.stages.common import (
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

RESULTS = "results.json"


@dataclass(frozen=True)
class ProblemResult:
    """The graded responses to one problem, reduced to what the figures need."""

    problem_id: str
    correct: tuple[bool, ...]
    cut_off: tuple[bool, ...]
    answers: tuple[str | None, ...]


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a policy; returns the summary that ``results.json`` holds.

    Raises:
        RlfrError: anything wrong with config, inputs or output folder, before work starts.
    """
    reward = load_reward(config.grading.reward)
    model = open_model(config.model, config)
    with grading_pool(config.grading) as pool:
        problems = prompt_problems(config.problems, config.prompt, model, pool, config.sampling.max_new_tokens)
        units = units_of(len(problems.prompted), config.problems_per_shard)
        inputs = {
            "model": model.fingerprint.to_dict(),
            **problems.inputs(),
            **reward_inputs(config.grading, config.prompt),
        }
        prompts = [entry.prompt_token_ids for entry in problems.prompted]
        engine = choose_engine(config.generation, config.sampling, model, prompts)
        facts = {
            "num_problems": len(problems.prompted),
            "num_samples": config.num_samples,
            "skipped_problems": problems.skipped,
            "engine": engine.name,
        }
        folder = open_output(config, "eval", inputs, len(units), files=[RESULTS], extra=facts)
        if folder is None:
            responses = len(problems.prompted) * config.num_samples
            return {
                "dry_run": True,
                "problems": len(problems.prompted),
                "responses": responses,
                "most_new_tokens": responses * config.sampling.max_new_tokens,
                "most_bytes": most_rollout_bytes(problems, config.num_samples, config.sampling.max_new_tokens),
                "out": str(config.out),
            }
        missing = folder.missing_units(parse_part(config.part))
        if missing:
            engine.warn_of_other(folder.stage["extra"].get("engine"))
            asked = [[problems.prompted[index] for index in units[unit]] for unit in missing]
            with during_work(), stopping(config.out), Responder(engine.open(), pool, reward) as responder:
                _answer_units(config, folder, missing, asked, responder)
        missing = folder.missing_units()
        if missing:
            return {"out": str(config.out), "complete": False, "units_missing": len(missing)}
        results = finish_folder(folder)
        shown = {key: value for key, value in results.items() if key != "by_problem"}
        return {"out": str(config.out), "complete": True, **shown}


def _answer_units(
    config: EvalConfig,
    folder: StageFolder,
    missing: Sequence[int],
    asked: Sequence[Sequence[PromptedProblem]],
    responder: Responder,
) -> None:
    total = sum(map(len, asked)) * config.num_samples
    with console.progress("evaluating", total=total, unit="responses") as bar:
        for unit, problems in zip(missing, asked, strict=True):
            rows = responder.respond(
                problems,
                config.num_samples,
                sampling_of(config.sampling),
                key=(config.seed, unit),
                on_finished=lambda responses, tokens: bar.advance(responses),
            )
            folder.write_table(unit, rollout_table(rows))


def finish_folder(folder: StageFolder) -> dict[str, Any]:
    """Make ``results.json`` of the rows of all parts, and complete the folder; needs neither model nor problems."""
    config = folder.stage["config"]
    rows = (row for unit in range(folder.num_units) for row in table_rows(folder.read_table(unit)))
    ks = config["k"] or default_ks(config["num_samples"])
    results = summarise(rows, ks, AnswerFallback(config["grading"]["answer_fallback"]))
    results["skipped_problems"] = folder.stage["extra"]["skipped_problems"]
    if not folder.complete:
        write_atomically(folder.path / RESULTS, canonical_json(results, indent=2))
        folder.finish()
    return results


def default_ks(num_samples: int) -> tuple[int, ...]:
    """Powers of two up to the number of samples, and that number itself."""
    powers = [2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples]
    return tuple(dict.fromkeys([*powers, num_samples]))


def summarise(rows: Iterable[RolloutRow], ks: Sequence[int], fallback: AnswerFallback) -> dict[str, Any]:
    """Figures of graded responses, with 95 % intervals by problem, and each problem's own results.

    ``accuracy`` is the mean over problems of the share of correct responses (avg@k), where a response that was cut
    off counts as wrong; ``accuracy_with_cut_off`` takes its answer as it is, and ``accuracy_of_finished`` leaves
    such responses out.
    """
    grades: Counter[str] = Counter()
    by_problem: dict[str, list[tuple[bool, bool, str | None]]] = {}
    text_correct: dict[str, list[bool]] = {}
    tokens = responses = 0
    for row in rows:
        grades[row.grade] += 1
        tokens += len(row.response_token_ids)
        responses += 1
        answer = extract_answer(row.response, fallback)
        entry = (is_accepted(row.grade, row.finish_reason), row.finish_reason == "length", answer)
        by_problem.setdefault(row.problem_id, []).append(entry)
        text_correct.setdefault(row.problem_id, []).append(row.correct)
    results = [ProblemResult(key, *zip(*entries, strict=True)) for key, entries in by_problem.items()]
    num_samples = len(results[0].correct)
    finished = [[ok for ok, cut in zip(result.correct, result.cut_off, strict=True) if not cut] for result in results]
    return {
        "problems": len(results),
        "samples": num_samples,
        "responses": responses,
        "accuracy": asdict(mean_with_interval([result.correct for result in results])),
        "accuracy_with_cut_off": asdict(mean_with_interval(list(text_correct.values()))),
        "accuracy_of_finished": asdict(mean_with_interval([values for values in finished if values])),
        "pass_at_k": {
            str(k): asdict(mean_with_interval([[pass_at_k(num_samples, sum(r.correct), k)] for r in results]))
            for k in ks
        },
        "majority_at_k": {
            str(k): asdict(mean_with_interval([[majority_at_k(r.answers, r.correct, k)] for r in results])) for k in ks
        },
        "mean_response_tokens": tokens / responses,
        "cut_off": sum(sum(result.cut_off) for result in results),
        "grades": dict(sorted(grades.items())),
        "by_problem": {
            result.problem_id: {"correct": sum(result.correct), "cut_off": sum(result.cut_off)} for result in results
        },
    }
