"""Faces are taken away: a function of the user's says where they are, we say what becomes of them.

Skull-stripping and defacing tools differ by licence, speed and taste, so none is built in. A
function takes a scan and gives the voxels that must go. They become the scan's lowest value and
are marked as not valid, so that no loss is taken of them and no network learns to draw faces.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.errors import InputError
from data_prep.images import FloatArray, Reject
from data_prep.volume import Volume

Deface = Callable[[np.ndarray, FloatArray], np.ndarray]
"""From physical values `[D, H, W]` (float32) and the affine to RAS mm, to True where they go."""

_HEAD_MM = (140.0, 300.0)


def deface_function(name: str) -> Deface:
    """The function of `module:function`.

    Raises:
        InputError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"deface={name}: cannot be imported ({error}); module:function is needed, of a module "
            "that Python finds (PYTHONPATH)"
        ) from error
    if not callable(found):
        raise InputError(f"deface={name}: is no function")
    return found


def deface_files(name: str) -> list[Path]:
    """Files with the code of `module:function`: of the module, and of where the function is from.

    Raises:
        InputError: there is no such function.
    """
    function = deface_function(name)
    homes = {name.partition(":")[0], str(getattr(function, "__module__", ""))}
    files = [getattr(sys.modules.get(home), "__file__", None) or "" for home in sorted(homes)]
    return [Path(file) for file in files if Path(file).is_file()]


def defaced(volume: Volume, mask: np.ndarray | None, name: str) -> tuple[Volume, np.ndarray]:
    """The volume without its face, and where it is not valid (uint8); with what `mask` had.

    Raises:
        Reject: the function failed or found nothing, so that the face may still be there.
    """
    values = volume.physical()
    try:
        gone = np.asarray(deface_function(name)(values[0], volume.affine.copy()))
    except Exception as error:
        raise Reject("deface_failed", f"{name} raised {type(error).__name__}") from error
    if gone.dtype != np.bool_ or gone.shape != values.shape[1:]:
        raise Reject(
            "deface_failed",
            f"{name} gave {gone.dtype} of shape {gone.shape}, bool of {values.shape[1:]} is needed",
        )
    if not gone.any() or gone.all():
        raise Reject("deface_failed", f"{name} took {'all' if gone.any() else 'nothing'} away")
    array = np.array(volume.array)
    for channel, slope in zip(array, volume.slope, strict=True):
        channel[gone] = channel.min() if slope > 0 else channel.max()
    invalid = gone.astype(np.uint8)
    return replace(volume, array=array), invalid if mask is None else np.maximum(invalid, mask)


def may_be_head(modality: str, shape: Sequence[int], spacing: Sequence[float]) -> bool:
    """Whether a scan has the modality and field of view of a head: 14 to 30 cm each way, on MR."""
    sides = [n * s for n, s in zip(shape, spacing, strict=True)]
    return modality == "MR" and min(sides) >= _HEAD_MM[0] and max(sides) <= _HEAD_MM[1]
