"""`extract-latents`: the right latents of the right tokens, whatever the parts, and no more blocks than needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.artifacts.rollouts import iter_rollouts
from rlfr_cli.artifacts.scores import iter_scores
from rlfr_cli.config.common import PromptConfig
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.errors import ConfigError, InputError, OutputSpaceError, Stopped, WorkError
from rlfr_cli.policy.forward import TokenSequence, forward_batches
from rlfr_cli.policy.loading import load_policy, resolve_placement
from rlfr_cli.report.diagnosis_statistics import spearman
from rlfr_cli.stages import extract_latents, extraction, score
from stages.tiny_stages import TinyArtifacts, bytes_of, extract_config, interrupt_after, score_config


def sequences_of(path: Path) -> list[tuple[torch.Tensor, list[int]]]:
    """Latents [tokens, J, D] and token ids of every sequence, in order."""
    found = []
    for shard in LatentsFolder(path).iter_shards():
        for index in range(shard.num_sequences):
            latents, ids = shard.sequence(index)
            found.append((latents, ids.tolist()))
    return found


def hidden_states(model: Any, ids: list[int], blocks: tuple[int, ...]) -> torch.Tensor:
    """Outputs [tokens, J, D] of some blocks but the last, by transformers' own means."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return torch.stack([output.hidden_states[block + 1][0] for block in blocks], dim=1)


def expert_rows(tiny: TinyArtifacts) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tiny.expert.read_text().splitlines()]


def expert_config(tiny: TinyArtifacts, out: Path, **options: Any) -> Any:
    return extract_config(tiny.policy, out, **{"data": str(tiny.expert), "id_column": "id", **options})


def test_latents_of_rollouts_are_the_block_outputs_at_the_tokens_read(tiny: TinyArtifacts) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    rows = list(iter_rollouts(tiny.rollouts))
    for row, (latents, ids) in zip(rows, sequences_of(tiny.latents), strict=True):
        assert ids == [row.prompt_token_ids[-1], *row.response_token_ids]
        states = hidden_states(model, [*row.prompt_token_ids, *row.response_token_ids], (2, 5))
        torch.testing.assert_close(latents, states[len(row.prompt_token_ids) - 1 :], atol=1e-4, rtol=1e-4)


def test_latents_of_rollouts_agree_with_the_forward_pass_of_training(tiny: TinyArtifacts) -> None:
    policy = load_policy(tiny.policy, resolve_placement("cpu", "float32"))
    rows = list(iter_rollouts(tiny.rollouts))
    sequences = [TokenSequence(row.prompt_token_ids, row.response_token_ids) for row in rows]
    stored = sequences_of(tiny.latents)
    for batch in forward_batches(policy, sequences, temperature=1.0, tapped=(2, 5), num_prompt=1):
        for index, latents in zip(batch.indices, batch.latents, strict=True):
            torch.testing.assert_close(stored[index][0], latents, atol=1e-4, rtol=1e-4)


def test_the_manifest_tells_layers_model_and_responses(tiny: TinyArtifacts) -> None:
    folder = LatentsFolder(tiny.latents)
    assert (folder.info.layer_indices, folder.info.num_blocks, folder.info.hidden_size) == ((2, 5), 8, 128)
    assert folder.info.num_prompt_tokens == 1
    assert folder.info.dtype == "float32"
    names = [name for unit in range(folder.num_shards) for name in folder.read_names(unit)]
    assert names == [(row.problem_id, row.sample_index) for row in iter_rollouts(tiny.rollouts)]


