"""Artifacts of the embedded policy, made once for all tests of stages: each is what one command writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.engines.opening import EngineChoice
from rlfr_cli.policy.loading import Policy, load_policy
from rlfr_cli.stages import extract_latents, fit_flow, sample
from stages.copying_engine import CopyingEngine
from stages.tiny_stages import TinyArtifacts, extract_config, fit_config, sample_config
from tiny_models import make_model_folder

NUM_PROBLEMS = 6
NUM_EXPERT = 14


@pytest.fixture(scope="session", autouse=True)
def _fingerprint_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of models in temporary folders stay out of the home folder's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyArtifacts:
    folder = tmp_path_factory.mktemp("tiny")
    data = repository / "data"
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    easy = [row for row in rows if row["level"] == 1][:NUM_PROBLEMS]
    expert = (data / "expert.jsonl").read_text().splitlines()[:NUM_EXPERT]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in easy))
    (folder / "expert.jsonl").write_text("".join(line + "\n" for line in expert))
    tiny = TinyArtifacts(
        policy=data / "policy",
        problems=folder / "problems.jsonl",
        expert=folder / "expert.jsonl",
        rollouts=folder / "rollouts",
        latents=folder / "latents",
        flow=folder / "flow.safetensors",
    )
    sample.run(sample_config(tiny.policy, tiny.problems, tiny.rollouts))
    extract_latents.run(
        extract_config(tiny.policy, tiny.latents, rollouts=tiny.rollouts, layer_index=(2, 5), store=StoreDtype.FLOAT32)
    )
    fit_flow.run(fit_config(tiny.latents, tiny.flow))
    return tiny


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 4 blocks and hidden size 32, whose tokenizer knows all printable characters."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[CopyingEngine]:
    """Engines that runs open from now on."""
    opened: list[CopyingEngine] = []

    def open_copy(choice: EngineChoice, policy: Policy | None = None) -> CopyingEngine:
        placement = choice.model.placement
        opened.append(CopyingEngine(load_policy(choice.model.folder, placement, weights_dtype=torch.float32)))
        return opened[-1]

    monkeypatch.setattr(EngineChoice, "open", open_copy)
    return opened
