"""`voxelith export`: a run to a release; one that was finetuned becomes a segmenter's.

A segmenter's release is an encoder's release whose decoder carries its head, and whose config says
what it segments: features, further finetuning and the leakage gate take it as any other.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.licences import strictest_first
from finetune.evaluate import comparable
from finetune.rows import Row, read_rows
from finetune.segmenter import (
    Segmenter,
    check_golden_segmenter,
    golden_scores,
    load_segmenter,
    read_model_file,
)
from finetune.settings import SegmentationFacts
from pretrain import export as pretraining
from pretrain.manifest import FORMAT
from pretrain.release import Release, load_release, write_release
from pretrain.run_folder import RunFolder, versions

UNKNOWN = "unknown"
"""A fingerprint that equals none: what the weights were pretrained on is not fully known."""


def export(run_path: Path, output: Path) -> Release:
    """Writes the network of a run, pretrained or finetuned, with all that its user needs to know.

    The release is read back, and its golden scan checked, before it appears at `output`.

    Raises:
        InputError: no such run, it is not finished, `output` exists, or the corpus or checkpoint
            that it was made with is not there any more: their fingerprints are needed.
    """
    run = RunFolder(run_path)
    config = run.config()
    if "task" not in config:
        return pretraining.export(run_path, output)
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: already exists; choose another folder or remove it")
    if not (run_path / "rows.csv").is_file():
        raise InputError(
            f"{run_path}: is not finished, it has no rows.csv; run `voxelith finetune` again, it "
            "goes on from its last checkpoint"
        )
    segmenter = load_segmenter(run_path, "cpu")
    facts = json.loads((run_path / "run.json").read_text())
    corpus, start = _corpus(config, facts, run_path), _start(config, facts, run_path)
    described = _config(run_path, config, facts, corpus, start, segmenter)
    return write_release(
        output,
        encoder=segmenter.model.encoder,
        decoder=segmenter.model.decoder,
        config=described,
        fingerprints={"format": 1, "values": _fingerprints(corpus, facts["label_keys"], start)},
        card=_card(described, segmenter),
        outputs=lambda folder: golden_scores(segmenter, folder),
        check=check_golden_segmenter,
    )


def _corpus(config: Mapping[str, Any], facts: Mapping[str, Any], run: Path) -> Corpus:
    corpus = Corpus.open(Path(config["corpus"]))
    trained_on = str(facts["corpus"]["index_hash"])
    if corpus.index_hash != trained_on:
        raise InputError(
            f"{corpus.path}: is not the corpus that {run} was finetuned on (index hash "
            f"{corpus.index_hash[:12]}, the run says {trained_on[:12]}); its fingerprints are "
            "needed: restore it"
        )
    return corpus


def _start(config: Mapping[str, Any], facts: Mapping[str, Any], run: Path) -> Release | None:
    """The release that the weights began from; None from scratch."""
    if config["init"] != "pretrained":
        return None
    release = load_release(config["ckpt"])
    digest = str(facts["release"]["digest"])
    if release.digest != digest:
        raise InputError(
            f"{release.path}: is not the release that {run} began from (digest "
            f"{release.digest[:12]}, the run says {digest[:12]}); restore it"
        )
    return release


def _fingerprints(corpus: Corpus, keys: Sequence[str], start: Release | None) -> list[str]:
    """Of all volumes that the weights have seen, and a mark where that is not known."""
    known = corpus.scan_prints()
    values: set[str] = set().union(*(known[key] for key in keys))
    if start is not None:
        before = start.fingerprints
        values |= before
        if comparable(before) is None:
            values.add(UNKNOWN)
    return sorted(values)


def _config(
    path: Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    corpus: Corpus,
    start: Release | None,
    segmenter: Segmenter,
) -> dict[str, Any]:
    stored = read_model_file(path)
    segmentation = stored.model_dump(mode="json", include=set(SegmentationFacts.model_fields))
    fits_others = pretraining.transferable_decoder(segmenter.model) is not None
    trained = facts.get("trained", facts["recipe"])
    return {
        "format": FORMAT,
        "name": path.resolve().name,
        "kind": "segmenter",
        "backbone": stored.backbone.model_dump(mode="json"),
        "objective": {"name": "finetune.segmentation.Segmentation", "args": {}},
        "crop_size": list(segmenter.window),
        "modalities": list(segmenter.modalities),
        "preprocess": segmenter.preprocess.to_dict(),
        "training": {
            "init": config["init"],
            "began_from": None if start is None else {"name": start.name, "digest": start.digest},
            "steps": trained["steps"],
            "batch_size": trained["batch_size"],
            "lr": trained["lr"],
            "seed": config["seed"],
            "labels": config["labels"],
            "labelled_cases": len(facts["label_keys"]),
            "config_hash": facts["identity"]["config_hash"],
            "scores": _scores(read_rows(path / "rows.csv")),
        },
        "data": _data(corpus, facts["label_keys"], start),
        "versions": versions(),
        "decoder": {"out_channels": len(segmenter.task.classes) + 1},
        "transfers": "network" if fits_others else "encoder",
        "segmentation": segmentation,
    }


def _data(corpus: Corpus, keys: Sequence[str], start: Release | None) -> dict[str, Any]:
    """Counts of all volumes that the weights have seen, pretraining included."""
    cases = [corpus.meta(corpus.position(key)) for key in keys]
    counts: dict[str, Counter[str]] = {
        "modality": Counter(case["channels"][0]["modality"] for case in cases),
        "source": Counter(case["source"] for case in cases),
        "licence": Counter(case["licence"] for case in cases),
    }
    samples = len(cases)
    if start is not None:
        before = start.config["data"]
        for name, counter in counts.items():
            told = before.get(name)
            counter.update(told if isinstance(told, dict) else {"not stated by the checkpoint": 1})
        told = before.get("samples")
        samples += told if isinstance(told, int) else 0
    return {
        "index_hash": corpus.index_hash,
        "samples": samples,
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
    }


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean Dice of each class over the cases that can be believed, and how many those are."""
    names = list(dict.fromkeys(row.class_name for row in rows))
    believed = [row for row in rows if row.status not in ("tainted", "unknown")]
    classes = {}
    for name in names:
        dice = [r.dsc for r in believed if r.class_name == name and not math.isnan(r.dsc)]
        classes[name] = {"dice": sum(dice) / len(dice) if dice else None, "cases": len(dice)}
    return {
        "part": rows[0].split if rows else "",
        "cases": len({row.case for row in rows}),
        "tainted": len({row.case for row in rows if row.status == "tainted"}),
        "unknown": len({row.case for row in rows if row.status == "unknown"}),
        "classes": classes,
    }


