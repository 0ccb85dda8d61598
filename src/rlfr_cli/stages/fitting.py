"""One fit of a flow: its steps, what it is measured by, and the state from which it goes on.

Reads sequences of latents one optimiser step at a time, so memory does not grow with the data; writes the flow (the
best by held-out loss) and, in the fit's folder, the last flow, its state, metrics and how it was judged. Several
processes go through it side by side: each reads its share of a step's sequences, all take the same step
(``engines/flow_ranks.py``), and rank 0 writes. The loss is in ``flow/matching.py``, what a flow has to beat in
``flow/baselines.py``.
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
from rlfr_cli.artifacts.files import canonical_json, write_atomically
from rlfr_cli.artifacts.flow_file import FlowHeader
from rlfr_cli.artifacts.shards import open_tensors, read_metadata, save_tensors
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import Normalisation
from rlfr_cli.config.schedules import Schedule
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.engines.flow_ranks import accumulate_over_ranks, check_same_flow, take_weights_of_first
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.errors import Stopped, StoppedAtOnce, WorkError
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import MatchingResult
from rlfr_cli.flow.noise import Key, keyed_generator
from rlfr_cli.flow.normalisation import LatentStatistics, StatisticsAccumulator
from rlfr_cli.flow.pairing import PairedLatents
from rlfr_cli.ordering import shuffled_items
from rlfr_cli.policy.loading import resolve_placement
from rlfr_cli.rl.schedule import learning_rate_at
from rlfr_cli.stages.flow_evaluation import evaluate_velocity, verdict
from rlfr_cli.stages.flows import load_flow, write_flow
from rlfr_cli.stages.latent_sequences import LatentSource
from rlfr_cli.stages.stopping import StopTogether

EVALUATION = "evaluation.json"
STATE = "state.safetensors"
STATISTICS = "statistics.safetensors"
LAST = "last.safetensors"
METRICS = "metrics.jsonl"
FILES = (STATISTICS, LAST, STATE, METRICS, EVALUATION)
WEIGHTS = "weights/"
MAX_BAD_STEPS = 3
NOT_FINITE_HINT = "check the latents with `rlfr show --verify`, or lower --learning-rate"


class Fit:
    """One fit: its flow, optimiser and counters; each saved state continues it exactly.

    Args:
        config: that of `fit-flow`.
        data: with the flow's tapped states as columns.
        training: indices of the sequences that are fitted.
        heldout: of those that judge.
        header: of the flow that the fit starts from.
        flow: that flow; it is trained.
        total_steps: optimiser steps of the whole fit.
        folder: where state, metrics and judgement go.
        ranks: the processes that fit together; the state does not depend on how many they are.
    """

    def __init__(
        self,
        config: FitFlowConfig,
        data: LatentSource,
        training: Sequence[int],
        heldout: Sequence[int],
        header: FlowHeader,
        flow: Flow,
        total_steps: int,
        folder: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.data, self.training, self.heldout = config, data, training, heldout
        self.header, self.flow, self.total_steps = header, flow, total_steps
        self.folder, self.ranks, self.stop = folder, ranks, StopTogether(ranks)
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
            with self.stop:
                gaussian = self._statistics()
                if self.config.network.normalisation is Normalisation.CHANNEL and self.flow.statistics is None:
                    self.flow.statistics = gaussian
                console.log(f"fitting a flow of {sum(p.numel() for p in self.flow.network.parameters()):,} parameters")
                if not self._resume():
                    self._save(self._heldout_loss())
                self._train()
                self._judge(gaussian)
        except KeyboardInterrupt:
            raise (Stopped if self.stop.together else StoppedAtOnce)(
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
        path = self.folder / STATISTICS
        stored = self.ranks.broadcast(load_file(path) if self.ranks.is_first and path.is_file() else None)
        if stored is not None:
            return LatentStatistics(stored["mean"], stored["std"]).to(self.flow.device)
        accumulator = StatisticsAccumulator(len(self.flow.tapped), self.header.latent_size, self.flow.device)
        chosen, at_once = self._statistics_sequences(), self.config.optimiser.sequences_per_step
        mine = self.ranks.share(chosen)
        largest = -(-len(chosen) // self.ranks.world_size)  # of all ranks' shares: they stop side by side
        with console.progress("reading latents", total=len(mine), unit="sequences") as bar:
            for start in range(0, largest, at_once):
                self.stop.check()
                for latents_TJD in self._read(mine[start : start + at_once]):
                    accumulator.update(latents_TJD[self.data.info.num_prompt_tokens :])
                    bar.advance()
        together = StatisticsAccumulator(len(self.flow.tapped), self.header.latent_size)
        for part in self.ranks.all_gather(accumulator.cpu()):
            together.merge(part)
        statistics = together.finish()
        if self.ranks.is_first:
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
        result = self._accumulate(
            [self.training[place] for place in chosen], "fit", self.step, noise_repeats=options.noise_repeats
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

    def _accumulate(self, sequences: Sequence[int], *key: Key, **options: Any) -> MatchingResult:
        """Fitting loss of a batch that the ranks read in shares, and its gradients unless ``backward`` is False."""
        self.stop.check()
        mine = self.ranks.share(sequences)
        return accumulate_over_ranks(
            self.flow.network,
            self._pair(mine) if mine else None,
            keyed_generator(self.flow.device, self.config.seed, *key),
            self.ranks,
            tokens_per_chunk=self.config.tokens_per_chunk,
            autocast_dtype=self.placement.dtype,
            **options,
        )

    def _pair(self, sequences: Sequence[int]) -> PairedLatents:
        return self.flow.pair(self._read(sequences), self.data.info.num_prompt_tokens)

    def _read(self, sequences: Sequence[int]) -> list[torch.Tensor]:
        """Latents on the flow's device; a rank without sequences loads no decoder for them."""
        read = self.data.read_many(sequences) if sequences else []
        return [latents_TJD.to(self.flow.device) for latents_TJD in read]

    @torch.no_grad()
    def _heldout_loss(self) -> float | None:
        """Fitting loss on the held-out sequences, with the same noise and times at every evaluation."""
        total, weight = 0.0, 0.0
        size = self.config.optimiser.sequences_per_step
        for start in range(0, len(self.heldout), size):
            batch = self.heldout[start : start + size]
            result = self._accumulate(batch, "held out", start, backward=False)
            total += float(result.error_sum)
            weight += float(result.weight_sum)
        if weight == 0:
            return None
        if not math.isfinite(total):
            raise WorkError(f"the held-out loss is {total} at step {self.step}", hint=NOT_FINITE_HINT)
        self._log({"heldout_loss": total / weight})
        return total / weight

    def _log(self, values: dict[str, float]) -> None:
        if not self.ranks.is_first:
            return
        finite = {key: _finite(value) for key, value in values.items()}
        with open(self.folder / METRICS, "ab") as file:
            file.write(canonical_json({"step": self.step, **finite}) + b"\n")

    def _save(self, heldout: float | None) -> None:
        """Write the last flow and its state, and the flow itself if it is the best so far; rank 0 does."""
        check_same_flow(self.flow, self.ranks)
        is_best = heldout is None or heldout < self.best_loss
        if is_best:
            self.best_loss = math.inf if heldout is None else heldout
        if self.ranks.is_first:
            self._write(heldout, is_best)

    def _write(self, heldout: float | None, is_best: bool) -> None:
        header = replace(
            self.header,
            steps=self.header.steps + self.step,
            tokens_seen=self.header.tokens_seen + self.tokens_seen,
            train_loss=_finite(self.train_loss),
            heldout_loss=heldout,
        )
        if is_best:
            write_flow(self.config.out, header, self.flow)
        write_flow(self.folder / LAST, header, self.flow)
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
        if self.ranks.broadcast(path.is_file()):
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
        metrics = self.folder / METRICS
        if self.ranks.is_first and metrics.is_file():
            lines = metrics.read_bytes().split(b"\n")[:-1] if counters is not None else []
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            write_atomically(metrics, b"".join(line + b"\n" for line in kept))
        return counters is not None

    def _judge(self, gaussian: LatentStatistics) -> None:
        """Velocity error of the best flow by timestep and layer, beside its baselines; say plainly what it means."""
        header = self.header
        if self.ranks.is_first:
            header, best = load_flow(self.config.out, torch.device("cpu"))
            self.flow.network.load_state_dict(best.network.state_dict())
        # Sent, since another machine may still see an older file.
        take_weights_of_first(self.flow, self.ranks)
        judged = self.heldout or self.training
        rows = evaluate_velocity(
            self.flow, gaussian, self.data, judged, self.config.seed, self.placement.dtype, self.ranks
        )
        if not self.ranks.is_first:
            return
        results: dict[str, Any] = {"train_loss": _finite(self.train_loss), "heldout_loss": header.heldout_loss}
        results["best_step"] = header.steps - self.header.steps
        results["judged_on"] = "held-out sequences" if self.heldout else "training sequences (none held out)"
        results["velocity_error"] = rows
        results["verdict"] = verdict(rows)
        if not results["verdict"]["beats_gaussian"]:
            console.warn(results["verdict"]["text"])
        write_atomically(self.folder / EVALUATION, canonical_json(results, indent=2))


def _finite(value: float) -> float | None:
    """The value, or None, which JSON knows, for one that is not finite."""
    return value if math.isfinite(value) else None
