"""Load a policy: a Hugging Face causal language model folder, its tokenizer, and the few facts rlfr needs of it.

Reads a model folder (``config.json``, safetensors, tokenizer files) and writes nothing. ``load_policy`` gives the
whole model; ``load_decoder`` only the decoder blocks that the wanted latents need, without an output head, and
reads only those weights from disk.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlfr_cli.errors import ConfigError, InputError, MissingInputError
from rlfr_cli.states import State, blocks_needed

if TYPE_CHECKING:
    from rlfr_cli.policy.adapters import Adapters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Where and how a model runs.

    Attributes:
        device: the torch device.
        dtype: compute dtype of autocast and generation; weights that an optimiser steps stay float32.
        attn_implementation: passed to transformers; None for its default.
        trust_remote_code: passed to transformers.
    """

    device: torch.device
    dtype: torch.dtype
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to ``dtype``; nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def resolve_placement(
    device: str, dtype: str, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> Placement:
    """Turn ``--device`` and ``--dtype`` into a placement; auto is CUDA with bfloat16, else CPU with float32."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: no CUDA device is available", hint="use --device cpu or auto")
    where = torch.device(device)
    if where.index is not None and where.index >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: only {torch.cuda.device_count()} CUDA devices are there")
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    return Placement(where, DTYPES[dtype], attn_implementation, trust_remote_code)


@dataclass
class Policy:
    """A causal language model with its tokenizer.

    Attributes:
        model: the ``AutoModelForCausalLM``.
        tokenizer: its tokenizer.
        folder: where it was loaded from.
        placement: device and compute dtype.
        end_token_ids: tokens that end a response.
        adapters: what is trained in place of its own weights; None where these are.
    """

    model: Any
    tokenizer: Any
    folder: Path
    placement: Placement
    end_token_ids: frozenset[int]
    adapters: Adapters | None = None

    @cached_property
    def config(self) -> Any:
        """The text model's config."""
        return self.model.config.get_text_config()

    @cached_property
    def decoder(self) -> Any:
        """The model without its output head; its ``last_hidden_state`` is after the final norm."""
        return self.model.base_model

    @property
    def context_length(self) -> int | None:
        """Largest number of positions, or None where the config names none."""
        return getattr(self.config, "max_position_embeddings", None)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Output head on normed hidden states [N, D], giving logits [N, vocabulary] in float32."""
        logits_NV = self.model.get_output_embeddings()(hidden_ND).float()
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap


def resolve_model_folder(model: str) -> Path:
    """The local folder of ``--model``: a folder, or a hub name that ``huggingface_hub`` can fetch or has cached.

    Raises:
        MissingInputError: neither a folder nor a name that the hub gave.
        InputError: a folder that holds no model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            present = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise InputError(
                f"{model} is not a model folder: it has no config.json (it holds {present})",
                hint=_merge_hint(folder)
                or "--model wants a Hugging Face model folder, such as a checkpoint's model/ folder",
            )
        return folder
    if folder.exists():
        raise InputError(f"--model {model} is a file, not a model folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise MissingInputError(f"--model {model}: no such folder", hint=_merge_hint(folder))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:  # every way in which the hub says no
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingInputError(
            f"--model {model}: no such folder, and the Hugging Face hub did not give it ({reason})",
            hint="give a local model folder",
        ) from error


def _merge_hint(folder: Path) -> str | None:
    """The next step for a checkpoint that holds adapters alone, and for a folder in it."""
    for checkpoint in (folder, folder.parent):
        if (checkpoint / "adapter").is_dir() and not (checkpoint / "model").is_dir():
            return f"`rlfr merge {checkpoint}` makes model/ of the checkpoint's adapters and their base model"
    return None


def read_model_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder.

    Raises:
        InputError: transformers cannot read it, or it is not a causal language model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"{folder}: transformers cannot read its config.json: {str(error).splitlines()[0]}",
            hint="--trust-remote-code runs code that the model folder ships, if you trust it",
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{folder} holds an encoder-decoder model ({config.model_type}); rlfr wants a decoder")
    return config


def stored_dtype_of(config: Any) -> torch.dtype:
    """The dtype of a model folder's weights, by its transformers config."""
    dtype: torch.dtype = getattr(config, "dtype", None) or torch.float32
    return dtype


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        InputError: there is none, or it has no vocabulary.
    """
    from transformers import AutoTokenizer

    hint = "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: transformers cannot load a tokenizer from it: {str(error).splitlines()[0]}", hint=hint
        ) from error
    # Where the files are missing, transformers gives some architectures a tokenizer without a vocabulary.
    if set(tokenizer("1 + 1 = 2", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        raise InputError(
            f"{folder}: its tokenizer cannot read a sum; its vocabulary has {len(tokenizer)} tokens", hint=hint
        )
    return tokenizer


def load_policy(folder: Path, placement: Placement, *, weights_dtype: torch.dtype | None = None) -> Policy:
    """Load the whole model in evaluation mode.

    Args:
        weights_dtype: dtype of the weights; by default the placement's. Training asks for float32.

    Raises:
        InputError: the folder cannot be loaded, or its logits are not its output head on its hidden states.
    """
    from transformers import AutoModelForCausalLM

    config = read_model_config(folder, placement.trust_remote_code)
    model = _from_pretrained(AutoModelForCausalLM, folder, config, placement, weights_dtype or placement.dtype)
    tokenizer = load_tokenizer(folder, placement.trust_remote_code)
    policy = Policy(model, tokenizer, folder, placement, end_token_ids(model, tokenizer))
    _check_output_head(policy)
    return policy


def load_decoder(folder: Path, placement: Placement, tapped: Sequence[State]) -> Any:
    """Load only the decoder blocks that these states need, without an output head, in the placement's dtype.

    ``blocks_left_out`` of what is returned says how many of the model's last blocks are missing: with any missing, its
    output is not the model's final normed state, and ``tap`` refuses it.
    """
    from transformers import AutoModel

    config = copy.deepcopy(read_model_config(folder, placement.trust_remote_code))
    text = config.get_text_config()
    num_blocks = blocks_needed(tapped, text.num_hidden_layers)
    left_out = text.num_hidden_layers - num_blocks
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:num_blocks]
    text.num_hidden_layers = num_blocks
    decoder = _from_pretrained(AutoModel, folder, config, placement, placement.dtype)
    decoder.blocks_left_out = left_out
    return decoder


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a response: those of the generation config and the tokenizer's end token.

    Raises:
        InputError: there is none.
    """
    listed = getattr(model.generation_config, "eos_token_id", None)
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise InputError("the model has no end token: neither generation_config.json nor its tokenizer names one")
    return frozenset(ids)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that log-probabilities in training mode are those of the policy that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (an attribute that mypy takes for a module)


def _from_pretrained(auto: Any, folder: Path, config: Any, placement: Placement, dtype: torch.dtype) -> Any:
    options = {} if placement.attn_implementation is None else {"attn_implementation": placement.attn_implementation}
    hint = "the folder must hold whole safetensors weights that fit its config.json"
    try:
        with quiet_transformers():
            model, report = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=placement.trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except (ValueError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: transformers cannot load this model: {str(error).strip().splitlines()[0]}", hint=hint
        ) from error
    # transformers fills both kinds with random numbers.
    missing = sorted(report["missing_keys"])
    misshapen = sorted(name for name, *_ in report["mismatched_keys"])
    if missing or misshapen:
        raise InputError(
            f"{folder}: its weights do not fill the model: {len(missing)} tensors are missing and {len(misshapen)} "
            f"have another shape, such as {(missing + misshapen)[0]}",
            hint=hint,
        )
    return model.to(placement.device).eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Leave out reports of weights that a truncated decoder leaves unread, and bars of weights loaded and written."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level, had_bar = logger.level, transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


@torch.no_grad()
def _check_output_head(policy: Policy) -> None:
    """``Policy.logits`` must be what the model itself computes; some architectures scale in ways of their own."""
    hint = "rlfr does not support this architecture yet"
    if policy.decoder is policy.model:
        raise InputError(f"{policy.folder}: a {policy.config.model_type} model has no decoder of its own", hint=hint)
    device = policy.placement.device
    ids = torch.arange(1, 5, device=device).remainder(policy.config.vocab_size)[None]
    theirs = policy.model(input_ids=ids, use_cache=False).logits[0].float()
    ours = policy.logits(policy.decoder(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-2):
        raise InputError(
            f"{policy.folder}: logits of a {policy.config.model_type} model are not its output head on its final "
            f"hidden states (they differ by up to {float((ours - theirs).abs().max()):.3g})",
            hint=hint,
        )