def _card(config: Mapping[str, Any], segmenter: Segmenter) -> str:
    data, training, scores = config["data"], config["training"], config["training"]["scores"]
    licences = strictest_first(data["licence"])
    listed = "\n".join(f"- {name}: {data['licence'][name]} volumes" for name in licences)
    sources = "\n".join(f"| {name} | {count} |" for name, count in data["source"].items())
    task, lines = segmenter.task, []
    # A task with regions is scored in those; what is written are its classes.
    for group, written in ((task.classes, True), (task.regions, False)):
        for chosen in group:
            found = scores["classes"].get(chosen.name) if group == task.scored else None
            dice = "none" if not found or found["dice"] is None else f"{100 * found['dice']:.1f}"
            values = ", ".join(map(str, chosen.values))
            lines.append(
                f"| {chosen.values[0] if written else '–'} | {chosen.name} | {values} | {dice} "
                f"| {found['cases'] if found else 0} |"
            )
    table = "\n".join(lines)
    begun = training["began_from"]
    start = f"`{begun['name']}`, digest {begun['digest'][:12]}" if begun else "random weights"
    parameters = sum(p.numel() for p in segmenter.model.parameters())
    doubt = ""
    if scores["tainted"] or scores["unknown"]:
        doubt = (
            f"\nLeft out: {scores['tainted']} cases that pretraining had seen, {scores['unknown']} "
            "of which that is not known.\n"
        )
    return f"""# {config["name"]}

A segmentation network for the task `{segmenter.task.name}`, finetuned by Voxelith.

```
voxelith predict ckpt=path/to/this/folder input=scans/ output=labels/
```

**Strictest licence of the training data: {licences[0] if licences else "not stated"}.**
Whether weights inherit the licence of their data is for you to judge; all of them are below.

| | |
| --- | --- |
| architecture | `{config["backbone"]["name"]}`, {parameters:,} parameters with its decoder |
| begins from | {start} |
| modalities | {", ".join(config["modalities"])} |
| training | {training["steps"]} steps of {training["batch_size"]} crops of \
{config["crop_size"]} voxels on {training["labelled_cases"]} labelled cases, \
seed {training["seed"]} |
| a scan is | seen by windows of {config["crop_size"]} voxels, overlap {segmenter.overlap}, \
{"mirrored too" if segmenter.tta else "not mirrored"}; spacing and intensities as in config.json |

## Scores

Dice on the part {scores["part"]} of the labelled corpus. One run: one label draw and one start, so
there is no interval.

| written | class | label values | Dice | cases |
| --- | --- | --- | --- | --- |
{table}
{doubt}
## Data

| source | volumes |
| --- | --- |
{sources}

Licences, strictest first:

{listed}

`fingerprints.json` holds hashes of these volumes, those of pretraining among them.

## Limits

Trained for research; no medical device. On other scanners, protocols and patients than those it was
scored on it may fail without a sign.
"""
