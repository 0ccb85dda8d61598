"""A checkpoint with the snippet of any model card: nothing of rlfr is needed to use it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.rollouts import iter_rollouts
from rlfr_cli.config.train_rl import RolloutConfig
from rlfr_cli.stages import sample, train_rl
from stages.tiny_stages import TinyArtifacts, sample_config, sampling_of, train_config
from tiny_models import make_model_folder


def model_card(path: Any, problem: str, system: str) -> str:
    """What a model card tells its readers to do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, torch_dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": problem}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model_inputs = tokenizer([text], return_tensors="pt").to(model.device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=32, do_sample=False)
    generated_ids = [
        output_ids[len(input_ids) :]
        for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids, strict=True)
    ]
    return tokenizer.batch_decode(generated_ids, skip_special_tokens=True)[0]


def trained_and_asked(policy: Path, problems: Path, folder: Path) -> tuple[Path, str, str, str]:
    """A checkpoint after one step; a problem, the system prompt, and `sample`'s greedy response to them."""
    rollout = RolloutConfig(prompts_per_step=2, group_size=2, steps=1)
    run = train_rl.run(train_config(policy, problems, folder / "run", rollout=rollout))
    model = Path(run["checkpoint"]) / "model"
    greedy = sampling_of(temperature=0.0)
    config = sample_config(model, problems, folder / "rollouts", sampling=greedy, group_size=1)
    sample.run(config)
    row = next(iter_rollouts(folder / "rollouts"))
    return model, row.problem, config.prompt.system_prompt, row.response


def test_the_snippet_answers_as_sample_does_without_rlfr(tiny: TinyArtifacts, tmp_path: Path) -> None:
    model, problem, system, response = trained_and_asked(tiny.policy, tiny.problems, tmp_path)
    script = f"""
import sys
from typing import Any
{inspect.getsource(model_card)}
print(model_card(*sys.argv[1:]))
assert not [name for name in sys.modules if name.startswith("rlfr")]
"""
    command = [sys.executable, "-c", script, str(model), problem, system]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == response + "\n"
    assert "\\boxed{" in response


def test_the_snippet_passes_system_and_user_message_on(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """A model whose tokenizer knows letters, so that the system message counts."""
    policy = make_model_folder(tmp_path / "policy", "llama", seed=1)
    model, problem, system, response = trained_and_asked(policy, tiny.problems, tmp_path)
    assert response
    assert model_card(model, problem, system) == response
    assert model_card(model, problem, "Shout.") != response
