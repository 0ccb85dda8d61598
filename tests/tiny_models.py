"""Tiny random models of several families, with a character tokenizer, saved as Hugging Face folders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = [*SPECIAL, "\\boxed{", *dict.fromkeys(string.printable)]

FAMILIES = ["qwen2", "llama", "qwen3", "gemma3_text", "mistral", "phi3"]


def make_tokenizer(*, padding_side: str = "left", pad_token: bool = True, chat_template: bool = True) -> Any:
    """A character tokenizer that holds the printable ASCII characters."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special: dict[str, Any] = {"unk_token": "<|unk|>", "eos_token": "<|end|>"}
    if pad_token:
        special["pad_token"] = "<|pad|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side=padding_side,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(family: str, *, num_blocks: int = 4, hidden_size: int = 32, tied: bool = True) -> Any:
    """A config of ``family`` with grouped-query attention and a context of 512 tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    if family in ("qwen3", "gemma3_text"):
        sizes["head_dim"] = 8
    if family == "gemma3_text":
        sizes["sliding_window"] = 16
    return transformers.AutoConfig.for_model(family, **sizes)


def make_model_folder(
    folder: Path,
    family: str = "qwen2",
    *,
    seed: int = 0,
    tokenizer: Any = None,
    scale: float = 3.0,
    **sizes: Any,
) -> Path:
    """Write a random model of ``family``; ``scale`` widens the weights so that tokens differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder
