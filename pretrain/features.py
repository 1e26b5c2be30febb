"""`voxelith features`: an encoder over a folder of scans, one after the other.

A map is kept in the .npz of its scan: `map` [E, d, h, w], `affine` and `spacing` of cells, `vector`
[E] and `about`, JSON that says whose features these are and how windows and cells were pooled. A
table of vectors alone is a .parquet with a row per scan and `about` in its metadata.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_prep.errors import InputError, attempt, named
from data_prep.files import atomic, make_folder
from data_prep.images import Reject
from data_prep.layouts.case import stem
from data_prep.progress import bar
from data_prep.scans import by_case, read_scan, refuse_shared, scan_files, unknown_modality
from pretrain.device import chosen_device
from pretrain.encoder import Corner, Encoder, Features, load_encoder
from pretrain.settings import FeaturesSettings

COLUMNS = {
    "file": pa.string(),
    "modality": pa.list_(pa.string()),
    "cells": pa.list_(pa.int32(), 3),
    "spacing": pa.list_(pa.float64(), 3),
    "vector": pa.list_(pa.float32()),
}

PATIENCE = 10
"""Seconds of a scan before its windows are counted too."""

SAVE_SECONDS = 60
"""A table is written anew after as many: what kills a program leaves it no time to."""


@dataclass(frozen=True)
class Extracted:
    """What `features` did: scans that it saw, and per input left out the reason."""

    written: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    there: list[str] = field(default_factory=list)
    """Scans whose features were there, with `resume`."""


def features(settings: FeaturesSettings) -> Extracted:
    """Features of a scan, or of every scan below a folder; names are those of the inputs.

    What cannot be read is left out, and the rest is done. A table is written each minute and at its
    end, so one that was killed lacks the rows of the last minute.

    Raises:
        InputError: no such encoder, no scan that can be read, results of several scans would have
            one name, the output lies in the input, or has features of another encoder.
    """
    names, encoder = _opened(settings)
    source, output = settings.input, settings.output
    table = output.suffix == ".parquet"
    folder = source.parent if source.is_file() else source
    cases, left_out = by_case(names, encoder.module.in_channels)
    maps = {name: output / f"{_stem(name)}.npz" for name in cases}
    refuse_shared(folder, {} if table else maps)
    about = _about(encoder, settings.overlap)
    if settings.modality is not None:
        about["modality"] = settings.modality
    rows = _read_table(output, about) if table and settings.resume else {}
    into = output.parent if table or output.suffix == ".npz" else output
    make_folder(into, "output")
    found = Extracted(left_out=left_out)
    saved = time.monotonic()
    try:
        for name, files in bar(iterable=cases.items(), desc="features", unit="scan"):
            target = output if output.suffix == ".npz" else maps[name]
            if settings.resume and (str(name) in rows if table else _is_done(target, about)):
                found.there.append(str(name))
                continue
            try:
                volume = read_scan(
                    [folder / one for one in files], encoder.config["modalities"], settings.modality
                )
                seen = encoder.see(volume, overlap=settings.overlap, each=_shown)
            except Reject as reject:
                left_out[str(name)] = str(reject)
                continue
            if table:
                rows[str(name)] = _row(str(name), volume.modality, seen)
                if time.monotonic() - saved > SAVE_SECONDS:
                    _write_table(output, rows, about)
                    saved = time.monotonic()
            else:
                _write_map(target, seen, about)
            found.written.append(str(name))
    finally:  # an interrupted folder keeps the rows that it has
        if table and found.written:
            _write_table(output, rows, about)
    if not found.written and not found.there:
        raise InputError([f"{folder / name}: {why}" for name, why in left_out.items()])
    return found


def _opened(settings: FeaturesSettings) -> tuple[list[Path], Encoder]:
    """The files of scans and the encoder; all that is wrong with settings is raised together."""
    source, output = settings.input, settings.output
    problems: list[str] = []
    alone = source.is_file()
    names = [Path(source.name)] if alone else scan_files(source)
    if not source.exists():
        problems.append(f"input={source}: is not there; give a NIfTI or a folder of them")
    elif not names:
        problems.append(f"input={source}: holds no .nii or .nii.gz file, nor NRRD or MetaImage")
    if output.suffix == ".npz" and not alone:
        problems.append(
            f"output={output}: one file for the scans of a folder; give a folder, or a .parquet "
            "for their vectors"
        )
    if not alone and output.resolve().is_relative_to(source.resolve()):
        problems.append(f"output={output}: lies in the input folder; choose another")
    device = attempt(problems, chosen_device, settings.device) or torch.device("cpu")
    encoder = attempt(
        problems, named, "ckpt", settings.ckpt, lambda p: load_encoder(p, device=device)
    )
    if encoder is not None:
        problems += unknown_modality(settings.modality, encoder.config["modalities"])
    if problems or encoder is None:
        raise InputError(problems)
    return names, encoder


def _shown(corners: Sequence[Corner]) -> Iterable[Corner]:
    """The windows of a scan that takes long, as a bar of its own."""
    return bar(iterable=corners, desc="windows", unit="window", leave=False, delay=PATIENCE)


def _about(encoder: Encoder, overlap: float) -> dict[str, Any]:
    """Whose features these are, and what was pooled how. No path is in it."""
    return {
        "encoder": encoder.config["name"],
        "digest": encoder.digest,
        "window": list(encoder.config["crop_size"]),
        "overlap": overlap,
        "map": "deepest map; a cell is the mean over the windows that see it",
        "vector": "mean over the cells of the map",
        "axes": "map [E, d, h, w], cells run to S, P, L; affine maps (d, h, w) to RAS millimetres",
    }


def _stem(name: Path) -> Path:
    return name.with_name(stem(name))


def _write_map(path: Path, seen: Features, about: dict[str, Any]) -> None:
    make_folder(path.parent, "output")
    with atomic(path) as file:
        np.savez(
            file,
            map=seen.map,
            affine=seen.affine,
            spacing=np.array(seen.spacing),
            vector=seen.vector,
            about=np.array(json.dumps(about)),
        )


def _is_done(path: Path, about: dict[str, Any]) -> bool:
    """Whether a map is there.

    Raises:
        InputError: it is another encoder's, or no map at all.
    """
    if not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            there = json.loads(str(file["about"]))
    except Exception as error:
        raise InputError(f"{path}: holds no features ({error}); move it away") from error
    _check_same(path, there, about)
    return True


def _check_same(path: Path, there: Any, about: dict[str, Any]) -> None:
    if there != about:
        theirs = there if isinstance(there, dict) else {}
        differ = [f"{k}: {theirs.get(k)} -> {v}" for k, v in about.items() if theirs.get(k) != v]
        raise InputError(
            f"{path}: has other features ({'; '.join(differ)}); choose another output, or "
            "resume=false to write over them"
        )


def _row(name: str, modality: tuple[str, ...], seen: Features) -> dict[str, Any]:
    return {
        "file": name,
        "modality": list(modality),
        "cells": list(seen.map.shape[1:]),
        "spacing": list(seen.spacing),
        "vector": seen.vector,
    }


def _read_table(path: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        found = pq.read_table(path)
        there = json.loads((found.schema.metadata or {})[b"voxelith"])
        rows = {row["file"]: row for row in found.select(list(COLUMNS)).to_pylist()}
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(f"output={path}: holds no table of features ({error}); move it") from error
    _check_same(path, there, about)
    return rows


def _write_table(path: Path, rows: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    schema = pa.schema(list(COLUMNS.items()), metadata={"voxelith": json.dumps(about)})
    ordered = [rows[name] for name in sorted(rows)]
    with atomic(path) as file:
        pq.write_table(pa.Table.from_pylist(ordered, schema=schema), file)
