"""Responses that a policy is to read again: rollouts, or expert text that is tokenised here.

Rows are cut into fixed units of problems in input order. Token ids of rollouts are never made again from text; an
expert response gets the end token appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rlfr_cli import console
from rlfr_cli.artifacts.fingerprint import file_fingerprint
from rlfr_cli.artifacts.problems import read_problems
from rlfr_cli.artifacts.rollouts import RolloutsFolder
from rlfr_cli.config.extract_latents import ReadResponsesConfig
from rlfr_cli.errors import InputError
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.policy.prompts import PromptRenderer, check_prompt_lengths, response_token_ids
from rlfr_cli.stages.common import ModelInput, units_of

TOKEN_COLUMNS = ("prompt_token_ids", "response_token_ids")


@dataclass(frozen=True)
class Responses:
    """Responses in input order, as an Arrow table that may be mapped from disk.

    Attributes:
        table: columns ``problem_id``, ``sample_index``, ``prompt_token_ids``, ``response_token_ids`` and others.
        units: rows of each unit of work.
        fingerprint: of the content.
        max_tokens: response tokens taken of each, or None for all.
    """

    table: pa.Table
    units: list[range]
    fingerprint: str
    max_tokens: int | None = None

    @property
    def num_rows(self) -> int:
        return self.table.num_rows

    def num_response_tokens(self, rows: range | None = None) -> int:
        """Response tokens that are taken, of all rows or some."""
        part = self.table if rows is None else self.rows(rows)
        lengths = pc.list_value_length(part["response_token_ids"])
        if self.max_tokens is not None:
            lengths = pc.min_element_wise(lengths, self.max_tokens)
        return pc.sum(lengths).as_py() or 0

    def rows(self, rows: range) -> pa.Table:
        return self.table.slice(rows.start, len(rows))

    def sequences(self, rows: range) -> list[TokenSequence]:
        """Prompts and responses of some rows, responses cut to ``max_tokens``."""
        part = self.rows(rows).select(TOKEN_COLUMNS).to_pylist()
        return [TokenSequence(row["prompt_token_ids"], row["response_token_ids"][: self.max_tokens]) for row in part]

    def names(self, rows: range) -> list[tuple[str, int]]:
        """(problem_id, sample_index) of some rows."""
        part = self.rows(rows).select(["problem_id", "sample_index"]).to_pylist()
        return [(row["problem_id"], row["sample_index"]) for row in part]


def read_rollout_responses(
    path: Path, problems_per_unit: int, *, limit: int | None = None, max_tokens: int | None = None
) -> Responses:
    """Responses of a rollouts folder.

    Args:
        limit: take only the first so many problems.
    """
    folder = RolloutsFolder(path)
    table = pa.concat_tables(folder.tables())
    if table.num_rows == 0:
        raise InputError(f"{path} holds no responses", hint="sample without --keep, or with a weaker rule")
    starts = _problem_starts(table["problem_id"].to_pylist())
    if limit is not None and limit < len(starts):
        table = table.slice(0, starts[limit])
        starts = starts[:limit]
    ends = [*starts[1:], table.num_rows]
    units = [range(starts[unit.start], ends[unit.stop - 1]) for unit in units_of(len(starts), problems_per_unit)]
    return Responses(table, units, folder.fingerprint, max_tokens)


def _problem_starts(problem_ids: Sequence[str]) -> list[int]:
    """Rows at which another problem begins than that of the row before."""
    return [row for row, name in enumerate(problem_ids) if row == 0 or name != problem_ids[row - 1]]


def open_responses(config: ReadResponsesConfig, model: ModelInput, problems_per_unit: int) -> Responses:
    """The responses of ``--rollouts``, or expert responses of ``--data``.

    Raises:
        InputError: they cannot be used.
    """
    if config.rollouts is None:
        return read_expert_responses(config, model, problems_per_unit)
    return read_rollout_responses(config.rollouts, problems_per_unit, limit=config.limit, max_tokens=config.max_tokens)


def response_inputs(config: ReadResponsesConfig, model: ModelInput, responses: Responses) -> dict[str, Any]:
    """Fingerprints of the model, of the responses, and of the file of a prompt template."""
    inputs = {"model": model.fingerprint.to_dict(), "responses": responses.fingerprint}
    template = config.prompt.prompt_template
    if config.data is not None and template is not None and template.startswith("@"):
        inputs["prompt_template"] = file_fingerprint(template[1:])
    return inputs


def read_expert_responses(config: ReadResponsesConfig, model: ModelInput, problems_per_unit: int) -> Responses:
    """Tokenised expert responses of a problem file or of chat messages.

    Raises:
        InputError: a row has no response, a prompt is too long, or the tokenizer has no end token.
    """
    assert config.data is not None
    read = read_problems(
        config.data,
        split=config.split,
        problem_column=config.problem_column,
        id_column=config.id_column,
        response_column=None if config.messages_column else config.response_column,
        messages_column=config.messages_column,
        limit=config.limit,
        need_answer=False,
    )
    if model.tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token, which an expert response is to end with")
    prompt = config.prompt
    renderer = PromptRenderer(model.tokenizer, prompt.system_prompt, prompt.prompt_template)
    prompts, responses = [], []
    for problem in read.problems:
        if problem.response is None:
            raise InputError(f"problem {problem.problem_id} has no response: its last message is not the assistant's")
        with_messages = problem.messages is not None and prompt.prompt_template is None
        prompts.append(
            renderer.render_messages(_with_system(problem.messages or [], prompt.system_prompt))
            if with_messages
            else renderer.render(problem.problem)
        )
        responses.append(response_token_ids(model.tokenizer, problem.response))
    names = [problem.problem_id for problem in read.problems]
    check_prompt_lengths(prompts, names, model.context_length, 0)
    responses = _fit_context(prompts, responses, model.context_length)
    table = pa.table(
        {
            "problem_id": pa.array(names, pa.string()),
            "sample_index": pa.array([0] * len(names), pa.int32()),
            "prompt_token_ids": pa.array(prompts, pa.list_(pa.int32())),
            "response_token_ids": pa.array(responses, pa.list_(pa.int32())),
        }
    )
    return Responses(table, units_of(len(names), problems_per_unit), read.fingerprint, config.max_tokens)


def _with_system(messages: Sequence[dict[str, str]], system_prompt: str) -> list[dict[str, str]]:
    """The conversation's own system message, or else the system prompt."""
    if not system_prompt or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def _fit_context(
    prompts: Sequence[Sequence[int]], responses: Sequence[list[int]], context_length: int | None
) -> list[list[int]]:
    """Cut expert responses where the model's context ends, and say how many."""
    if context_length is None:
        return list(responses)
    cut = [response[: context_length - len(prompt)] for prompt, response in zip(prompts, responses, strict=True)]
    num_cut = sum(len(short) < len(whole) for short, whole in zip(cut, responses, strict=True))
    if num_cut:
        console.warn(
            f"{num_cut} of {len(cut)} responses do not fit into the model's context of {context_length} tokens, and "
            "are cut off there, without their end token"
        )
    return cut


def check_vocabulary(responses: Responses, model: ModelInput) -> None:
    """Refuse token ids that the model does not have: those of another model's tokenizer.

    Raises:
        InputError: naming the largest id and the vocabulary.
    """
    largest = max(pc.max(pc.list_flatten(responses.table[name])).as_py() or 0 for name in TOKEN_COLUMNS)
    if largest >= model.fingerprint.vocab_size:
        raise InputError(
            f"the responses hold the token id {largest}, and the model's vocabulary ends at "
            f"{model.fingerprint.vocab_size - 1}",
            hint="give the model that drew these responses, or one with the same tokenizer",
        )


def check_prompts_hold(responses: Responses, num_prompt: int) -> None:
    """Refuse prompts shorter than the prompt tokens that pairings reach back to.

    Raises:
        InputError: naming the first such problem.
    """
    for name, prompt in zip(
        responses.table["problem_id"].to_pylist(),
        responses.table["prompt_token_ids"].to_pylist(),
        strict=True,
    ):
        if len(prompt) < num_prompt:
            raise InputError(
                f"problem {name}: its prompt has {len(prompt)} tokens, and a shift of {num_prompt} needs as many",
                hint="use a smaller shift",
            )
