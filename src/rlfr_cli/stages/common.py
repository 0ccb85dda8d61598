"""What several stages do alike before and around their own work: open the model, read problems, open the output.

Everything here happens before compute, so what it refuses leaves the disk as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_cli import console
from rlfr_cli.artifacts.fingerprint import ModelFingerprint, file_fingerprint, model_fingerprint
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.problems import Problem, read_problems
from rlfr_cli.config.common import CommonConfig, GradingConfig, ProblemsConfig, PromptConfig, SamplingConfig
from rlfr_cli.config.fields import to_table
from rlfr_cli.engines.generation import Sampling
from rlfr_cli.errors import ConfigError, InputError, Stopped
from rlfr_cli.extensions import Kind, extension_fingerprint, warning_if_hidden
from rlfr_cli.grading.pool import GradingPool
from rlfr_cli.grading.rewards import OutcomeReward
from rlfr_cli.policy.loading import (
    Placement,
    load_tokenizer,
    read_model_config,
    resolve_model_folder,
    resolve_placement,
)
from rlfr_cli.policy.prompts import PromptRenderer, check_prompt_lengths
from rlfr_cli.rl.rollouts import PromptedProblem

LISTED_PROBLEMS = 5
BYTES_OF_ID, BYTES_OF_LOGPROB, BYTES_OF_TEXT = 4, 4, 4  # of one response token


@dataclass(frozen=True)
class ModelInput:
    """A model folder that was opened but whose weights are not loaded yet."""

    folder: Path
    config: Any
    tokenizer: Any
    fingerprint: ModelFingerprint
    placement: Placement

    @property
    def context_length(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def rms_epsilon(self) -> float:
        """That of the language model's norms, which the published velocity network takes over."""
        return float(getattr(self.config.get_text_config(), "rms_norm_eps", None) or 1e-6)


@dataclass(frozen=True)
class PromptedProblems:
    """Problems with prompts, and what was said of them.

    Attributes:
        prompted: the problems that are asked.
        fingerprint: of the file's content.
        skipped: problems left out because an answer does not parse.
    """

    prompted: list[PromptedProblem]
    fingerprint: str
    skipped: int

    def inputs(self) -> dict[str, Any]:
        return {"problems": self.fingerprint}


def open_model(model: str, config: CommonConfig) -> ModelInput:
    """Check a model folder, read its config and tokenizer, and take its fingerprint.

    Raises:
        InputError: the folder holds no model that can be used.
    """
    folder = resolve_model_folder(model)
    placement = resolve_placement(config.device, config.dtype, config.attn_implementation, config.trust_remote_code)
    model_config = read_model_config(folder, config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    return ModelInput(folder, model_config, tokenizer, model_fingerprint(folder), placement)


def sampling_of(config: SamplingConfig) -> Sampling:
    """The part of the sampling options that an engine needs."""
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens, config.stop)


def grading_pool(config: GradingConfig) -> GradingPool:
    """The graders; they start with the first answer that needs one."""
    return GradingPool(config.grade_workers, config.grade_timeout, fallback=config.answer_fallback)


def prompt_problems(
    problems: ProblemsConfig, prompt: PromptConfig, model: ModelInput, pool: GradingPool, max_new_tokens: int
) -> PromptedProblems:
    """Read problems, check answers and prompts.

    Raises:
        InputError: the file, an answer or a prompt cannot be used.
    """
    read = read_problems(
        problems.data,
        split=problems.split,
        problem_column=problems.problem_column,
        answer_column=problems.answer_column,
        id_column=problems.id_column,
        limit=problems.limit,
    )
    kept, skipped = _drop_bad_answers(read.problems, pool, problems.skip_bad_answers)
    renderer = PromptRenderer(model.tokenizer, prompt.system_prompt, prompt.prompt_template)
    prompted = [PromptedProblem(problem, tuple(renderer.render(problem.problem))) for problem in kept]
    cut = check_prompt_lengths(
        [entry.prompt_token_ids for entry in prompted],
        [entry.problem.problem_id for entry in prompted],
        model.context_length,
        max_new_tokens,
    )
    if cut:
        console.warn(
            f"{cut} of {len(prompted)} prompts leave less than --max-new-tokens {max_new_tokens} in the model's "
            f"context of {model.context_length} tokens; their responses are cut off there"
        )
    return PromptedProblems(prompted, read.fingerprint, skipped)


