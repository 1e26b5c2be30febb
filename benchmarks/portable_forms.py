"""What each backbone becomes elsewhere, and how far from ours: the table of docs/checkpoints.md.

    python benchmarks/portable_forms.py [--forms torch onnx monai] [--only vit_s ...] [--full]

Every preset of conf/backbone, small unless `--full`, with random weights, as a release that is
written in each form: the sizes that it takes, the largest error of any output, seconds and bytes.
ONNX needs the extra `onnx`. Presets that are the same once they are small come once. All of it is
written to docs/results/portable/SIZE.json with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from line import ROOT

from data_prep.errors import InputError
from data_prep.files import write_json
from pretrain.arguments import split_target
from pretrain.bench import machine
from pretrain.bundle import write_bundle
from pretrain.portable import write_onnx, write_torch_export
from pretrain.release import Release

sys.path.insert(0, str(ROOT / "tests" / "pretrain"))
from tiny_pairs import CROPS, names, preset, shrink
from tiny_releases import tiny_release

FORMS = {"torch": write_torch_export, "onnx": write_onnx, "monai": write_bundle}
OUTPUT = ROOT / "docs" / "results" / "portable"
PACKAGES = ("torch", "monai", "onnx", "onnxruntime")
FULL_CROP = (96, 96, 96)


def released(name: str, config: dict[str, Any], crops: list[tuple[int, ...]], at: Path) -> Release:
    path, args = split_target(config)
    for crop in crops:
        try:
            return tiny_release(at, path.removeprefix("pretrain.backbones."), args, crop, seed=0)
        except (InputError, ValueError) as error:
            refusal = error
    raise InputError(f"{name}: takes none of {crops}: {refusal}")


def measure(form: str, release: Release, output: Path) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        facts = FORMS[form](release, output)
    except InputError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if form == "monai":
        found = {"error": facts["golden"]["error"]}
    else:
        errors = [told["error"] for told in facts["outputs"].values()]
        found = {"error": max(errors), "sizes": facts["input"]["sizes"]}
    return {**found, "seconds": seconds, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--only", nargs="+", default=names("backbone"))
    parser.add_argument("--full", action="store_true", help="as they are, crops of 96 voxels")
    asked = parser.parse_args()
    seen, rows = set(), []
    for name in asked.only:
        config = preset("backbone", name).backbone
        config, crops = (config, [FULL_CROP]) if asked.full else (shrink(config), CROPS)
        if json.dumps(config) in seen:
            continue
        seen.add(json.dumps(config))
        with tempfile.TemporaryDirectory() as folder:
            release = released(name, config, crops, Path(folder) / "release")
            for form in asked.forms:
                row = {"backbone": name, "crop_size": list(release.crop_size), "form": form}
                rows.append(row | measure(form, release, Path(folder) / form))
                print(json.dumps(rows[-1]), flush=True)
    OUTPUT.mkdir(exist_ok=True)
    made_of = {name: version(name) for name in PACKAGES if find_spec(name)}
    note = {"machine": machine(torch.device("cpu")), "versions": made_of, "rows": rows}
    write_json(OUTPUT / ("full.json" if asked.full else "small.json"), note)


if __name__ == "__main__":
    main()
