"""`voxelith export`: a run to a release."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.errors import InputError
from data_prep.files import check_free
from data_prep.licences import UNSTATED, strictest_first
from pretrain.arguments import allowed_name, check_arguments, split_target
from pretrain.costs import trained_seconds
from pretrain.decoders import build_decoder, without_head
from pretrain.events import Events
from pretrain.foreign.nnssl_file import adaptation_plan
from pretrain.manifest import FORMAT
from pretrain.objective import Objective
from pretrain.optim import named_moments
from pretrain.release import Release, TrainingState, shapes_of, write_release
from pretrain.run_folder import RunFolder, versions
from pretrain.start import Origin, origin_of, recipe_hash, seen_volumes
from pretrain.train import load_trained


def export(run_path: Path, output: Path, *, full: bool = False, name: str | None = None) -> Release:
    """Writes the encoder of a run with all that its user needs to know.

    Where the objective trained the decoder that segmentation takes, that is written too.

    The release is read back and its golden scan checked before it appears at `output`.

    Args:
        run_path: folder of the run.
        output: folder that is made.
        full: whether the state of its training goes along: heads, teacher and optimiser.
        name: what it is called; None: as its run.

    Raises:
        InputError: no such run, no checkpoint yet, or `output` exists.
    """
    check_free(output)
    run = RunFolder(run_path)
    objective, facts, state = load_trained(run)
    step, trained_on = int(state["step"]), str(state["schedule"]["index_hash"])
    settings = run.config()
    origin = origin_of(run)
    decoder = transferable_decoder(objective)
    fingerprints = {"format": 1, "values": seen_volumes(run, trained_on)}
    config = {
        "format": FORMAT,
        "name": name or run.path.name,
        "kind": "encoder",
        "backbone": _described(objective.released, settings["backbone"], "pretrain.backbones"),
        "objective": _described(objective, settings["objective"], "pretrain.objectives"),
        "crop_size": settings["crop_size"],
        "modalities": sorted(facts["data"]["modality"]),
        "preprocess": facts["preprocess"],
        "training": {
            "steps": step,
            "planned_steps": settings["steps"],
            "batch_size": settings["batch_size"],
            "samples_seen": step * settings["batch_size"],
            "seed": settings["seed"],
            "lr": settings["lr"],
            "optimizer": settings["optimizer"],
            "seconds": _device_seconds(run, settings),
            "metrics": _metrics(run, step),
            "recipe_hash": recipe_hash(settings, trained_on, step, origin),
            **({} if origin is None else {"init": origin.facts()}),
        },
        "data": {**facts["corpus"], **facts["data"]},
        "versions": versions(),
        "decoder": None if decoder is None else _decoder_facts(objective, decoder),
        "transfers": "encoder" if decoder is None else objective.transfers,
    }
    config["backbone"]["args"]["in_channels"] = facts["channels"]
    if facts.get("channel_names"):
        config["channels"] = facts["channel_names"]
    training = None
    if full:
        config["full"] = True
        moments = named_moments(objective, state["optimizer"])
        training = TrainingState(state["objective"], settings["optimizer"], moments)
    return write_release(
        output,
        encoder=objective.released,
        config=config,
        fingerprints=fingerprints,
        card=_card(config, facts, origin),
        decoder=decoder,
        training=training,
        plan=adaptation_plan(config),
    )


def _device_seconds(run: RunFolder, settings: dict[str, Any]) -> float | None:
    """What the training took of each device, one after the other; None where its log is gone.

    A run that was stopped may have gone on with fewer devices, or more.
    """
    machine = settings["trainer"]
    ranks: dict[int, int] = defaultdict(lambda: machine["devices"] * machine["nodes"])
    ranks |= {n: start.ranks for n, start in enumerate(Events(run.path).starts(), 1)}
    seconds = trained_seconds(run.path / "metrics.csv", ranks)
    return None if math.isnan(seconds) else round(seconds, 1)


def _metrics(run: RunFolder, step: int) -> dict[str, float]:
    """The last loss, and what the last look at the features said: spread, rank, probe."""
    loss, look = (_last(run.path / name, step) for name in ("metrics.csv", "health.csv"))
    named = {"loss": loss} | dict.fromkeys(("rank", "probe_dice", "probe_knn"), look)
    return {name: float(row[name]) for name, row in named.items() if row.get(name)}


def _last(log: Path, step: int) -> dict[str, str]:
    """The last row of a log up to a step; empty where there is none."""
    if not log.is_file():
        return {}
    with log.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    return rows[-1] if rows else {}


def _in_words(metrics: Mapping[str, float]) -> str:
    names = {
        "loss": "loss {:.4g}",
        "rank": "RankMe of the tokens {:.3g}",
        "probe_dice": "linear probe {:.1%} Dice",
        "probe_knn": "neighbours' probe {:.1%}",
    }
    said = [text.format(metrics[name]) for name, text in names.items() if name in metrics]
    return ", ".join(said) or "not logged"


def _decoder_facts(objective: Objective, decoder: nn.Module) -> dict[str, Any]:
    blocks = objective.decoder_blocks
    facts = {"out_channels": decoder.out_channels}
    return facts if blocks is None else {**facts, "blocks": blocks}


def transferable_decoder(objective: Objective) -> nn.Module | None:
    """The objective's decoder, if it is the one that finetuning would put on the encoder.

    A decoder whose widths follow from the number of its outputs (Primus') fits no other task, so
    it stays behind, whatever the objective wants.

    Raises:
        InputError: the objective says that the whole network transfers, and has no such decoder.
    """
    decoder = getattr(objective, "decoder", None)
    channels = getattr(decoder, "out_channels", None)
    if isinstance(decoder, nn.Module) and isinstance(channels, int):
        with torch.device("meta"):
            usual = build_decoder(objective.encoder, channels)
            others = [build_decoder(objective.encoder, n) for n in (1, 2, 16)]
        if type(usual) is type(decoder) and shapes_of(usual) == shapes_of(decoder):
            bodies = [without_head(shapes_of(one)) for one in (usual, *others)]
            return decoder if all(body == bodies[0] for body in bodies) else None
    if objective.transfers == "network":
        raise InputError(
            f"{type(objective).__name__}: says that the whole network transfers, and its `decoder` "
            "is not the one that build_decoder(encoder, out_channels) makes; use that one"
        )
    return None


def _described(module: Any, config: dict[str, Any], package: str) -> dict[str, Any]:
    _, arguments = split_target(config)
    values, _ = check_arguments(type(module), arguments, package, ("encoder",))
    return {"name": allowed_name(type(module), package), "args": values}


def _decoder_words(config: dict[str, Any]) -> str:
    if config["decoder"] is None:
        return "none: finetuning begins with a new one"
    blocks = config["decoder"].get("blocks")
    if blocks is not None:
        return (
            f"`decoder.safetensors` has its first {blocks} blocks from the coarsest; finetuning "
            "takes them over and begins with a new rest"
        )
    if config["transfers"] == "network":
        return "`decoder.safetensors`; finetuning takes it over but for its head"
    return "`decoder.safetensors`; finetuning takes it over with `transfer=network`"


def _training_words(config: dict[str, Any]) -> str:
    if not config.get("full"):
        return ""
    return (
        "\n| full | `training.safetensors` has the whole objective and the moments of "
        f"{config['training']['optimizer']}; `pretrain init=... init_moments=true` goes on with "
        "all of it |"
    )


def _took(seconds: float | None) -> str:
    return "" if seconds is None else f", {seconds / 3600:.3g} device hours"


def _counted(name: str, count: int | None) -> str:
    return f"what {name} does not tell" if count is None else f"{name} ({count})"


def _card(config: dict[str, Any], facts: dict[str, Any], origin: Origin | None) -> str:
    data, training = config["data"], config["training"]
    before = [] if origin is None else origin.data
    # Trainings may share volumes, so what came before is listed, not added.
    licence: dict[str, int | None] = {}
    for one in [*reversed(before), data]:
        licence |= one.get("licence", {})
    licences = strictest_first(licence)
    sources = "\n".join(f"| {name} | {count} |" for name, count in sorted(data["source"].items()))
    spacing = config["preprocess"]["operations"][1].get("spacing_mm")
    grid = f"resampled to {spacing} mm" if spacing else "kept at its own spacing"
    listed = "\n".join(
        f"- {name}" + ("" if licence[name] is None else f": {licence[name]} volumes")
        for name in licences
    )
    began = ""
    if origin is not None:
        seen = "; ".join(
            ", ".join(_counted(name, n) for name, n in sorted(one.get("source", {}).items()))
            for one in before
        )
        began = (
            f"\n| begins from | `{origin.name}`, digest {origin.digest[:12]}, trained on {seen} |"
        )
    return f"""# {config["name"]}

A 3D encoder pretrained without labels by Voxelith.

```python
import voxelith

encoder = voxelith.load_encoder("path/to/this/folder")
features = encoder.features("scan.nii.gz")
features.map, features.affine, features.vector
```

**Strictest licence of the training data: {licences[0] if licences else UNSTATED}.**
Whether weights inherit the licence of their data is for you to judge; all of them are below.

| | |
| --- | --- |
| architecture | `{config["backbone"]["name"]}`, {facts["parameters"]:,} parameters |
| objective | `{config["objective"]["name"]}` |
| modalities | {", ".join(config["modalities"])} |
| training | {training["steps"]} of {training["planned_steps"]} steps of {training["batch_size"]} \
crops of {config["crop_size"]} voxels, seed {training["seed"]}{_took(training["seconds"])} |
| at its end | {_in_words(training["metrics"])} |
| volumes | {data["samples"]} (corpus index {data["index_hash"][:12]}) |{began}
| decoder | {_decoder_words(config)} |{_training_words(config)}
| a scan is | turned to S, P, L axes and {grid}; intensities as in config.json |

## Data

| source | volumes |
| --- | --- |
{sources}

Licences, strictest first:

{listed}

`fingerprints.json` holds hashes of these volumes: finetuning compares its test scans with them.

## Limits

Trained for research. What it is worth on your task is not known before it is measured beside the
same network from scratch (`voxelith finetune ckpt=... init=pretrained` and `init=scratch`). A
pretraining's loss, rank and probe tell whether it was healthy, and nothing about that. Modalities,
bodies and scanners that are not in the tables above were not seen.
"""
