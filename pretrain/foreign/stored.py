"""What lies in a file of public weights, without running any of it."""

from __future__ import annotations

import _codecs
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from data_prep.errors import CorruptionError, InputError

_WRAPPERS = (
    "teacher", "network_weights", "state_dict", "model_state_dict", "model", "net", "student",
)  # fmt: skip
"""Where public files keep their weights; the first that is there counts."""

_DEPTH = 3
"""Of wrappers in each other."""

_NESTED = 32
_FACTS = 1_000_000
"""Lists within each other, and values, that a file may tell of beside its weights."""


def _number(kind: np.dtype[Any], data: bytes) -> Any:
    """A number of its bytes; numpy's own function makes of a kind alone as much as it claims."""
    return np.frombuffer(data, kind, 1)[0]


# nnU-Net and nnssl keep numpy's numbers in their logs. These make numbers of bytes, nothing else.
_NUMBERS: list[Any] = [
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_codecs.encode, "_codecs.encode"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
]


@dataclass(frozen=True)
class Stored:
    """A file's weights and what it says beside them.

    Attributes:
        weights: by their names in the file.
        wrapper: dotted path of the dict that they lie in; empty: the file is that dict.
        beside: numbers of tensors in other dicts, by the outermost name that is not the wrapper's.
        facts: all else that is plain data.
    """

    weights: dict[str, Tensor]
    wrapper: str = ""
    beside: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def read_stored(path: Path) -> Stored:
    """Reads a .safetensors file or one that torch saved; no pickle is run.

    Raises:
        InputError: it cannot be read, unpacks to more than its own size, or holds no weights.
    """
    try:
        stored, facts = _read_safe(path) if _is_safe(path) else (_read_torch(path), {})
    except InputError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if "weights_only" in said:  # torch's advice would be to run the pickle
            found = re.search(r"GLOBAL (\S+)", said)
            said = (
                f"it holds {found[1] if found else 'an object'}, and objects are not unpickled; "
                "save its weights alone where you trust it"
            )
        raise InputError(f"{path}: cannot be read as weights ({said})") from error
    groups = dict(_groups(stored, ""))
    chosen = next(
        (at for wrapper in ("", *_WRAPPERS) for at in groups if at.rpartition(".")[2] == wrapper),
        None,
    )
    if chosen is None:
        raise InputError(
            f"{path}: holds other things than tensors by name ({_keys(stored)}); give weights "
            f"alone, or in one of {', '.join(_WRAPPERS)}"
        )
    weights = groups.pop(chosen)
    empty = [name for name, tensor in weights.items() if not _is_whole(tensor)]
    if empty:
        raise InputError(
            [f"{path}: {name}: claims more values than the file holds" for name in empty]
        )
    if not chosen:
        return Stored(weights, facts=facts)
    beside: dict[str, int] = {}
    for at, group in groups.items():
        parts, own = at.split("."), chosen.split(".")
        outermost = next((i for i, part in enumerate(parts) if [part] != own[i : i + 1]), 0)
        name = ".".join(parts[: outermost + 1])
        beside[name] = beside.get(name, 0) + len(group)
    facts = {
        key: value
        for key, value in stored.items()
        if isinstance(key, str) and _is_plain(value, [_FACTS])
    }
    return Stored(weights, chosen, beside, facts)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights alone; see `read_stored`."""
    return read_stored(path).weights


def _is_safe(path: Path) -> bool:
    """By its first bytes: a length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safe(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}


def _read_torch(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as file:
        begins = file.read(4)
    if begins != b"PK\3\4" or not zipfile.is_zipfile(path):
        # Of torch before 1.6, told by its first bytes: it allocates what the pickle claims.
        raise InputError(
            f"{path}: cannot be read as weights: it is no .safetensors file and none that torch "
            "1.6 or later saved; torch.save(torch.load(FILE, weights_only=True), NEW) makes one"
        )
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        unpacked = sum(part.file_size for part in parts)
        if unpacked > size:  # torch packs nothing
            raise InputError(f"{path}: has {size} bytes and unpacks to {unpacked}: refused")
        # torch looks at no sums, and writes none (zeros) where it is told so.
        damaged = archive.testzip() if any(part.CRC for part in parts) else None
    if damaged is not None:
        raise CorruptionError(
            f"{path}: {damaged} in it is not what its sum says: damaged; fetch the file again"
        )
    with torch.serialization.safe_globals(_NUMBERS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _groups(stored: Any, at: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dicts of nothing but tensors, by where they are."""
    if not isinstance(stored, dict) or depth > _DEPTH:
        return
    if stored and all(isinstance(n, str) and torch.is_tensor(t) for n, t in stored.items()):
        # Without what a pickle can put on a tensor in place of its methods.
        yield at, {name: torch.detach(tensor) for name, tensor in stored.items()}
        return
    for name, value in stored.items():
        yield from _groups(value, f"{at}.{name}" if at else str(name), depth + 1)


def _is_whole(tensor: Tensor) -> bool:
    """Whether there is a stored value for each of the tensor's."""
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_plain(value: Any, left: list[int], depth: int = 0) -> bool:
    """Whether a value is plain data of sane size: lists that hold themselves have none.

    Args:
        value: of a file.
        left: how many more values may be looked at, counted down.
        depth: of the lists that it lies in.
    """
    left[0] -= 1
    if left[0] < 0 or depth > _NESTED:
        return False
    if isinstance(value, Mapping):
        named = all(isinstance(key, str | int) for key in value)
        return named and all(_is_plain(v, left, depth + 1) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v, left, depth + 1) for v in value)
    return value is None or isinstance(value, str | int | float | bool)


def _keys(stored: Any) -> str:
    if not isinstance(stored, dict):
        return type(stored).__name__
    return ", ".join([str(key) for key in stored][:8]) or "nothing"
