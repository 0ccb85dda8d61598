"""Every stage command: its config, the module that does it, and what it is for.

The command line, recipes and the docs page read this one table. A stage is named by its module's path, so
that nothing heavy is imported before it runs. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlfr_cli.config.common import MACHINE_PANEL
from rlfr_cli.config.diagnose import DiagnoseConfig
from rlfr_cli.config.evaluate import EvalConfig
from rlfr_cli.config.extract_latents import ExtractLatentsConfig
from rlfr_cli.config.fields import LeafOption, StageConfig, leaf_options
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.plan import PlanConfig
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.config.score import ScoreConfig
from rlfr_cli.config.train_rl import TrainRlConfig


@dataclass(frozen=True)
class Command:
    """One stage command; `stage` is a module with `run(config) -> dict`.

    With `reads_recipe`, `run` takes `recipe` and `preset` too: the command looks at other commands' options.
    """

    config: type[StageConfig]
    stage: str
    help: str
    reads_recipe: bool = False

    @property
    def options(self) -> list[LeafOption]:
        """The options as help and docs show them: required ones first, the machine's last."""
        return sorted(leaf_options(self.config), key=lambda leaf: (leaf.panel == MACHINE_PANEL, not leaf.required))


COMMANDS: dict[str, Command] = {
    "sample": Command(
        SampleConfig,
        "rlfr_cli.stages.sample",
        "Let a policy answer problems, and grade its responses: writes rollouts.",
    ),
    "extract-latents": Command(
        ExtractLatentsConfig,
        "rlfr_cli.stages.extract_latents",
        "Read responses with a policy and keep its hidden states: writes latents.",
    ),
    "fit-flow": Command(
        FitFlowConfig,
        "rlfr_cli.stages.fit_flow",
        "Fit the velocity field of latents by flow matching: writes flow.safetensors.",
    ),
    "score": Command(
        ScoreConfig,
        "rlfr_cli.stages.score",
        "Measure how far each token of responses deviates from a flow: writes scores.",
    ),
    "diagnose": Command(
        DiagnoseConfig,
        "rlfr_cli.stages.diagnose",
        "Say whether a flow's scores carry signal beyond simple quantities: writes diagnosis.json and plots.",
    ),
    "train-rl": Command(
        TrainRlConfig,
        "rlfr_cli.stages.train_rl",
        "Train a policy by verifiable rewards and, with --flow, flow rewards: writes a run folder.",
    ),
    "eval": Command(
        EvalConfig,
        "rlfr_cli.stages.evaluate",
        "Measure a policy's accuracy and pass@k on problems: writes results.",
    ),
    "plan": Command(
        PlanConfig,
        "rlfr_cli.stages.plan",
        "Estimate what a recipe would take of GPU memory, disk and hours, and which option would make it fit.",
        reads_recipe=True,
    ),
}
