"""A release's encoder as a MONAI bundle: features of whole scans by MONAI, torch and nibabel alone.

    configs/metadata.json    what it is, in MONAI's schema
    configs/inference.json   reads, prepares, sees by windows, writes an .npz per scan
    models/encoder.pt2       the program of `pretrain.portable`, encoder.json beside it
    docs/, LICENSE           how to run it, the release's card and golden scan, licences of the data

It does what `Encoder.features` does. MONAI's transforms stand where they mean the same; where none
does, the configuration has the step as an expression. Windows are MONAI's sliding ones, whose
starts, overlap and mean are made ours. The bundle is run once, in a process of its own that cannot
import voxelith, and must give the golden scan's features before it appears.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.errors import CorruptionError, InputError
from data_prep.files import atomic_folder, write_json, write_text
from data_prep.licences import UNSTATED, strictest_first
from data_prep.preprocess import EPSILON, SPACING_TOLERANCE
from data_prep.volume import CT_PADDING_HU
from pretrain.backbones.backbone import Backbone
from pretrain.encoder import OVERLAP, Encoder
from pretrain.portable import load_portable, save_program
from pretrain.release import Release, relative_error
from pretrain.run_folder import versions

TOLERANCE = 1e-4
"""Of map and vector, relative to their largest value, in float32 on a CPU."""
OURS = ("voxelith", "data_prep", "pretrain", "finetune", "conf")
"""What the bundle must do without."""
SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
GOLDEN = "golden_input.nii.gz"


def write_bundle(release: Release, output: Path) -> dict[str, Any]:
    """Writes a MONAI bundle and runs it once.

    Args:
        release: a verified one.
        output: folder that is made.

    Returns:
        What configs/metadata.json says.

    Raises:
        InputError: `output` exists, torch.export cannot take the backbone, or MONAI's windows
            cannot count in its cells.
        CorruptionError: the bundle does not run, or gives other features.
    """
    module = load_portable(release)
    encoder = module.encoder
    stride = encoder.strides[-1]
    if any(side & (side - 1) for side in stride):
        # MONAI finds a window's place in the map by multiplying with 1 / stride and cutting off.
        raise InputError(
            f"{release.path}: cells of {list(stride)} voxels; MONAI's sliding windows place maps "
            "exactly for powers of two alone; form=torch and form=onnx take any"
        )
    with atomic_folder(output) as folder:
        for name in ("configs", "models", "docs"):
            (folder / name).mkdir()
        save_program(release, module, folder / "models" / "encoder.pt2")
        write_json(folder / "configs" / "inference.json", inference(release, encoder))
        shutil.copyfile(release.path / GOLDEN, folder / "docs" / GOLDEN)
        shutil.copyfile(release.path / "README.md", folder / "docs" / "release_card.md")
        write_text(folder / "LICENSE", _licence(release))
        write_text(folder / "docs" / "README.md", _readme(release))
        error = _compare(release, encoder, folder)
        facts = metadata(release, encoder, error)
        write_json(folder / "configs" / "metadata.json", facts)
    return facts


def inference(release: Release, encoder: Backbone) -> dict[str, Any]:
    """configs/inference.json: `images` to `output_dir`, one .npz per scan.

    Keys that a user may override: bundle_root, images, output_dir, modality, device.
    """
    stride = list(encoder.strides[-1])
    crop = list(release.crop_size)
    spacing = release.preprocess.spacing_mm
    golden = f"$@bundle_root + '/docs/{GOLDEN}'"
    cell = np.diag([*map(float, stride), 1.0])
    cell[:3, 3] = (np.array(stride) - 1) / 2
    return {
        "imports": [
            "$import os",
            "$import numpy",
            "$import torch",
            "$from torch.export.passes import move_to_device_pass",
            "$from monai.networks.layers import gaussian_1d",
            "$from monai.networks.layers import separable_filtering",
        ],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "images": [golden if encoder.in_channels == 1 else [golden] * encoder.in_channels],
        "modality": release.modalities[-1],
        "device": "$'cuda' if torch.cuda.is_available() else 'cpu'",
        "program": "$torch.export.load(@bundle_root + '/models/encoder.pt2')",
        "network": "$move_to_device_pass(@program, @device).module()",
        "deepest": f"$lambda image: @network(image)['map_{len(encoder.channels)}']",
        "preprocessing": {
            modality: {"_target_": "Compose", "transforms": transforms(release, modality)}
            for modality in release.modalities
        },
        **(_factors(spacing) if spacing else {}),
        "prepare": "$@preprocessing[@modality]",
        "to_windows": _pad(stride, crop),
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": crop,
            "sw_batch_size": 1,
            "overlap": [_overlap(c // s, s) for c, s in zip(crop, stride, strict=True)],
            "mode": "constant",
        },
        "stride": stride,
        "cells": "$lambda x: tuple(slice(-(-n // s)) for n, s in zip(x.shape[1:], @stride))",
        "see": (
            "$lambda x: @inferer(@to_windows(x)[None].as_tensor().to(@device), @deepest)[0]"
            "[(slice(None), *@cells(x))].cpu().numpy()"
        ),
        "cell": cell.tolist(),
        "write": (
            "$lambda name, x, found: numpy.savez("
            "os.path.join(@output_dir, os.path.basename(name).split('.nii')[0]), "
            "map=found, vector=found.mean((1, 2, 3)), "
            "affine=x.affine.numpy().dot(numpy.array(@cell)), "
            "spacing=x.pixdim.numpy() * numpy.array(@stride))"
        ),
        "name": "$lambda image: image if isinstance(image, str) else image[0]",
        "features": "$lambda image, x: @write(@name(image), x, @see(x))",
        "run": [
            # An expression that raises: a bundle's configuration has no statements.
            (
                "$None if len({os.path.basename(@name(one)) for one in @images}) == len(@images) "
                "else (_ for _ in ()).throw(ValueError('images of one file name: results are "
                "named by it; rename them, or give each an output_dir of its own'))"
            ),
            "$os.makedirs(@output_dir, exist_ok=True)",
            "$[@features(image, @prepare({'image': image})['image']) for image in @images]",
        ],
    }


def transforms(release: Release, modality: str) -> list[dict[str, Any]]:
    """The release's preprocessing of a scan of one modality as MONAI's transforms."""
    preprocess = release.preprocess
    rule = (preprocess.intensity or {}).get(modality, {})
    made: list[dict[str, Any]] = [
        _on("LoadImaged", reader="NibabelReader", ensure_channel_first=True),
        _on("Orientationd", axcodes="SPL"),
    ]
    made.append(_on("Lambdad", func=_coded(modality)))
    if rule.get("rule") in ("zscore", "percentile"):  # of the scan before all else
        made += [
            _on("CopyItemsd", names="native"),
            {
                "_target_": "ClipIntensityPercentilesd",
                "keys": "native",
                "lower": 0.5,
                "upper": 99.5,
                "channel_wise": True,
            },
        ]
    for operation in preprocess.operations:
        if operation["op"] == "resample" and operation["spacing_mm"]:
            made += _resample()
        elif operation["op"] == "intensity":
            made.append(_intensity(rule))
        elif operation["op"] == "pad":
            made.append(_on("Lambdad", func=_pad(operation["multiple"], (0, 0, 0))))
    return made


def _on(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, "keys": "image", **arguments}


def _coded(modality: str) -> str:
    """The values that int16 codes keep, as in a corpus (`data_prep.intensity.encode_int16`).

    CT is whole HU, and padding is air. MR of a file of floating-point numbers has 65536 steps,
    unless all are whole.
    """
    if modality == "CT":
        return f"$lambda x: x.round().clamp({CT_PADDING_HU}, 32767)"  # padding as air
    low, high = (f"x.double().{end}((1, 2, 3), keepdim=True)" for end in ("amin", "amax"))
    return (
        "$lambda x: (lambda low, step: ((x.double() - low) / step).round() * step + low)"
        f"({low}, ({high} - {low}).clamp_min(1e-30) / 65535).float() "
        "if int(x.meta['datatype']) in (16, 64) and bool((x != x.round()).any()) else x"
    )


def _resample() -> list[dict[str, Any]]:
    """Smooths the axes that shrink, then interpolates on the grid that keeps the scan's extent.

    MONAI's Spacing does not smooth, and lays its grid by the rounded number of voxels.
    """
    smooth = (
        "$lambda x: separable_filtering(x.unsqueeze(0), [gaussian_1d(max(1e-6, (f - 1) / 2), "
        "approx='sampled', normalize=True) for f in @factors(x)[:3].tolist()], "
        "mode='replicate').squeeze(0)"
    )
    resample = (
        "$lambda x: @resampler(x, dst_affine=x.affine.matmul(torch.diag(@factors(x)) + "
        "torch.outer(@factors(x) / 2 - 0.5, torch.eye(4, dtype=torch.float64)[3])), "
        "spatial_size=[max(1, round(n / f)) for n, f in zip(x.shape[1:], @factors(x).tolist())])"
    )
    return [_on("Lambdad", func=smooth), _on("Lambdad", func=resample)]


def _factors(spacing: Sequence[float]) -> dict[str, Any]:
    """What `_resample` refers to: voxels per new voxel of each axis, and the interpolation."""
    return {
        "factors": (
            f"$lambda x: torch.tensor([1.0 if abs(t / p - 1) < {SPACING_TOLERANCE} else t / p "
            f"for t, p in zip({list(spacing)}, x.pixdim.tolist())] + [1.0], dtype=torch.float64)"
        ),
        "resampler": {
            "_target_": "SpatialResample",
            "mode": "bilinear",
            "padding_mode": "border",
            "align_corners": True,
        },
    }


def _intensity(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule; `native` has the scan's own percentiles as its ends.

    Raises:
        InputError: there is no transform for it.
    """
    bottom, top = rule.get("onto") or (-1.0, 1.0)
    if rule.get("rule") == "window":
        ends = {"a_min": rule["low"], "a_max": rule["high"], "b_min": bottom, "b_max": top}
        return _on("ScaleIntensityRanged", **ends, clip=True)
    whole = "((1, 2, 3), keepdim=True)"
    low, high, mean = (f"d['native'].{name}{whole}" for name in ("amin", "amax", "mean"))
    clipped = f"d['image'].clamp({low}, {high})"
    if rule.get("rule") == "zscore":
        std = f"d['native'].std((1, 2, 3), unbiased=False, keepdim=True).clamp_min({EPSILON})"
        values = f"({clipped} - {mean}) / {std}"
    elif rule.get("rule") == "percentile":
        scale = f"({top - bottom} / ({high} - {low}).clamp_min({EPSILON}))"
        values = f"({clipped} - {low}) * {scale} + {bottom}"
    else:
        raise InputError(
            f"intensity rule {rule.get('rule')!r}: a MONAI bundle has no form for it; form=torch "
            "and form=onnx leave the preparation of scans to their user"
        )
    return {"_target_": "Lambda", "func": f"$lambda d: {{'image': {values}}}"}


