"""Loading a policy: what is refused and how, and what a loaded one is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlfr_cli.errors import ConfigError, InputError, MissingInputError
from rlfr_cli.policy.loading import (
    Placement,
    disable_dropout,
    load_decoder,
    load_policy,
    load_tokenizer,
    read_model_config,
    resolve_model_folder,
    resolve_placement,
)
from tiny_models import FAMILIES, make_config, make_model_folder, make_tokenizer
from tiny_policies import CPU, CPU_BF16, END, ModelFolders


@pytest.fixture
def folder(tmp_path: Path, model_folders: ModelFolders) -> Path:
    """A copy of a tiny untied model that a test may damage."""
    return Path(shutil.copytree(model_folders.folder("qwen2", tied=False), tmp_path / "model"))


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Folders


def test_a_model_folder_is_found(folder: Path) -> None:
    assert resolve_model_folder(str(folder)) == folder


def test_what_is_no_model_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json \(it holds model\)") as caught:
        resolve_model_folder(str(tmp_path))
    assert "model/" in (caught.value.hint or "")
    with pytest.raises(InputError, match="is a file"):
        resolve_model_folder(str(folder / "config.json"))
    with pytest.raises(MissingInputError, match="no such folder"):
        resolve_model_folder(str(tmp_path / "nowhere"))
    with pytest.raises(MissingInputError, match="no such folder"):
        resolve_model_folder("nowhere")


def test_an_unreadable_config_is_an_input_error(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read its config"):
        read_model_config(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot read its config"):
        read_model_config(folder)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"encoder-decoder model \(t5\)"):
        read_model_config(tmp_path)


# Weights


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load this model") as caught:
        load_policy(folder, CPU)
    assert "safetensors" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_weight_is_an_error_not_a_random_one(name: str, folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(InputError, match=f"1 tensors are missing and 0 have another shape, such as {name}"):
        load_policy(folder, CPU)


def test_a_weight_missing_from_a_truncated_decoder_is_an_error_too(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"such as .*layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(folder, CPU, (0, 1))
    load_decoder(folder, CPU, (0,))


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(
        InputError, match=r"0 tensors are missing and 1 have another shape, such as model\.norm\.weight"
    ):
        load_policy(folder, CPU)


def test_a_cut_weights_file_is_an_input_error(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot load this model"):
        load_policy(folder, CPU)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_the_weights_on_disk(family: str, tied: bool, model_folders: ModelFolders) -> None:
    folder = model_folders.folder(family, tied=tied)
    policy = load_policy(folder, CPU)
    state = policy.model.state_dict()
    on_disk = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in on_disk) is not tied
    assert all(torch.equal(state[name], weight) for name, weight in on_disk.items())
    assert not policy.model.training
    assert policy.end_token_ids == {END}
    assert policy.context_length == 512


def test_only_the_blocks_asked_for_are_loaded_in_the_compute_dtype(folder: Path) -> None:
    decoder = load_decoder(folder, CPU_BF16, (1, 0))
    names = dict(decoder.named_parameters())
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1"}
    assert "lm_head.weight" not in names
    assert {p.dtype for p in names.values()} == {torch.bfloat16}


def test_training_weights_are_float32_whatever_the_compute_dtype(folder: Path) -> None:
    policy = load_policy(folder, CPU_BF16, weights_dtype=torch.float32)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_policy(folder, CPU_BF16).model.parameters()} == {torch.bfloat16}


def test_logits_that_are_not_the_output_head_are_refused(tmp_path: Path) -> None:
    """Cohere multiplies its logits by a factor of its own."""
    make_model_folder(tmp_path, "cohere")
    with pytest.raises(InputError, match="logits of a cohere model are not its output head"):
        load_policy(tmp_path, CPU)


def test_softcapped_logits_are_those_of_the_model(tmp_path: Path) -> None:
    policy = load_policy(make_model_folder(tmp_path, "gemma2", scale=30.0), CPU)
    ids = torch.tensor([[10, 20, 30]])
    with torch.no_grad():
        theirs = policy.model(input_ids=ids).logits[0]
        hidden = policy.decoder(input_ids=ids).last_hidden_state[0]
        uncapped = policy.model.get_output_embeddings()(hidden)
    assert float((uncapped - theirs).abs().max()) > 0.1
    torch.testing.assert_close(policy.logits(hidden), theirs, rtol=1e-4, atol=1e-4)


# Tokenizers and end tokens


def test_a_folder_without_tokenizer_files_is_refused(folder: Path) -> None:
    """transformers 5 gives Qwen2 a tokenizer of one token here, which reads every text as nothing."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="tokenizer") as caught:
        load_tokenizer(folder)
    assert "tokenizer.json" in (caught.value.hint or "")


def test_end_tokens_are_those_of_the_generation_config_and_the_tokenizer(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_policy(folder, CPU).end_token_ids == {7, 9, END}


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    make_model_folder(tmp_path, tokenizer=tokenizer)
    for name in ("config.json", "generation_config.json"):
        facts = json.loads((tmp_path / name).read_text())
        facts.pop("eos_token_id", None)
        (tmp_path / name).write_text(json.dumps(facts))
    with pytest.raises(InputError, match="no end token"):
        load_policy(tmp_path, CPU)


def test_a_tokenizer_without_a_pad_token_is_fine(tmp_path: Path) -> None:
    make_model_folder(tmp_path, "llama", tokenizer=make_tokenizer(pad_token=False))
    policy = load_policy(tmp_path, CPU)
    assert policy.tokenizer.pad_token_id is None


# Placement, remote code, dropout


def test_placement() -> None:
    assert resolve_placement("cpu", "auto") == Placement(torch.device("cpu"), torch.float32)
    assert resolve_placement("cpu", "bfloat16", "eager").dtype == torch.bfloat16
    assert resolve_placement("cpu", "float32").trust_remote_code is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_missing_cuda_device_is_refused() -> None:
    assert resolve_placement("auto", "auto").device.type == "cpu"
    with pytest.raises(ConfigError, match="no CUDA device") as caught:
        resolve_placement("cuda:1", "auto")
    assert "--device cpu" in (caught.value.hint or "")


def test_code_of_a_model_folder_does_not_run_by_default(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Made", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(InputError) as caught:
        load_policy(folder, CPU)
    assert "--trust-remote-code" in str(caught.value)
    assert not witness.exists()


@pytest.mark.parametrize("family", ["phi3", "qwen2"])
def test_disabled_dropout_gives_the_same_logits_in_training_mode(family: str) -> None:
    config = make_config(family)
    config.attention_dropout = 0.5
    if family == "phi3":
        config.resid_pdrop = 0.5
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(7, 40)[None]
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        dropped = model.train()(input_ids=ids).logits
        disable_dropout(model)
        ours = model(input_ids=ids).logits
    assert model.training
    assert float((dropped - wanted).abs().max()) > 1e-3
    assert torch.equal(ours, wanted)