def test_expert_text_is_read_after_the_prompt_and_ends_with_the_end_token(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(expert_config(tiny, tmp_path, layer_index=(3,), store=StoreDtype.FLOAT32, max_shift=2))
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    rows, stored = expert_rows(tiny), sequences_of(tmp_path)
    for row, (latents, ids) in zip(rows, stored, strict=True):
        prompt = tokenizer(f"<user>{row['problem']}<assistant>")["input_ids"]
        response = [*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id]
        assert ids == [*prompt[-2:], *response]
        states = hidden_states(model, [*prompt, *response], (3,))
        torch.testing.assert_close(latents, states[len(prompt) - 2 :], atol=1e-4, rtol=1e-4)
    assert LatentsFolder(tmp_path).read_names(0) == [(rows[0]["id"], 0), (rows[1]["id"], 0)]


def test_chat_messages_give_the_latents_of_the_columns(tiny: TinyArtifacts, tmp_path: Path) -> None:
    lines = []
    for row in expert_rows(tiny):
        messages = [{"role": "user", "content": row["problem"]}, {"role": "assistant", "content": row["solution"]}]
        lines.append(json.dumps({"id": row["id"], "conversation": messages}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    extract_latents.run(expert_config(tiny, tmp_path / "columns"))
    extract_latents.run(
        expert_config(tiny, tmp_path / "chat", data=str(tmp_path / "chat.jsonl"), messages_column="conversation")
    )
    shards = (bytes_of(tmp_path / name / "shards") for name in ("columns", "chat"))
    assert next(shards) == next(shards)


def test_a_conversation_keeps_its_own_system_message(random_model: Path, tmp_path: Path) -> None:
    def token_ids(system: list[dict[str, str]], prompt: PromptConfig) -> list[int]:
        messages = [*system, {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
        data = tmp_path / "chat.jsonl"
        data.write_text(json.dumps({"messages": messages}) + "\n")
        out = tmp_path / "out"
        extract_latents.run(
            extract_config(
                random_model,
                out,
                data=str(data),
                messages_column="messages",
                prompt=prompt,
                max_shift=11,
                overwrite=True,
            )
        )
        return sequences_of(out)[0][1]

    tokenizer = AutoTokenizer.from_pretrained(random_model)
    own = [{"role": "system", "content": "be brief"}]
    with_own = token_ids(own, PromptConfig(system_prompt="ours"))
    with_ours = token_ids([], PromptConfig(system_prompt="ours"))
    rest = "<|end|><|user|>2+2<|end|><|assistant|>4<|end|>"
    assert tokenizer.decode(with_own) == "rief" + rest
    assert tokenizer.decode(with_ours) == "ours" + rest


def test_a_conversation_without_a_response_is_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "1+1"}]}) + "\n")
    with pytest.raises(InputError, match="its last message is not the assistant's"):
        extract_latents.run(
            expert_config(tiny, tmp_path / "o", data=str(data), messages_column="messages", id_column=None)
        )


