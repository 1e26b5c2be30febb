"""`voxelith inspect`: what a run, a release or a file of public weights is.

Folders need no torch, so the answer is at once.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.files import file_digest, read_table
from data_prep.licences import strictest_first
from pretrain.manifest import DECODER, FACTS, Manifest, read_manifest, stored_shapes

FULL = "heads, teacher and optimiser are there: pretrain init=... init_moments=true goes on"


def describe(ref: Path, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What lies in a folder or a file, as plain data.

    A release is verified byte by byte on the way; a run is taken at its word. A file of others'
    weights is read whole, and loaded into the encoder that it is here.

    Args:
        ref: run, release or file.
        told: what a file of public weights does not tell; see `pretrain.foreign.open_foreign`.

    Raises:
        InputError: the folder is neither a run nor a release, or the file no public weights.
        CorruptionError: a release whose bytes are not those that were released.
    """
    if ref.is_file():
        return _file(ref, told)
    if told:
        raise InputError(
            f"{', '.join(told)}: is for files of public weights, and {ref} is a folder"
        )
    if (ref / "SHA256SUMS").is_file():
        return _release(read_manifest(ref))
    if (ref / "run.json").is_file() and (ref / "config.json").is_file():
        return _run(ref)
    raise InputError(
        f"{ref}: is neither a release (no SHA256SUMS) nor a run (no run.json); give a folder that "
        "`voxelith export`, `voxelith pretrain` or `voxelith finetune` made, or a file of public "
        "weights"
    )


def as_text(facts: Mapping[str, Any]) -> str:
    """Facts as lines of a name and a value; nested ones are indented."""
    return "\n".join(_lines(facts, 0))


def _release(release: Manifest) -> dict[str, Any]:
    from data_prep.sketch import PREFIX  # scipy is slow to load

    config = release.config
    weights = {"encoder": _count(release.path / "model.safetensors")}
    if release.has_decoder:
        weights["decoder"] = _count(release.path / DECODER)
    return {
        "path": str(release.path),
        "kind": f"release of a{'' if release.kind == 'segmenter' else 'n'} {release.kind}",
        "name": release.name,
        "digest": release.digest,
        "architecture": config["backbone"],
        "parameters": weights,
        "decoder": _decoder(release),
        **({"full": FULL} if release.is_full else {}),
        "objective": config["objective"]["name"],
        "modalities": list(release.modalities),
        "crop_size": list(release.crop_size),
        "preprocess": config["preprocess"]["operations"],
        **_task(config[FACTS[release.kind]] if release.kind in FACTS else None),
        "training": _training(config["training"]),
        **_data(config["data"]),
        "fingerprints": sum(not one.startswith(PREFIX) for one in release.fingerprints),
        "versions": config["versions"],
    }


def _file(path: Path, told: Mapping[str, Any] | None) -> dict[str, Any]:
    from pretrain.foreign import open_foreign

    found = open_foreign(path, told)
    report, untold = found.report, "the file does not tell"
    return {
        "path": str(path),
        "kind": "public weights of others",
        "layout": found.layout,
        "digest": file_digest(path),
        "architecture": found.backbone,
        "parameters": {"encoder": sum(tensor.numel() for tensor in found.state.values())},
        "preprocess": found.preprocessing or untold,
        "training": untold,
        "data": untold,
        "licences": f"{untold}: ask where it is from",
        "tensors": _tensors(report.to_dict()),
        "next": f"voxelith pretrain init={path} begins from it, with this architecture as backbone",
    }


def _training(training: Mapping[str, Any]) -> dict[str, Any]:
    """Of public weights that were made a release, what became of each tensor is told in short."""
    tensors = training.get("tensors")
    if not isinstance(tensors, dict):
        return dict(training)
    return {**training, "tensors": _tensors(tensors)}


def _tensors(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "copied": len(report.get("copied", ())),
        "adapted": report.get("adapted", {}),
        "left out": dict(Counter(map(_in_short, report.get("skipped", {}).values()))),
        "of one value throughout": list(report.get("constant", ())),
    }


def _in_short(why: str) -> str:
    return "stored once more under another name" if why.startswith("second name of ") else why