def _pad(multiple: Sequence[int], least: Sequence[int]) -> str:
    """Pads the far ends up to multiples and to the least sides with each channel's lowest value.

    MONAI's mode `minimum` takes the lowest of each line.
    """
    backwards = list(zip(multiple, least, strict=True))[::-1]
    return (
        "$lambda x: (lambda low: torch.nn.functional.pad(x - low, "
        f"[end for n, (m, k) in zip(x.shape[:0:-1], {backwards}) "
        "for end in (0, max(k, n + -n % m) - n)]) + low)(x.amin((1, 2, 3), keepdim=True))"
    )


def _overlap(cells: int, stride: int) -> float:
    """The overlap by which MONAI steps as `Encoder.features`: whole cells.

    MONAI cuts off what side * (1 - overlap) has behind the point; half a voxel keeps it from
    falling below the step.
    """
    step = max(1, round(cells * (1 - OVERLAP)))
    return max(0.0, 1 - (step * stride + 0.5) / (cells * stride))


def metadata(release: Release, encoder: Backbone, error: float) -> dict[str, Any]:
    """configs/metadata.json."""
    used = versions()
    crop, stride = list(release.crop_size), encoder.strides[-1]
    tensor = {"dtype": "float32", "value_range": [], "is_patch_data": True}
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": ", ".join(release.modalities),
        "num_channels": encoder.in_channels,
        "spatial_shape": crop,
        **tensor,
        "channel_def": {str(c): "image" for c in range(encoder.in_channels)},
    }
    deepest = {
        "type": "image",
        "format": "latent",
        "num_channels": encoder.channels[-1],
        "spatial_shape": [c // s for c, s in zip(crop, stride, strict=True)],
        **tensor,
        "channel_def": {},
    }
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"made of release {release.name}, digest {release.digest}"},
        "monai_version": used.get("monai", ""),
        "pytorch_version": used.get("torch", ""),
        "numpy_version": used.get("numpy", ""),
        "required_packages_version": {"nibabel": version("nibabel")},
        "name": release.name,
        "task": f"Features of CT and MRI by an encoder {_trained(release)}",
        "description": (
            "Reads scans, prepares them as the encoder was trained, and writes the deepest feature "
            "map with the affine of its cells, and its mean as one vector, to an .npz per scan."
        ),
        "authors": f"the makers of release {release.name}, see docs/release_card.md",
        "copyright": "see LICENSE",
        "intended_use": "Research; not for diagnosis.",
        "references": [],
        "network_data_format": {
            "inputs": {"image": image},
            "outputs": {f"map_{len(encoder.channels)}": deepest},
        },
        "release": {"name": release.name, "digest": release.digest},
        "golden": {"error": error, "tolerance": TOLERANCE},
    }


