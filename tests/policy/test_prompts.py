"""Prompts: chat templates, templates of the user's, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlfr_cli.errors import ConfigError, InputError, MissingInputError
from rlfr_cli.policy.prompts import PromptRenderer, check_prompt_lengths, response_token_ids
from tiny_models import CHAT_TEMPLATE, make_tokenizer

TOKENIZER = make_tokenizer()


def rendered(system: str, problem: str, template: str | None = None, tokenizer: object = TOKENIZER) -> str:
    return TOKENIZER.decode(PromptRenderer(tokenizer, system, template).render(problem))


def test_chat_template_with_and_without_a_system_prompt() -> None:
    assert rendered("Think.", "1 + 1?") == "<|system|>Think.<|end|><|user|>1 + 1?<|end|><|assistant|>"
    assert rendered("", "1 + 1?") == "<|user|>1 + 1?<|end|><|assistant|>"


def test_text_template_replaces_problem_and_system() -> None:
    assert rendered("Think.", "{1, 2}?", "{system} Q: {problem} A:") == "Think. Q: {1, 2}? A:"
    assert rendered("Think.", "x", "Put it in \\boxed{}. {problem}") == "Put it in \\boxed{}. x"


def test_jinja_template_replaces_the_tokenizers() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert rendered("S", "P", template) == "[system]S[user]P>"


def test_template_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Q: {problem}")
    assert rendered("", "7", f"@{tmp_path}/prompt.txt") == "Q: 7"
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    assert rendered("", "7", f"@{tmp_path}/chat.jinja") == "7!"
    with pytest.raises(MissingInputError, match="no such file"):
        rendered("", "7", f"@{tmp_path}/other.txt")


def test_a_chat_of_several_turns_ends_where_the_response_begins() -> None:
    renderer = PromptRenderer(TOKENIZER, "")
    ids = renderer.render_messages(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    )
    assert TOKENIZER.decode(ids) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"


def test_no_chat_template_names_the_way_out() -> None:
    bare = make_tokenizer(chat_template=False)
    with pytest.raises(InputError, match="no chat template") as caught:
        PromptRenderer(bare, "S")
    assert "--prompt-template" in (caught.value.hint or "")
    assert rendered("S", "7", "Q: {problem}", bare) == "Q: 7"
    assert rendered("", "7", CHAT_TEMPLATE, bare) == "<|user|>7<|end|>" + "<|assistant|>"


def test_a_template_without_a_place_for_the_problem_is_refused() -> None:
    with pytest.raises(ConfigError, match="no place for the problem") as caught:
        PromptRenderer(TOKENIZER, "", "Solve this.")
    assert "{problem}" in (caught.value.hint or "")


def test_a_template_that_refuses_a_system_role_names_the_way_out() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok"
    with pytest.raises(InputError, match="System role not supported") as caught:
        rendered("Think.", "1", strict)
    assert '--system-prompt ""' in (caught.value.hint or "")
    assert rendered("", "1", strict) == "ok"


def test_expert_responses_end_with_the_end_token() -> None:
    ids = response_token_ids(TOKENIZER, "4!")
    assert ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(ids[:-1]) == "4!"
    assert ids.count(TOKENIZER.eos_token_id) == 1


def test_prompts_as_long_as_the_context_are_refused_by_name() -> None:
    prompts = [[1] * 9, [1] * 10, [1] * 12]
    with pytest.raises(InputError, match=r"context of 10 tokens: problem b \(10 tokens\), c \(12 tokens\)\n") as caught:
        check_prompt_lengths(prompts, ["a", "b", "c"], 10, 5)
    assert caught.value.hint


def test_only_the_first_five_long_prompts_are_listed() -> None:
    with pytest.raises(InputError, match=r"4 \(20 tokens\) and 3 more"):
        check_prompt_lengths([[1] * 20] * 8, [str(i) for i in range(8)], 10, 5)


def test_responses_that_the_context_will_cut_are_counted() -> None:
    prompts = [[1] * 4, [1] * 5, [1] * 6, [1] * 9]
    assert check_prompt_lengths(prompts, list("abcd"), 10, 5) == 2
    assert check_prompt_lengths(prompts, list("abcd"), None, 5) == 0
