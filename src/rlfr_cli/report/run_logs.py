"""Where the metrics of a run go: ``metrics.jsonl`` always, TensorBoard by default, Weights & Biases when asked."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.config.fields import to_table
from rlfr_cli.config.train_rl import TrainRlConfig
from rlfr_cli.errors import MissingPackageError


class RunLogs:
    """Writes a step's metrics to every log that the config names.

    Args:
        config: names the logs.
        path: run folder; TensorBoard's events go into ``tensorboard/``.
        start: step that a resumed run goes on from; later events of an earlier try are hidden.
    """

    def __init__(self, config: TrainRlConfig, path: Path, start: int) -> None:
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(path / "tensorboard"), purge_step=start + 1 if start else None)
        if config.run.wandb is not None:
            self._wandb = _start_wandb(config, path)

    def add(self, folder: RunFolder, step: int, metrics: dict[str, Any]) -> None:
        """Log one step."""
        folder.log_metrics(step, metrics)
        numbers = {name: value for name, value in metrics.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(config: TrainRlConfig, path: Path) -> Any:
    try:
        import wandb
    except ImportError:  # an optional package
        raise MissingPackageError(
            f"--wandb {config.run.wandb} needs the package wandb", hint="pip install 'rlfr-cli[wandb]'"
        ) from None
    return wandb.init(project=config.run.wandb, name=path.name, dir=str(path), config=to_table(config))
