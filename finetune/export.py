"""`voxelith export`: a run to a release; a finetuned one to a segmenter's, or an answerer's.

A finetuned network's release is an encoder's release whose decoder carries its head, and whose
config says what it segments or answers: features, further finetuning and the leakage gate take it
as any other.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.corpus import Corpus
from data_prep.errors import InputError, near
from data_prep.files import check_free, read_table
from data_prep.licences import UNSTATED
from finetune.answerer import Answerer
from finetune.cards import card
from finetune.cells import score_in_words
from finetune.evaluate import comparable
from finetune.lines import metrics_of
from finetune.model_file import (
    check_golden_network,
    golden_answers,
    load_network,
    read_model_file,
    task_outputs,
)
from finetune.rows import Row, read_rows
from finetune.segmenter import Segmenter
from finetune.settings import TaskFacts
from pretrain import export as pretraining
from pretrain.adopt import adopt
from pretrain.fetch import resolve
from pretrain.forms import FORMS
from pretrain.manifest import FACTS, FORMAT
from pretrain.release import Release, load_release, write_release
from pretrain.run_folder import RunFolder, versions
from pretrain.settings import checked_name

UNKNOWN = "unknown"
"""A fingerprint that equals none: what the weights were pretrained on is not fully known."""


RELEASES = ("release", "full")
"""Forms of an export that are releases."""


def export(
    ref: str | Path, output: Path, form: str = "release", told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes a run, a release or a file of public weights in a form that others take.

    Args:
        ref: folder of a run or of a release; a file of public weights; a reference or a name of
            either.
        output: folder that is made.
        form: a release, the `full` one of a pretraining with its training's state, or one of
            `pretrain.forms`.
        told: what a file of public weights does not say; see `pretrain.adopt`. Of a run its
            `name`, which is that of its folder otherwise.

    Returns:
        What was written: of a release its folder and digest.

    Raises:
        InputError: as `export_run` and `pretrain.adopt.adopt`; there is no such form, or none of
            what `ref` is.
    """
    forms = (*RELEASES, *FORMS)
    if form not in forms:
        raise InputError(f"form={form}: no such form; {near(form, forms)}")
    folder = resolve(ref)
    is_release = (folder / "SHA256SUMS").is_file()
    told = dict(told or {})
    name = _named(told.pop("name", None)) if folder.is_dir() and not is_release else None
    if folder.is_dir() and told:
        kind = "release" if is_release else "run"
        raise InputError(
            f"{', '.join(told)}: is for files of public weights (name for runs too), and {ref} is "
            f"a {kind}"
        )
    if form in RELEASES:
        if is_release:
            raise InputError(f"{ref}: is a release; form={'|'.join(FORMS)} makes others of it")
        if form == "full" and not folder.is_dir():
            raise InputError(f"form=full: {ref} is a file of weights, without a training")
        made = _released(ref, folder, output, told, name, full=form == "full")
        return {"release": str(made.path), "digest": made.digest}
    if is_release:
        return FORMS[form](load_release(folder), output)
    with tempfile.TemporaryDirectory() as between:
        return FORMS[form](_released(ref, folder, Path(between) / "release", told, name), output)


def _released(
    ref: str | Path,
    folder: Path,
    output: Path,
    told: dict[str, Any],
    name: str | None,
    *,
    full: bool = False,
) -> Release:
    if folder.is_dir():
        return export_run(folder, output, full=full, name=name)
    return adopt(ref, output, told)


def _named(name: str | None) -> str | None:
    try:
        return None if name is None else checked_name(str(name))
    except ValueError as error:
        raise InputError(f"name={name}: {error}") from error


