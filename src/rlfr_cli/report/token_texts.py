"""The text that each token of a response adds, for people to read.

Takes a tokenizer and token ids; gives one string a token. Joined, they are the tokenizer's text of the whole response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes; what is no text after twice as many tokens is shown as it is.
MAX_PENDING = 8


class TokenTexts:
    """Texts of tokens, remembered, since the same neighbours come back again and again.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoded: dict[tuple[int, ...], str] = {}

    def of(self, token_ids: Sequence[int]) -> list[str]:
        """What each token adds to the text.

        A character whose bytes several tokens share belongs to the last of them; the others' text is empty. Each token
        is read after the one before it, since some tokenizers drop the space that begins a text.
        """
        ids = tuple(token_ids)
        texts: list[str] = []
        begin, shown = 0, 0  # the first token whose characters are not all shown, and how many of them are
        for index in range(len(ids)):
            context = ids[max(begin - 1, 0) : begin]
            if self._decode(context).endswith(REPLACEMENT):
                context = ()  # a character begun in it would count as shown
            fresh = self._decode(context + ids[begin : index + 1])[len(self._decode(context)) :]
            whole = fresh.rstrip(REPLACEMENT)
            if len(whole) == len(fresh) or index + 1 - begin >= MAX_PENDING or index + 1 == len(ids):
                texts.append(fresh[shown:])
                begin, shown = index + 1, 0
            else:
                texts.append(whole[shown:])
                shown = len(whole)
        return texts

    def _decode(self, ids: tuple[int, ...]) -> str:
        text = self._decoded.get(ids)
        if text is None:
            text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            self._decoded[ids] = text
        return text