def _run(path: Path) -> dict[str, Any]:
    config, facts = read_table(path / "config.json"), read_table(path / "run.json")
    finetuned = "task" in config
    found: dict[str, Any] = {
        "path": str(path),
        "kind": f"{'finetuning' if finetuned else 'pretraining'} run",
        "name": path.resolve().name,
        "parameters": {"network" if finetuned else "encoder": facts.get("parameters")},
        "crop_size": config.get("crop_size"),
    }
    names = ("init", "labels", "seed", "steps", "batch_size", "optimizer", "lr")
    training = {name: config[name] for name in names if name in config}
    if not finetuned:
        backbone, objective = dict(config["backbone"]), dict(config["objective"])
        steps = sorted((path / "checkpoints").glob("step-*.pt"))
        training["newest_checkpoint"] = steps[-1].name if steps else None
        return found | {
            "architecture": {"name": backbone.pop("_target_", ""), "args": backbone},
            "objective": objective.get("_target_"),
            "preprocess": facts.get("preprocess", {}).get("operations"),
            "training": training,
            **_data({**facts.get("corpus", {}), **facts.get("data", {})}),
            "versions": facts.get("versions"),
        }
    training["finished"] = (path / "rows.csv").is_file()
    training["labelled_cases"] = len(facts.get("label_keys", ()))
    stored = read_table(path / "model.json") if (path / "model.json").is_file() else {}
    return found | {
        "architecture": stored.get("backbone"),
        "decoder": config.get("decoder", "auto"),
        "began_from": facts.get("release"),
        "preprocess": facts.get("recipe", {}).get("preprocess", {}).get("operations"),
        **_task({name: config.get(name) for name in ("task", "overlap", "tta")}),
        "training": training,
        "data": facts.get("corpus"),
        "versions": facts.get("versions"),
    }


def _decoder(release: Manifest) -> str:
    if not release.has_decoder:
        return "none: finetuning begins with a new one"
    outputs = release.config["decoder"]["out_channels"]
    if release.kind == "answerer":
        return f"a head of {outputs} outputs; finetuning begins with a new one"
    takes = "takes it over but for its head" if release.transfers == "network" else "may take it"
    if takes.endswith("head") and release.kind == "segmenter":
        takes += ", which goes along for the same classes"
    if release.decoder_blocks is not None:
        takes = f"takes over its first {release.decoder_blocks} blocks, the rest is new"
    return f"{outputs} outputs; finetuning {takes}"


def _task(facts: Any) -> dict[str, Any]:
    """Of a finetuned network: its classes or what it answers, and how it looks at scans."""
    if not isinstance(facts, dict) or not isinstance(facts.get("task"), dict):
        return {}
    task = facts["task"]
    classes = task.get("classes", ())
    if "target" in task:
        told = ", ".join(map(str, classes)) or task.get("unit")
        said: dict[str, Any] = {"answers": f"{task.get('kind')} of {task['target']}: {told}"}
    else:
        named = {c.get("name"): c.get("values") for c in classes if isinstance(c, dict)}
        said = {"classes": named}
    windows = {name: value for name, value in facts.items() if name != "task"}
    return {"task": task.get("name"), **said, "windows": windows}


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    licences = data.get("licence")
    licences = licences if isinstance(licences, dict) else {}
    ordered = {name: licences[name] for name in strictest_first(licences)}
    rest = {name: value for name, value in data.items() if name != "licence"}
    return {"data": rest, "licences": ordered}


def _count(weights: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    return sum(math.prod(shape) for shape in stored_shapes(weights).values())


def _lines(facts: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in facts.items():
        label = f"{'  ' * depth}{name}"
        if isinstance(value, Mapping) and value:
            lines += [f"{label}:", *_lines(value, depth + 1)]
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            lines.append(f"{label}:")
            lines += [f"{'  ' * (depth + 1)}{json.dumps(item)}" for item in value]
        else:
            shown = "none" if value in (None, {}, []) else value
            lines.append(f"{label:<24} {json.dumps(shown) if isinstance(shown, list) else shown}")
    return lines