def _drop_bad_answers(problems: Sequence[Problem], pool: GradingPool, skip: bool) -> tuple[list[Problem], int]:
    bad = set(pool.parse_failures([problem.answers for problem in problems]))
    if bad and not skip:
        listed = "\n".join(
            f"  problem {problems[row].problem_id}: {', '.join(map(repr, problems[row].answers))}"
            for row in sorted(bad)[:LISTED_PROBLEMS]
        )
        more = f"\n  and {len(bad) - LISTED_PROBLEMS} more" if len(bad) > LISTED_PROBLEMS else ""
        raise InputError(
            f"{len(bad)} of {len(problems)} problems have an answer that does not parse:\n{listed}{more}",
            hint="correct them, or leave these problems out with --skip-bad-answers",
        )
    kept = [problem for row, problem in enumerate(problems) if row not in bad]
    if not kept:
        raise InputError("no problem is left: every answer fails to parse")
    if bad:
        console.warn(f"{len(bad)} of {len(problems)} problems left out: an answer does not parse")
    return kept, len(bad)


def reward_inputs(grading: GradingConfig, prompt: PromptConfig) -> dict[str, Any]:
    """Fingerprints of what options name: the file or package of a user's own reward, a prompt template."""
    inputs = {}
    if grading.reward in list(OutcomeReward):
        if hidden := warning_if_hidden(grading.reward, Kind.REWARD):
            console.warn(f"--reward {hidden}")
    elif (reward := extension_fingerprint(grading.reward, Kind.REWARD)) is not None:
        inputs["reward"] = reward
    template = prompt.prompt_template
    if template is not None and template.startswith("@"):
        inputs["prompt_template"] = file_fingerprint(template[1:])
    return inputs


def parse_part(part: str | None) -> tuple[int, int] | None:
    """``3/16`` as (3, 16)."""
    if part is None:
        return None
    index, _, total = part.partition("/")
    return int(index), int(total)


def open_output(
    config: CommonConfig,
    kind: str,
    inputs: Mapping[str, Any],
    num_units: int,
    *,
    files: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> StageFolder | None:
    """Open the output folder for the stage's work and say what was found there; None for a dry run.

    Args:
        files: names of the files that the stage itself writes there.
        extra: facts for the manifest. They are kept in ``stage.json`` until then, so that another process can
            write the manifest.

    Raises:
        OutputInUseError: it holds another config's work, or files of another origin.
    """
    part = parse_part(getattr(config, "part", None))
    if config.overwrite and part is not None:
        raise ConfigError(
            "--overwrite and --part exclude each other: a part would remove what the others wrote",
            hint=f"remove {config.out} once, then start the parts",
        )
    facts: dict[str, Any] = {
        "kind": kind,
        "config": to_table(config, for_artifact=True),
        "inputs": inputs,
        "seed": config.seed,
        "num_units": num_units,
        "files": files,
        "extra": extra,
    }
    if config.dry_run:
        StageFolder.check_for_writing(config.out, **facts, overwrite=config.overwrite)
        return None
    folder = StageFolder.open_for_writing(config.out, **facts, overwrite=config.overwrite)
    for difference in folder.version_differences:
        console.warn(f"{config.out} was begun with other versions: {difference}")
    done = num_units - len(folder.missing_units())
    if folder.complete:
        console.log(f"{config.out} is complete already; nothing to do")
    elif part is not None:
        folder.mark_part(part)
        to_do = len(folder.missing_units(part))
        console.log(f"part {part[0]}/{part[1]}: {to_do} units to do; {done} of {num_units} in {config.out} are done")
    elif folder.continued:
        console.log(f"{config.out} is unfinished; continuing after {done} of {num_units} units")
    return folder


@contextmanager
def stopping(out: Path) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an error that says what is kept: every finished unit."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; the finished units in {out} are kept", hint="the same command continues") from None


def most_rollout_bytes(problems: PromptedProblems, num_samples: int, max_new_tokens: int) -> int:
    """Bytes that rollouts take if every response is as long as it may be; texts count four bytes a token."""
    prompt_bytes = sum(
        4 * len(entry.prompt_token_ids) + len(entry.problem.problem.encode()) for entry in problems.prompted
    )
    response_bytes = max_new_tokens * (BYTES_OF_ID + BYTES_OF_LOGPROB + BYTES_OF_TEXT)
    return num_samples * (prompt_bytes + len(problems.prompted) * response_bytes)


def units_of(num_items: int, items_per_unit: int) -> list[range]:
    """Fixed units of work in input order."""
    return [range(start, min(start + items_per_unit, num_items)) for start in range(0, num_items, items_per_unit)]
