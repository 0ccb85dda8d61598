"""All six stages on tiny random models of six families, with tied and untied heads and different tokenizers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlfr_cli.artifacts.flow_file import read_flow
from rlfr_cli.artifacts.rollouts import iter_rollouts
from rlfr_cli.artifacts.scores import iter_scores
from rlfr_cli.config.common import GradingConfig, PromptConfig
from rlfr_cli.config.train_rl import OnlineConfig, OptimiserConfig, RolloutConfig
from rlfr_cli.stages import evaluate, extract_latents, fit_flow, sample, score, train_rl
from stages.tiny_stages import (
    eval_config,
    extract_config,
    fit_config,
    rows_of_metrics,
    sample_config,
    sampling_of,
    score_config,
    train_config,
)
from tiny_models import FAMILIES, make_model_folder, make_tokenizer


@dataclass(frozen=True)
class Variant:
    """How a family is made here; between them the families have every combination once."""

    tied: bool
    padding_side: str = "left"
    pad_token: bool = True


VARIANTS = {
    "qwen2": Variant(tied=True),
    "llama": Variant(tied=False, padding_side="right"),
    "qwen3": Variant(tied=False, pad_token=False),
    "gemma3_text": Variant(tied=True, padding_side="right"),
    "mistral": Variant(tied=False, padding_side="right", pad_token=False),
    "phi3": Variant(tied=True, pad_token=False),
}
PROMPT = PromptConfig(system_prompt="Box it.")
SAMPLING = sampling_of(max_new_tokens=9)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    texts = ["1+1", "What is 12 + 30 - 4, taken slowly?", "2*3"]  # of lengths that need padding
    path.write_text("".join(json.dumps({"id": t[:3], "problem": t, "answer": "7"}) + "\n" for t in texts))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_all_six_stages(family: str, problems: Path, tmp_path: Path) -> None:
    variant = VARIANTS[family]
    tokenizer = make_tokenizer(padding_side=variant.padding_side, pad_token=variant.pad_token)
    model = make_model_folder(tmp_path / "model", family, tokenizer=tokenizer, tied=variant.tied)
    rollouts, latents, flow = (tmp_path / name for name in ("rollouts", "latents", "flow.safetensors"))

    config = sample_config(model, problems, rollouts, sampling=SAMPLING, prompt=PROMPT, group_size=3)
    assert sample.run(config)["responses"] == 9
    rows = list(iter_rollouts(rollouts))
    assert len({tuple(row.response_token_ids) for row in rows}) > 3

    assert extract_latents.run(extract_config(model, latents, rollouts=rollouts, store="float32"))["layers"] == [
        1,
        2,
        3,
    ]
    assert fit_flow.run(fit_config(latents, flow, optimiser={"steps": 3}))["steps"] == 3

    score.run(score_config(flow, tmp_path / "scores", model=str(model), rollouts=rollouts))
    score.run(score_config(flow, tmp_path / "from-latents", latents=latents))
    for ours, theirs in zip(iter_scores(tmp_path / "scores"), iter_scores(tmp_path / "from-latents"), strict=True):
        np.testing.assert_allclose(ours.score[:-1], theirs.score[:-1], rtol=1e-5, atol=1e-5)

    reward = tmp_path / "reward.py"
    reward.write_text(
        "def vowels(inputs):\n    return [float(sum(c in 'aeiou' for c in i.response)) for i in inputs]\n"
    )
    run = tmp_path / "run"
    summary = train_rl.run(
        train_config(
            model,
            problems,
            run,
            flow=flow,
            prompt=PROMPT,
            sampling=SAMPLING,
            grading=GradingConfig(reward=f"{reward}:vowels"),
            rollout=RolloutConfig(prompts_per_step=3, group_size=4, steps=1),
            optimiser=OptimiserConfig(learning_rate=1e-3),
            online=OnlineConfig(accept=("min-length=2",)),
        )
    )
    (line,) = rows_of_metrics(run)
    assert line["engine/logprob_gap_max"] < 1e-3, "generation and training must see the same policy"
    assert line["policy/gradient_norm"] > 0
    assert line["flow/steps"] == 1
    trained = Path(summary["checkpoint"])
    assert_trained(model, trained / "model", tied=variant.tied)
    before, after = read_flow(flow)[1], read_flow(trained / "flow.safetensors")[1]
    assert any(not torch.equal(before[name], after[name]) for name in before)

    results = evaluate.run(
        eval_config(trained / "model", problems, tmp_path / "eval", sampling=SAMPLING, prompt=PROMPT, num_samples=2)
    )
    assert results["responses"] == 6


def assert_trained(before: Path, after: Path, *, tied: bool) -> None:
    """The checkpoint has the shape of the model, other weights, and its head tied or not as before."""
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder) for folder in (before, after)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    for model in models:
        shared = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
        assert shared == tied
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (before, after)]
    text = "<|user|>a \\boxed{3}<|end|>"
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert tokenizers[0].padding_side == tokenizers[1].padding_side
    assert tokenizers[0].pad_token == tokenizers[1].pad_token
