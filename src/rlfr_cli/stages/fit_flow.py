"""`rlfr fit-flow`: a network learns the velocity field of latents by flow matching.

Reads latents, or a policy and responses whose latents are taken as they are needed; writes ``flow.safetensors`` (the
best by held-out loss) and, beside it, ``flow.fit/``: last flow, optimiser moments, metrics of every step, and the
velocity error by timestep and layer beside its baselines. The fit itself is in ``stages/fitting.py``; several processes
share it out, whose rank 0 writes and speaks.
"""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlfr_cli import console
from rlfr_cli.artifacts.files import read_json, sha256_file
from rlfr_cli.artifacts.flow_file import flow_fingerprint
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.config.fields import to_table
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.engines.ranks import Ranks, open_ranks
from rlfr_cli.errors import OutputInUseError, Stopped, during_work
from rlfr_cli.policy.loading import resolve_placement
from rlfr_cli.stages.fitting import EVALUATION, FILES, Fit
from rlfr_cli.stages.initial_flow import check_neighbours, initial_flow
from rlfr_cli.stages.latent_sequences import LatentSequences, LatentSource
from rlfr_cli.stages.live_latents import open_live_latents


def run(config: FitFlowConfig) -> dict[str, Any] | None:
    """Fit a flow; returns a summary, and None in all processes but the first.

    Raises:
        RlfrError: anything wrong with config, inputs or output, before work starts.
        Stopped: Ctrl-C or SIGTERM; the state of the last evaluation is kept.
    """
    with open_ranks(
        resolve_placement(config.device, config.dtype).device,
        timeout=timedelta(minutes=config.training.collective_timeout),
    ) as ranks:
        if not ranks.alone:
            config = replace(config, device=str(ranks.device))
            # What is said once is said by rank 0; errors are said by whoever meets them.
            console.set_quiet(console.is_quiet() or not ranks.is_first)
        return _run(config, ranks)


def _run(config: FitFlowConfig, ranks: Ranks) -> dict[str, Any] | None:
    data = _open_data(config, ranks)
    training, heldout = data.split(config.holdout_fraction, config.max_holdout_sequences, config.seed)
    header, initial = initial_flow(config, data)
    data = data.for_flow(initial)
    check_neighbours(header, data, training)
    total_steps = config.optimiser.steps
    if total_steps is None:
        total_steps = math.ceil(config.optimiser.epochs * len(training) / config.optimiser.sequences_per_step)
    facts = _facts_of_output(config, data)
    _check_output(config, facts)
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
    if config.dry_run:
        return {"dry_run": True, **plan, "bytes": 4 * parameters} if ranks.is_first else None
    folder, complete = _open_output(config, facts, ranks)
    if not complete:
        fit = Fit(config, data, training, heldout, header, initial, total_steps, fit_folder_of(config.out), ranks)
        with during_work(), nullcontext() if ranks.is_first else suppress(Stopped):
            fit.run()
            if folder is not None:
                folder.finish({"flow": flow_fingerprint(config.out)})
    return {**plan, **_results(config)} if ranks.is_first else None


def _open_data(config: FitFlowConfig, ranks: Ranks) -> LatentSource:
    if not config.latents:
        return open_live_latents(config)
    if config.unused_options and ranks.is_first:
        console.warn(f"LATENTS are read as they are: {', '.join(config.unused_options)} has no effect")
    return LatentSequences(config.latents, config.optimiser.max_sequence_tokens)


def _facts_of_output(config: FitFlowConfig, data: LatentSource) -> dict[str, Any]:
    """What `stage.json` says of this fit; not how many processes share it out, which changes no artifact."""
    inputs = dict(data.inputs)
    if config.init_from is not None:
        inputs["init_from"] = sha256_file(config.init_from)
    return {
        "kind": "flow-fit",
        "config": to_table(config, for_artifact=True),
        "inputs": inputs,
        "seed": config.seed,
        "num_units": 0,
        "files": FILES,
    }


def _check_output(config: FitFlowConfig, facts: dict[str, Any]) -> None:
    """Refuse an output that is in use; writes nothing, so that every rank may look and say the same."""
    fit_folder = fit_folder_of(config.out)
    if config.out.is_dir():
        raise OutputInUseError(f"{config.out} is a folder, and a file is to be written", hint="give another --out")
    if config.out.exists() and not (fit_folder / "stage.json").exists() and not config.overwrite:
        raise OutputInUseError(
            f"{config.out} exists, and nothing beside it says how it was fitted",
            hint="give --overwrite to replace it, or another --out",
        )
    StageFolder.check_for_writing(fit_folder, **facts, overwrite=config.overwrite)


def _open_output(config: FitFlowConfig, facts: dict[str, Any], ranks: Ranks) -> tuple[StageFolder | None, bool]:
    """The fit's folder, at rank 0 alone, and whether all is done already."""
    fit_folder, folder = fit_folder_of(config.out), None
    ranks.barrier()  # every rank has looked before rank 0 changes anything
    if ranks.is_first:
        folder = StageFolder.open_for_writing(fit_folder, **facts, overwrite=config.overwrite)
    complete = ranks.broadcast(folder is not None and folder.complete)
    if complete and not config.out.exists():
        raise OutputInUseError(
            f"{fit_folder} is complete, but {config.out} is gone", hint="give --overwrite to fit it again"
        )
    if complete:
        console.log(f"{config.out} is complete already; nothing to do")
    return folder, complete


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
