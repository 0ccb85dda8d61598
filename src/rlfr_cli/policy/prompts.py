"""Prompts: a problem as token ids, through the tokenizer's chat template or a template of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlfr_cli.errors import ConfigError, InputError, MissingInputError


class PromptRenderer:
    """Renders problems as prompts.

    Args:
        tokenizer: the policy's tokenizer.
        system_prompt: the system message; empty for none.
        template: None for the tokenizer's chat template; else text with ``{problem}`` (and ``{system}``), or a Jinja
            chat template, or ``@`` and the file that holds one of them.

    Raises:
        InputError: no chat template and no template of the user's.
        ConfigError: a template without a place for the problem.
    """

    def __init__(self, tokenizer: Any, system_prompt: str, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.template = _read_template(template)
        if self.template is None and getattr(tokenizer, "chat_template", None) is None:
            raise InputError(
                "the tokenizer has no chat template",
                hint="give one with --prompt-template, for example --prompt-template $'Problem: {problem}\\nSolution:'",
            )

    def render(self, problem: str) -> list[int]:
        """Token ids of the prompt that asks for ``problem``, up to where the response begins."""
        if self.template is not None and not _is_jinja(self.template):
            text = self.template.replace("{system}", self.system_prompt).replace("{problem}", problem)
            return list(self.tokenizer(text)["input_ids"])
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return self.render_messages([*messages, {"role": "user", "content": problem}])

    def render_messages(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat, with the generation prompt, through the chat template.

        Raises:
            InputError: the chat template refuses the messages.
        """
        from jinja2 import TemplateError

        template = self.template if self.template is not None and _is_jinja(self.template) else None
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), chat_template=template, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise InputError(
                f"the chat template refuses these messages: {error}",
                hint='--system-prompt "" leaves the system message out',
            ) from error
        return list(ids)


def response_token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an expert response, with the end token appended."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]], names: Sequence[str], context_length: int | None, max_new_tokens: int
) -> int:
    """Refuse prompts that leave no room for a response; return how many responses the context may cut.

    Raises:
        InputError: a prompt as long as the context or longer.
    """
    if context_length is None:
        return 0
    too_long = [(name, len(p)) for name, p in zip(names, prompts, strict=True) if len(p) >= context_length]
    if too_long:
        listed = ", ".join(f"{name} ({length} tokens)" for name, length in too_long[:5])
        more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        raise InputError(
            f"prompts longer than the model's context of {context_length} tokens: problem {listed}{more}",
            hint="remove these problems from the file, or shorten the system prompt",
        )
    return sum(len(prompt) + max_new_tokens > context_length for prompt in prompts)


def _read_template(template: str | None) -> str | None:
    if template is not None and template.startswith("@"):
        path = Path(template[1:])
        if not path.is_file():
            raise MissingInputError(f"--prompt-template {template}: no such file")
        template = path.read_text(encoding="utf-8")
    if template is not None and not _is_jinja(template) and "{problem}" not in template:
        raise ConfigError(
            f"--prompt-template {template!r} has no place for the problem",
            hint="write {problem} where it goes, or give a Jinja chat template",
        )
    return template


def _is_jinja(template: str) -> bool:
    return "{{" in template or "{%" in template
