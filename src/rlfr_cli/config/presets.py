"""Named sets of options for `--preset`: name, then command, then a table as a recipe would hold it.

`paper` is the paper's method with the published numbers, never the faults of the published code. Most of them are the
defaults already; they stand here too, so that the preset keeps its meaning when a default moves.
"""

from __future__ import annotations

from typing import Any

PUBLISHED_LAYERS = [0.25, 0.5, 0.75]
PUBLISHED_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 1024}
PUBLISHED_SHAPING = {
    "timestep": [0.8],
    "num_draws": 1,
    "score_normalisation": "minmax",
    "power": 1.0,
    "threshold": 0.6,
    "top_k": 15,
    "coef": 0.01,
    "centre_reward": False,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "plan": {"response_tokens": 1024},
        "sample": {"group_size": 8, "sampling": PUBLISHED_SAMPLING, "grading": {"reward": "published"}},
        "extract-latents": {"layer_fraction": PUBLISHED_LAYERS, "max_shift": 1},
        "fit-flow": {
            "network": {"context": ["next"], "shift": 1, "time_scale": 1.0, "normalisation": "none"},
            "optimiser": {
                "epochs": 2.0,
                "sequences_per_step": 32,
                "max_sequence_tokens": 8192,
                "learning_rate": 1e-4,
                "weight_decay": 0.01,
                "warmup_fraction": 0.1,
                "clip_norm": 1.0,
                "noise_repeats": 4,
            },
        },
        "score": {"flow_reward": PUBLISHED_SHAPING},
        "diagnose": {"flow_reward": PUBLISHED_SHAPING},
        "train-rl": {
            "rollout": {"prompts_per_step": 128, "group_size": 8, "episodes": 5.0},
            "sampling": PUBLISHED_SAMPLING,
            "grading": {"reward": "published"},
            "optimiser": {
                "learning_rate": 1e-6,
                "beta1": 0.9,
                "beta2": 0.95,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "schedule": "cosine",
                "warmup_fraction": 0.03,
                "final_fraction": 0.1,
                "minibatch_responses": 128,
            },
            "policy_loss": {
                "clip_low": 0.2,
                "clip_high": 0.2,
                "ratio_cap": 3.0,
                "aggregation": "response-mean",
                "estimator": "group-norm",
                "discount": 1.0,
                "kl_coef": 0.0,
            },
            "flow_reward": PUBLISHED_SHAPING,
            "online": {
                "online_steps": 1,
                "online_learning_rate": 1e-4,
                "online_timesteps": "rewarding",
                "accept": ["correct"],
            },
        },
        "eval": {"sampling": {**PUBLISHED_SAMPLING, "max_new_tokens": 8192, "temperature": 0.0}},
    }
}