_RUN = """
import json, sys

facts = json.load(sys.stdin)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in facts["absent"]:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from monai.bundle import run

for modality in facts["modalities"]:
    run(
        config_file=facts["root"] + "/configs/inference.json",
        bundle_root=facts["root"],
        output_dir=facts["output"] + "/" + modality,
        modality=modality,
        device="cpu",
    )
"""


def run_alone(bundle: Path, output: Path, modalities: Sequence[str]) -> None:
    """Runs a bundle on its golden scan where voxelith cannot be imported.

    Args:
        bundle: its root.
        output: gets a folder for each modality.
        modalities: what to take the scan for.

    Raises:
        CorruptionError: it does not run; the message has the last of what it said.
    """
    facts = {
        "root": str(bundle.resolve()),
        "output": str(output.resolve()),
        "modalities": list(modalities),
        "absent": OURS,
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", _RUN],
        input=json.dumps(facts),
        capture_output=True,
        text=True,
        cwd=output,
        check=False,
    )
    if done.returncode:
        said = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise CorruptionError(f"{bundle}: the bundle does not run without voxelith: {said}")


def _compare(release: Release, encoder: Backbone, bundle: Path) -> float:
    """The largest error of the golden features, relative to their largest value."""
    ours = Encoder(encoder, release.preprocess, release.config)
    scans = [release.path / GOLDEN] * encoder.in_channels
    errors = {}
    with tempfile.TemporaryDirectory() as name:
        run_alone(bundle, Path(name), release.modalities)
        for modality in release.modalities:
            expected = ours.features(scans, modality=modality)
            with np.load(Path(name) / modality / "golden_input.npz") as found:
                for key in ("map", "vector", "affine", "spacing"):
                    wanted = torch.from_numpy(np.asarray(getattr(expected, key)))
                    error = relative_error(torch.from_numpy(found[key]), wanted)
                    errors[f"{key} of {modality}"] = error
    wrong = {name: error for name, error in errors.items() if error > TOLERANCE}
    if wrong:
        said = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise CorruptionError(
            f"{release.path}: the bundle's golden features differ from the release's: {said} "
            f"(relative to the largest value), allowed {TOLERANCE:.0e}; nothing was written"
        )
    return max(errors.values())