def test_parts_and_stops_give_the_bytes_of_one_run(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(**options: Any) -> Any:
        return extract_config(
            tiny.policy, tmp_path, rollouts=tiny.rollouts, layer_index=(2, 5), store=StoreDtype.FLOAT32, **options
        )

    extract_latents.run(config(part="2/2"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, StageFolder, "write_tensors", 1)
        with pytest.raises(Stopped):
            extract_latents.run(config())
    assert not (tmp_path / "manifest.json").exists()
    extract_latents.run(config())
    assert bytes_of(tmp_path) == bytes_of(tiny.latents)


def test_only_the_blocks_up_to_the_deepest_tapped_one_are_loaded(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    real = extract_latents.load_decoder

    def spy(*args: Any) -> Any:
        loaded.append(real(*args))
        return loaded[-1]

    monkeypatch.setattr(extract_latents, "load_decoder", spy)
    summary = extract_latents.run(expert_config(tiny, tmp_path, layer_index=(2, 1)))
    whole = AutoModelForCausalLM.from_pretrained(tiny.policy)
    block = sum(p.numel() for p in whole.model.layers[0].parameters())
    around = whole.model.embed_tokens.weight.numel() + whole.model.norm.weight.numel()
    assert sum(p.numel() for p in loaded[0].parameters()) == 3 * block + around
    assert (summary["blocks_run"], summary["blocks_of_model"]) == (3, 8)


def test_layers_come_in_the_order_asked_for(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(expert_config(tiny, tmp_path / "12", layer_index=(1, 2), limit=2))
    extract_latents.run(expert_config(tiny, tmp_path / "21", layer_index=(2, 1), limit=2))
    (first, _), (swapped, _) = sequences_of(tmp_path / "12")[0], sequences_of(tmp_path / "21")[0]
    assert torch.equal(first, swapped.flip(1))
    assert not torch.equal(first[:, 0], first[:, 1])


def test_fractions_are_of_the_depth(tiny: TinyArtifacts, tmp_path: Path) -> None:
    summary = extract_latents.run(expert_config(tiny, tmp_path, dry_run=True))
    assert summary["layers"] == [2, 4, 6]
    summary = extract_latents.run(expert_config(tiny, tmp_path, dry_run=True, layer_fraction=(1.0, 0.0)))
    assert summary["layers"] == [7, 0]
    with pytest.raises(ConfigError, match="blocks 0 to 7"):
        extract_latents.run(expert_config(tiny, tmp_path, layer_index=(8,)))
    assert list(tmp_path.iterdir()) == []


def test_max_tokens_takes_the_beginning_of_a_response(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(
        extract_config(
            tiny.policy, tmp_path, rollouts=tiny.rollouts, layer_index=(2, 5), store=StoreDtype.FLOAT32, max_tokens=6
        )
    )
    for (cut, cut_ids), (whole, ids) in zip(sequences_of(tmp_path), sequences_of(tiny.latents), strict=True):
        assert cut_ids == ids[:7]
        torch.testing.assert_close(cut, whole[:7], atol=1e-5, rtol=1e-5)


def test_limit_counts_problems(tiny: TinyArtifacts, tmp_path: Path) -> None:
    summary = extract_latents.run(extract_config(tiny.policy, tmp_path, rollouts=tiny.rollouts, limit=3))
    assert summary["sequences"] == 12
    assert [len(LatentsFolder(tmp_path).read_names(unit)) for unit in range(2)] == [8, 4]


@pytest.mark.parametrize("store", list(StoreDtype))
def test_the_size_told_beforehand_is_what_is_written(tiny: TinyArtifacts, tmp_path: Path, store: StoreDtype) -> None:
    plan = extract_latents.run(expert_config(tiny, tmp_path / "out", store=store, dry_run=True))
    assert not (tmp_path / "out").exists()
    extract_latents.run(expert_config(tiny, tmp_path / "out", store=store))
    shards = list((tmp_path / "out" / "shards").glob("*.safetensors"))
    written = sum(path.stat().st_size for path in shards)
    assert 0 <= written - plan["bytes"] <= 1000 * len(shards), "names, offsets and headers"


def test_scores_of_latents_in_eight_bits_are_those_of_float32(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(
        extract_config(
            tiny.policy, tmp_path / "latents", rollouts=tiny.rollouts, layer_index=(2, 5), store=StoreDtype.INT8
        )
    )
    assert LatentsFolder(tmp_path / "latents").info.dtype == "int8"
    score.run(score_config(tiny.flow, tmp_path / "float32", latents=tiny.latents))
    score.run(score_config(tiny.flow, tmp_path / "int8", latents=tmp_path / "latents"))
    ranks = []
    for ours, theirs in zip(iter_scores(tmp_path / "int8"), iter_scores(tmp_path / "float32"), strict=True):
        assert ours.score[:-1] != theirs.score[:-1]
        assert ours.score[:-1] == pytest.approx(theirs.score[:-1], rel=0.02)
        ranks.append(spearman(ours.score[:-1], theirs.score[:-1]))
    assert sum(ranks) / len(ranks) > 0.99


def test_too_little_disk_is_refused_before_anything_is_loaded_or_written(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = extract_latents.run(expert_config(tiny, tmp_path / "out", dry_run=True))["bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    monkeypatch.setattr(extract_latents, "load_decoder", None)
    for dry_run in (True, False):
        with pytest.raises(OutputSpaceError, match="are free") as caught:
            extract_latents.run(expert_config(tiny, tmp_path / "out", dry_run=dry_run))
        assert caught.value.exit_code == 2
        assert "--out" in str(caught.value.hint)
    assert not (tmp_path / "out").exists(), "another config would then be refused there"


def test_space_is_needed_for_what_is_still_missing_only(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = extract_latents.run(expert_config(tiny, tmp_path, dry_run=True))["bytes"]
    extract_latents.run(expert_config(tiny, tmp_path, part="1/2"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need * 0.6))
    assert extract_latents.run(expert_config(tiny, tmp_path))["complete"]


def test_latents_beyond_float16_are_an_error_and_not_infinite(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = extraction.decoder_latents
    monkeypatch.setattr(extraction, "decoder_latents", lambda *args: [1e6 * latents for latents in real(*args)])
    with pytest.raises(WorkError, match="float16") as caught:
        extract_latents.run(expert_config(tiny, tmp_path / "half", store=StoreDtype.FLOAT16))
    assert "--store bfloat16" in str(caught.value.hint)
    assert extract_latents.run(expert_config(tiny, tmp_path / "bfloat16"))["complete"]


def test_responses_that_exceed_the_context_are_cut_and_counted(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"problem": "1+1", "solution": "2" * length} for length in (600, 3)]
    data = tmp_path / "expert.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = PromptConfig(system_prompt="")
    extract_latents.run(extract_config(random_model, tmp_path / "out", data=str(data), prompt=prompt))
    assert "1 of 2 responses do not fit" in capsys.readouterr().err
    end = AutoTokenizer.from_pretrained(random_model).eos_token_id
    (cut, cut_ids), (_, ids) = sequences_of(tmp_path / "out")
    assert cut_ids[-1] != end == ids[-1]
    prompt_tokens = len("1+1") + 3  # <|user|> and <|end|> around it, <|assistant|> after it
    assert len(cut) == 512 - prompt_tokens + 1


def test_a_shift_longer_than_a_prompt_is_refused(random_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "expert.jsonl"
    data.write_text(json.dumps({"problem": "1", "solution": "2"}) + "\n")
    prompt = PromptConfig(system_prompt="")
    config = extract_config(random_model, tmp_path / "out", data=str(data), prompt=prompt, max_shift=5)
    with pytest.raises(InputError, match="its prompt has 4 tokens"):
        extract_latents.run(config)
    assert not (tmp_path / "out").exists()
