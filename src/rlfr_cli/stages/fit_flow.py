"""`rlfr fit-flow`: a network learns the velocity field of latents by flow matching.

Reads latents, or a policy and responses whose latents are taken as they are needed; writes ``flow.safetensors`` (the
best by held-out loss) and, beside it, ``flow.fit/``: last flow, optimiser moments, metrics of every step, and the
velocity error by timestep and layer beside its baselines. Sequences are read one optimiser step at a time, so memory
does not grow with the data. The loss is in ``flow/matching.py``, what a flow has to beat in ``flow/baselines.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from rlfr_cli import console
from rlfr_cli.artifacts.files import canonical_json, read_json, sha256_file, write_atomically
from rlfr_cli.artifacts.flow_file import FlowHeader, flow_fingerprint
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.shards import open_tensors, read_metadata, save_tensors
from rlfr_cli.config.fields import to_table
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import Normalisation
from rlfr_cli.config.schedules import Schedule
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.errors import OutputInUseError, Stopped, WorkError, during_work
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import accumulate_matching_gradients
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.flow.normalisation import LatentStatistics, StatisticsAccumulator
from rlfr_cli.ordering import shuffled_items
from rlfr_cli.policy.loading import resolve_placement
from rlfr_cli.rl.schedule import learning_rate_at
from rlfr_cli.stages.flow_evaluation import evaluate_velocity, verdict
from rlfr_cli.stages.flows import load_flow, write_flow
from rlfr_cli.stages.initial_flow import check_neighbours, initial_flow
from rlfr_cli.stages.latent_sequences import LatentSequences, LatentSource
from rlfr_cli.stages.live_latents import open_live_latents

EVALUATION = "evaluation.json"
STATE = "state.safetensors"
WEIGHTS = "weights/"
FILES = (
    "statistics.safetensors",
    "last.safetensors",
    STATE,
    "metrics.jsonl",
    EVALUATION,
)
MAX_BAD_STEPS = 3
NOT_FINITE_HINT = "check the latents with `rlfr show --verify`, or lower --learning-rate"


def run(config: FitFlowConfig) -> dict[str, Any]:
    """Fit a flow; returns a summary.

    Raises:
        RlfrError: anything wrong with config, inputs or output, before work starts.
    """
    data = _open_data(config)
    training, heldout = data.split(config.holdout_fraction, config.max_holdout_sequences, config.seed)
    header, initial = initial_flow(config, data)
    data = data.for_flow(initial)
    check_neighbours(header, data, training)
    total_steps = config.optimiser.steps
    if total_steps is None:
        total_steps = math.ceil(config.optimiser.epochs * len(training) / config.optimiser.sequences_per_step)
    folder = _open_output(config, data, initial)
    parameters = sum(p.numel() for p in initial.network.parameters())
    plan = {
        "out": str(config.out),
        "training_sequences": len(training),
        "heldout_sequences": len(heldout),
        "training_tokens": sum(data.response_tokens(index) for index in training),
        "steps": total_steps,
        "layers": list(header.layer_indices),
        "context": header.contexts,
        "parameters": parameters,
        **data.facts(),
    }
    if folder is None:
        return {"dry_run": True, **plan, "bytes": 4 * parameters}
    if not folder.complete:
        with during_work():
            fit = _Fit(config, data, training, heldout, header, initial, total_steps, folder)
            fit.run()
            folder.finish({"flow": flow_fingerprint(config.out)})
    return {**plan, **_results(config)}


def _open_data(config: FitFlowConfig) -> LatentSource:
    if not config.latents:
        return open_live_latents(config)
    if config.unused_options:
        console.warn(f"LATENTS are read as they are: {', '.join(config.unused_options)} has no effect")
    return LatentSequences(config.latents, config.optimiser.max_sequence_tokens)


def _open_output(config: FitFlowConfig, data: LatentSource, initial: Flow) -> StageFolder | None:
    facts: dict[str, Any] = {
        "kind": "flow-fit",
        "config": to_table(config, for_artifact=True),
        "inputs": dict(data.inputs),
        "seed": config.seed,
        "num_units": 0,
        "files": FILES,
    }
    if config.init_from is not None:
        facts["inputs"]["init_from"] = sha256_file(config.init_from)
    fit_folder = fit_folder_of(config.out)
    if config.out.is_dir():
        raise OutputInUseError(f"{config.out} is a folder, and a file is to be written", hint="give another --out")
    if config.out.exists() and not (fit_folder / "stage.json").exists() and not config.overwrite:
        raise OutputInUseError(
            f"{config.out} exists, and nothing beside it says how it was fitted",
            hint="give --overwrite to replace it, or another --out",
        )
    if config.dry_run:
        StageFolder.check_for_writing(fit_folder, **facts, overwrite=config.overwrite)
        return None
    folder = StageFolder.open_for_writing(fit_folder, **facts, overwrite=config.overwrite)
    if folder.complete and not config.out.exists():
        raise OutputInUseError(
            f"{fit_folder} is complete, but {config.out} is gone", hint="give --overwrite to fit it again"
        )
    if folder.complete:
        console.log(f"{config.out} is complete already; nothing to do")
    return folder


def fit_folder_of(out: Path) -> Path:
    """``flow.fit/`` beside ``flow.safetensors``."""
    return out.with_name(out.name.removesuffix(".safetensors") + ".fit")


def _results(config: FitFlowConfig) -> dict[str, Any]:
    """What the fit was judged to be, errors as rows by layer and timestep."""
    results: dict[str, Any] = read_json(fit_folder_of(config.out) / EVALUATION)
    columns = ("layer", "timestep", "flow", "gaussian", "zero", "share_of_gaussian_removed")
    results["velocity_error"] = [{name: row[name] for name in columns} for row in results["velocity_error"]]
    results["verdict"] = results["verdict"]["text"]
    return results


class _Fit:
    """One fit: its flow, optimiser and counters; each saved state continues it exactly."""

    def __init__(
        self,
        config: FitFlowConfig,
        data: LatentSource,
        training: Sequence[int],
        heldout: Sequence[int],
        header: FlowHeader,
        flow: Flow,
        total_steps: int,
        folder: StageFolder,
    ) -> None:
        self.config, self.data, self.training, self.heldout = config, data, training, heldout
        self.header, self.flow, self.total_steps = header, flow, total_steps
        self.folder = folder.path
        self.placement = resolve_placement(config.device, config.dtype)
        self.eval_every = config.eval_every or max(1, total_steps // 10)
        self.optimiser = NamedAdamW(
            flow.network.named_parameters(),
            weight_decay=config.optimiser.weight_decay,
            clip_norm=config.optimiser.clip_norm,
        )
        self.step, self.tokens_seen, self.bad_steps = 0, 0, 0
        self.best_loss, self.train_loss = math.inf, math.nan

    def run(self) -> None:
        """Train to the last step, keep the best flow, and judge it."""
        try:
            gaussian = self._statistics()
            if self.config.network.normalisation is Normalisation.CHANNEL and self.flow.statistics is None:
                self.flow.statistics = gaussian
            console.log(f"fitting a flow of {sum(p.numel() for p in self.flow.network.parameters()):,} parameters")
            if not self._resume():
                self._save(self._heldout_loss())
            self._train()
            self._judge(gaussian)
        except KeyboardInterrupt:
            raise Stopped(
                f"stopped; the state of the last evaluation is kept in {self.folder}",
                hint="the same command continues from it",
            ) from None

    def _train(self) -> None:
        with console.progress("fitting", total=self.total_steps, unit="steps", done=self.step) as bar:
            while self.step < self.total_steps:
                loss = self._train_step()
                note = f"loss {loss:.4g}"
                if self.step % self.eval_every == 0 or self.step == self.total_steps:
                    heldout = self._heldout_loss()
                    self._save(heldout)
                    note += "" if heldout is None else f", held-out {heldout:.4g}"
                bar.advance(1, note=note)

    def _statistics(self) -> LatentStatistics:
        """Mean and deviation of the training tokens, per tapped state and channel; kept for a resumed fit."""
        path = self.folder / "statistics.safetensors"
        if path.is_file():
            stored = load_file(path)
            return LatentStatistics(stored["mean"], stored["std"]).to(self.flow.device)
        accumulator = StatisticsAccumulator(len(self.flow.tapped), self.header.latent_size, self.flow.device)
        chosen = self._statistics_sequences()
        with console.progress("reading latents", total=len(chosen), unit="sequences") as bar:
            for start in range(0, len(chosen), self.config.optimiser.sequences_per_step):
                for latents_TJD in self.data.read_many(
                    chosen[start : start + self.config.optimiser.sequences_per_step]
                ):
                    accumulator.update(latents_TJD[self.data.info.num_prompt_tokens :])
                    bar.advance()
        statistics = accumulator.finish()
        write_atomically(path, save({"mean": statistics.mean_JD, "std": statistics.std_JD}))
        return statistics.to(self.flow.device)

    def _statistics_sequences(self) -> Sequence[int]:
        """The training sequences, or as many in random order as hold ``--statistics-tokens``."""
        wanted = self.config.statistics_tokens
        if wanted is None:
            return self.training
        chosen, tokens = [], 0
        generator = keyed_generator("cpu", self.config.seed, "statistics")
        for place in torch.randperm(len(self.training), generator=generator).tolist():
            if tokens >= wanted:
                break
            chosen.append(self.training[place])
            tokens += self.data.response_tokens(chosen[-1])
        return sorted(chosen)

    def _train_step(self) -> float:
        options = self.config.optimiser
        self.step += 1
        chosen = shuffled_items(
            len(self.training), options.sequences_per_step, self.step, self.config.seed, "fit order"
        )
        pairs = self._pair([self.training[place] for place in chosen])
        result = accumulate_matching_gradients(
            self.flow.network,
            pairs,
            keyed_generator(self.flow.device, self.config.seed, "fit", self.step),
            noise_repeats=options.noise_repeats,
            tokens_per_chunk=self.config.tokens_per_chunk,
            autocast_dtype=self.placement.dtype,
        )
        rate = learning_rate_at(
            self.step - 1,
            self.total_steps,
            options.learning_rate,
            warmup_fraction=options.warmup_fraction,
            schedule=Schedule.COSINE,
            final_fraction=0.0,
        )
        self.train_loss = float(result.loss)
        outcome = self.optimiser.step(rate, loss_is_finite=math.isfinite(self.train_loss))
        self.bad_steps = 0 if outcome.stepped else self.bad_steps + 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise WorkError(
                f"loss or gradient was not finite in {self.bad_steps} steps in a row (loss {self.train_loss})",
                hint=NOT_FINITE_HINT,
            )
        self.tokens_seen += int(result.weight_sum)
        self._log({"loss": self.train_loss, "learning_rate": rate, "gradient_norm": outcome.gradient_norm})
        return self.train_loss

    def _pair(self, sequences: Sequence[int]) -> Any:
        latents = [latents_TJD.to(self.flow.device) for latents_TJD in self.data.read_many(sequences)]
        return self.flow.pair(latents, self.data.info.num_prompt_tokens)

    @torch.no_grad()
    def _heldout_loss(self) -> float | None:
        """Fitting loss on the held-out sequences, with the same noise and times at every evaluation."""
        total, weight = 0.0, 0.0
        size = self.config.optimiser.sequences_per_step
        for start in range(0, len(self.heldout), size):
            result = accumulate_matching_gradients(
                self.flow.network,
                self._pair(self.heldout[start : start + size]),
                keyed_generator(self.flow.device, self.config.seed, "held out", start),
                tokens_per_chunk=self.config.tokens_per_chunk,
                autocast_dtype=self.placement.dtype,
                backward=False,
            )
            total += float(result.error_sum)
            weight += float(result.weight_sum)
        if weight == 0:
            return None
        if not math.isfinite(total):
            raise WorkError(f"the held-out loss is {total} at step {self.step}", hint=NOT_FINITE_HINT)
        self._log({"heldout_loss": total / weight})
        return total / weight

    def _log(self, values: dict[str, float]) -> None:
        finite = {key: _finite(value) for key, value in values.items()}
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(canonical_json({"step": self.step, **finite}) + b"\n")

    def _save(self, heldout: float | None) -> None:
        """Write the last flow and its state, and the flow itself if it is the best so far."""
        header = replace(
            self.header,
            steps=self.header.steps + self.step,
            tokens_seen=self.header.tokens_seen + self.tokens_seen,
            train_loss=_finite(self.train_loss),
            heldout_loss=heldout,
        )
        if heldout is None or heldout < self.best_loss:
            self.best_loss = math.inf if heldout is None else heldout
            write_flow(self.config.out, header, self.flow)
        write_flow(self.folder / "last.safetensors", header, self.flow)
        # One file, so that a kill never leaves weights of one step beside moments of another.
        weights = {f"{WEIGHTS}{name}": value for name, value in self.flow.network.state_dict().items()}
        counters = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "train_loss": _finite(self.train_loss),
            "best_loss": _finite(self.best_loss),
        }
        tensors = weights | self.optimiser.state_tensors()
        write_atomically(self.folder / STATE, lambda partial: save_tensors(partial, tensors, counters))

    def _resume(self) -> bool:
        """Take the saved state, if there is one, and forget what was logged after it."""
        path, counters = self.folder / STATE, None
        if path.is_file():
            with open_tensors(path) as opened:
                counters = read_metadata(opened.metadata())
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        if counters is not None:
            self.step, self.tokens_seen = counters["step"], counters["tokens_seen"]
            self.train_loss = math.nan if counters["train_loss"] is None else counters["train_loss"]
            self.best_loss = math.inf if counters["best_loss"] is None else counters["best_loss"]
            weights = {name.removeprefix(WEIGHTS): t for name, t in tensors.items() if name.startswith(WEIGHTS)}
            self.flow.network.load_state_dict(weights)
            self.optimiser.load_state_tensors(tensors)
            console.log(f"continuing after step {self.step} of {self.total_steps}")
        metrics = self.folder / "metrics.jsonl"
        if metrics.is_file():
            lines = metrics.read_bytes().split(b"\n")[:-1] if counters is not None else []
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            write_atomically(metrics, b"".join(line + b"\n" for line in kept))
        return counters is not None

    def _judge(self, gaussian: LatentStatistics) -> None:
        """Velocity error of the best flow by timestep and layer, beside its baselines; say plainly what it means."""
        header, best = load_flow(self.config.out, self.flow.device)
        results: dict[str, Any] = {"train_loss": _finite(self.train_loss), "heldout_loss": header.heldout_loss}
        results["best_step"] = header.steps - self.header.steps
        judged = self.heldout or self.training
        rows = evaluate_velocity(best, gaussian, self.data, judged, self.config.seed, self.placement.dtype)
        results["judged_on"] = "held-out sequences" if self.heldout else "training sequences (none held out)"
        results["velocity_error"] = rows
        results["verdict"] = verdict(rows)
        if not results["verdict"]["beats_gaussian"]:
            console.warn(results["verdict"]["text"])
        write_atomically(self.folder / EVALUATION, canonical_json(results, indent=2))


def _finite(value: float) -> float | None:
    """The value, or None, which JSON knows, for one that is not finite."""
    return value if math.isfinite(value) else None