def export_run(
    run_path: Path, output: Path, *, full: bool = False, name: str | None = None
) -> Release:
    """Writes the network of a run, pretrained or finetuned, with all that its user needs to know.

    The release is read back, and its golden scan checked, before it appears at `output`.

    Args:
        run_path: folder of the run.
        output: folder that is made.
        full: of a pretraining: heads, teacher and optimiser too.
        name: what it is called; None: as its run.

    Raises:
        InputError: no such run, it is not finished, `output` exists, or the corpus or checkpoint
            that it was made with is not there any more: their fingerprints are needed.
    """
    run = RunFolder(run_path)
    config = run.config()
    if "task" not in config:
        return pretraining.export(run_path, output, full=full, name=name)
    if full:
        raise InputError(
            f"form=full: {run_path} is a finetuning, whose release is all of its network; leave "
            "form out"
        )
    check_free(output)
    if not (run_path / "rows.csv").is_file():
        raise InputError(
            f"{run_path}: is not finished, it has no rows.csv; run `voxelith finetune` again, it "
            "goes on from its last checkpoint"
        )
    network = load_network(run_path, "cpu")
    facts = read_table(run_path / "run.json")
    corpus, start = _corpus(config, facts, run_path), _start(config, facts, run_path)
    described = _config(run_path, config, facts, corpus, start, network, name)
    return write_release(
        output,
        encoder=network.model.encoder,
        decoder=network.model.decoder,
        config=described,
        fingerprints={"format": 1, "values": _fingerprints(corpus, facts["label_keys"], start)},
        card=card(described, network),
        outputs=lambda folder: golden_answers(network, folder),
        check=check_golden_network,
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
    network: Segmenter | Answerer,
    name: str | None,
) -> dict[str, Any]:
    stored = read_model_file(path)
    told = stored.model_dump(mode="json", include=set(TaskFacts.model_fields))
    kind = "answerer" if isinstance(network, Answerer) else "segmenter"
    # The head of an answerer is no decoder of voxels.
    fits_others = kind == "segmenter" and pretraining.transferable_decoder(network.model)
    trained = facts.get("trained", facts["recipe"])
    return {
        "format": FORMAT,
        "name": name or path.resolve().name,
        "kind": kind,
        "backbone": stored.backbone.model_dump(mode="json"),
        "objective": {"name": _objective(network), "args": {}},
        "crop_size": list(network.window),
        "modalities": list(network.modalities),
        **({"channels": list(corpus.channel_names)} if corpus.channel_names else {}),
        "preprocess": network.preprocess.to_dict(),
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
        "decoder": {"out_channels": task_outputs(stored)},
        "transfers": "network" if fits_others else "encoder",
        FACTS[kind]: told,
    }


def _objective(network: Segmenter | Answerer) -> str:
    kind = type(network.model)
    return f"{kind.__module__}.{kind.__name__}"


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
        for name, counter in counts.items():
            before: Counter[str] = Counter()
            for one in start.trainings:
                told = one.get(name)
                told = told if isinstance(told, dict) else {f"{UNSTATED} by the checkpoint": 1}
                # Trainings may share volumes, so the most counts. Where a count is not told there
                # was one at least.
                before |= Counter({value: _counted(number) or 1 for value, number in told.items()})
            counter.update(before)
        samples += max(_counted(one.get("samples")) for one in start.trainings)
    return {
        "index_hash": corpus.index_hash,
        "samples": samples,
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
    }


def _counted(told: object) -> int:
    return told if isinstance(told, int) else 0


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Scores over the cases that can be believed, and how many those are.

    Mean Dice of each class; of a task of whole scans the main score in words.
    """
    believed = [row for row in rows if row.status not in ("tainted", "unknown")]
    if rows and metrics_of(rows)[0].of_scans:
        told = score_in_words(believed) if believed else "No score"
        return {**_counts(rows), "score": told}
    classes = {}
    for name in dict.fromkeys(row.class_name for row in rows):
        dice = [r.dsc for r in believed if r.class_name == name and not math.isnan(r.dsc)]
        classes[name] = {"dice": sum(dice) / len(dice) if dice else None, "cases": len(dice)}
    return {**_counts(rows), "classes": classes}


def _counts(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "part": rows[0].split if rows else "",
        "cases": len({row.case for row in rows}),
        "tainted": len({row.case for row in rows if row.status == "tainted"}),
        "unknown": len({row.case for row in rows if row.status == "unknown"}),
    }