def _is_adopted(release: Release) -> bool:
    """Whether its weights are public ones, of which their makers say the licence."""
    return bool(release.config["objective"]["name"] == "of others")


def _trained(release: Release) -> str:
    return "of others" if _is_adopted(release) else "that was pretrained without labels"


def _licence(release: Release) -> str:
    told = [data.get("licence", {}) for data in release.trainings]
    licences = strictest_first({name for one in told for name in one})
    listed = "\n".join(f"- {name}" for name in licences) or f"- {UNSTATED}"
    whose = (
        "They are public weights, under what their makers say:"
        if _is_adopted(release)
        else "The release names no licence for them. Whether weights inherit the licence of the "
        "data that they\nwere trained on is for you to judge. Licences of that data, "
        "strictest first:"
    )
    return f"""configs/ and docs/README.md: Apache License 2.0, as Voxelith, which wrote them.

models/encoder.pt2: the weights of release {release.name}, digest {release.digest}.
{whose}

{listed}
"""


def _readme(release: Release) -> str:
    channels = int(release.config["backbone"]["args"].get("in_channels", 1))
    images = "\"['/data/scan.nii.gz']\""
    if channels > 1:
        images = '"[[' + ", ".join(f"'/data/scan_{c}.nii.gz'" for c in range(channels)) + ']]"'
    spacing = release.preprocess.spacing_mm
    grid = f"resampled to {list(spacing)} mm" if spacing else "kept at their own spacing"
    return f"""# {release.name}

Features of {" and ".join(release.modalities)} scans by a 3D encoder
{_trained(release)}. Nothing of Voxelith is needed:

```
pip install 'monai[nibabel,fire]'
python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
    --images {images} --modality {release.modalities[-1]} --output_dir features
```

Each scan gives an .npz of its name: `map` [E, d, h, w] is the deepest feature map in S, P, L axes,
`affine` leads from (d, h, w) of its cells to RAS millimetres, `spacing` is that of the cells in mm,
`vector` [E] the mean over the cells.

Scans are turned to S, P, L axes and {grid}; intensities are those of training. `modality` says
which rule applies; it is not told from the values. A scan that is larger than
{list(release.crop_size)} voxels is seen by windows that overlap by about half, and a cell is the
mean over the windows that see it.

`torch.export.load` reads `models/encoder.pt2` without MONAI; `encoder.json` says what it gives.
`models/model.pt`, weights alone, is not there: their class is Voxelith's.
The digest of the release is {release.digest}; its card is `release_card.md`.
"""
