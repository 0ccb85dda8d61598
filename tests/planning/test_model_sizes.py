"""Sizes from config.json alone agree with the models that transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planning.small_settings import LLAMA, QWEN_7B
from rlfr_cli.errors import InputError, MissingInputError
from rlfr_cli.planning.model_sizes import FAMILIES, model_sizes, read_model_sizes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = LLAMA | {"model_type": family, "tie_word_embeddings": tied}
    options = {key: value for key, value in config.items() if key != "model_type"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = AutoConfig.for_model(family, **options, **special)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    counted = sum(parameter.numel() for parameter in model.parameters())
    sizes = model_sizes(config)
    assert sizes.known
    assert sizes.parameters == counted
    assert sizes.block_parameters == sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_that_a_llama_config_asks_for_are_counted(bias: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in LLAMA.items() if key != "model_type"} | {bias: True}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options))
    assert model_sizes(LLAMA | {bias: True}).parameters == sum(p.numel() for p in model.parameters())


def test_a_published_model_of_seven_billion() -> None:
    sizes = model_sizes(QWEN_7B)
    assert sizes.parameters == 7_615_616_512
    assert sizes.stored_bytes == 2
    # 2 operations a weight of the matrices, and 4 x 3584 for each position attended to
    assert sizes.block_flops(10) == 2 * 233_046_016 + 4 * 3584 * 10


def test_what_a_config_leaves_unsaid_is_the_familys() -> None:
    gemma = model_sizes({**LLAMA, "model_type": "gemma2"})
    assert (gemma.tied, gemma.head_dim, gemma.query_size, gemma.key_size) == (True, 256, 1024, 512)
    llama = model_sizes({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    assert (llama.tied, llama.head_dim, llama.key_size, llama.stored_bytes) == (False, 16, 64, 4)


def test_a_folder_and_its_config_alone_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_model_sizes(tmp_path) == read_model_sizes(tmp_path / "config.json") == model_sizes(LLAMA)


def test_sizes_of_a_text_model_within_another(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": LLAMA}))
    assert read_model_sizes(tmp_path) == model_sizes(LLAMA)


def test_an_unknown_family_is_counted_and_said() -> None:
    unknown = model_sizes(LLAMA | {"model_type": "new"})
    assert not unknown.known
    assert unknown.parameters == model_sizes(LLAMA).parameters


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        (json.dumps({**LLAMA, "num_local_experts": 8}), "mixture of experts"),
        (json.dumps({"model_type": "bert"}), "does not name 'hidden_size'"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        read_model_sizes(tmp_path)


def test_no_config_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no config\.json there") as caught:
        read_model_sizes(tmp_path / "nothing")
    assert "config.json alone" in (caught.value.hint or "")
