"""DeepSpeed's settings: what the options decide stands, what the user's file adds is kept, contradictions are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.engines.deepspeed_settings import Settings, deepspeed_settings
from rlfr_cli.errors import ConfigError


def settings_for(
    path: Path | None = None, *, stage: int = 2, bfloat16: bool = True, pin_memory: bool = True, **options: Any
) -> Settings:
    config = TrainingEngineConfig(zero_stage=stage, deepspeed_config=path, **options)
    return deepspeed_settings(config, stage=stage, bfloat16=bfloat16, clip_norm=0.5, pin_memory=pin_memory)


def write(path: Path, settings: Any) -> Path:
    path.write_text(json.dumps(settings))
    return path


def test_options_become_settings() -> None:
    settings = settings_for(stage=3, offload_optimiser=True, offload_parameters=True)
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    }
    assert settings["bf16"]["enabled"] is True


def test_sums_are_made_in_float32() -> None:
    assert settings_for()["communication_data_type"] == "fp32"
    assert settings_for()["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings_for(bfloat16=False)["bf16"]["enabled"] is False


def test_the_file_adds_and_replaces_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.json",
        {
            "communication_data_type": "bf16",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
        },
    )
    settings = settings_for(path, pin_memory=False)
    assert settings["communication_data_type"] == "bf16"
    assert settings["gradient_clipping"] == 0.5
    assert "train_batch_size" not in settings
    assert settings["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage to 3, and rlfr's options make it 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping to 1.0, and rlfr's options make it 0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled to False, and rlfr's options make it True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled to True, and rlfr's options make it False"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states to True"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op to 'sum'"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps to 8, and rlfr's options make it 1"),
        ({"bf16": True}, "bf16 to True"),
        ({"optimizer": {"type": "Lion"}}, "has a section 'optimizer': rlfr steps with AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler'"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device to 'nvme'"),
    ],
)
def test_a_contradiction_is_named_with_both_values(given: Settings, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", given)
    with pytest.raises(ConfigError, match=message) as caught:
        settings_for(path)
    assert "mine.json" in str(caught.value)


def test_offloading_in_the_file_alone_is_no_contradiction_and_less_than_the_option_is(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    assert settings_for(path)["zero_optimization"]["offload_optimizer"] == {"device": "none"}
    with pytest.raises(ConfigError, match=r"offload_optimizer\.device to 'none', and rlfr's options make it 'cpu'"):
        settings_for(path, offload_optimiser=True)
