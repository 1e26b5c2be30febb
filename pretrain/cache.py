"""Checkpoints that were fetched, by their content, and what each reference stands for.

content/SHA256/NAME    a release, by its digest, or a file of weights, by that of its bytes
pins/....json          which content each reference stands for; the first download says so
partial/.../           what has not come in full; never given out
locks/....lock         one download of a reference at a time
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest, write_json
from data_prep.references import Reference, is_safe
from pretrain.manifest import read_manifest


@dataclass(frozen=True)
class Fetched:
    """A checkpoint that is on this machine.

    Attributes:
        path: of the release's folder or of the file of weights.
        kind: which of them it is.
        digest: of the release, or sha256 of the file.
        reference: that it was fetched by, without secrets.
        commit: on the hub, where it came from there.
        cached: whether it was here before.
    """

    path: Path
    kind: Literal["release", "weights"]
    digest: str
    reference: str
    commit: str | None = None
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "path": str(self.path)}


def cache_folder() -> Path:
    """Where fetched checkpoints lie: VOXELITH_CACHE, or in the user's own cache."""
    chosen = os.environ.get("VOXELITH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "voxelith"


def cached() -> list[dict[str, Any]]:
    """What the cache holds: its pins, with whether their content is there."""
    found = []
    for file in sorted((cache_folder() / "pins").glob("*.json")):
        pin = _read_pin(file)
        if pin is not None:
            path = cache_folder() / "content" / pin["digest"] / pin["name"]
            found.append({**pin, "path": str(path) if path.exists() else None, "pin": str(file)})
    return found


class Cache:
    """A cache as one reference sees it."""

    def __init__(self, folder: Path, wanted: Reference) -> None:
        self.folder, self.wanted = folder, wanted
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted.shown)[-60:].lstrip(".-")
        self.id = f"{slug}-{hashlib.sha256(wanted.identity.encode()).hexdigest()[:12]}"
        self.pin_file = folder / "pins" / f"{self.id}.json"
        self.partial = folder / "partial" / self.id

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process fetches the same reference."""
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with (locks / f"{self.id}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{self.wanted.shown}: another process fetches it, waiting", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def pin(self) -> dict[str, Any] | None:
        """What the reference stood for when it was first fetched."""
        return _read_pin(self.pin_file)

    def expected(self) -> str | None:
        """The digest that must arrive; what the reference itself says goes before its pin."""
        pin = self.pin()
        return self.wanted.sha256 or (pin["digest"] if pin else None)

    def place(self, digest: str, name: str) -> Path:
        """Where content lies."""
        return self.folder / "content" / digest / name

    def there(self) -> Fetched | None:
        """The content of the reference, verified, if it is here.

        Raises:
            CorruptionError: it is, and is not what it was.
        """
        pin, digest = self.pin(), self.expected()
        if digest is None:
            return None
        if pin is not None and pin["digest"] == digest:
            path = self.place(digest, pin["name"])
        else:  # fetched by another reference, this one says by itself what it is
            holds = self.folder / "content" / digest
            path = next(iter(sorted(holds.iterdir())), holds) if holds.is_dir() else holds
        if not path.exists() or path.parent == self.folder / "content":
            return None
        _check_kept(path, digest)
        kind: Literal["release", "weights"] = "release" if path.is_dir() else "weights"
        commit = pin.get("commit") if pin else None
        return Fetched(path, kind, digest, self.wanted.shown, commit, cached=True)

    def check(self, digest: str) -> None:
        """Refuses content that is not what the reference stands for.

        Raises:
            CorruptionError: it is not.
        """
        expected = self.expected()
        if expected is None or expected == digest:
            return
        shown = self.wanted.shown
        if self.wanted.sha256 is not None:
            raise CorruptionError(
                f"{shown}: is not what it should be: sha256 {digest}, expected {expected}; nothing "
                "of it is kept"
            )
        raise CorruptionError(
            f"{shown}: is not what it was: sha256 {digest}, at its first download {expected}; "
            f"nothing of it is kept. If the change is meant, remove {self.pin_file} and fetch again"
        )

    def keep(self, arrived: Path, name: str, digest: str, commit: str | None) -> Fetched:
        """Moves what has arrived to its place, and pins the reference to it.

        What lies there already stays, unless it is no more what it was.
        """
        place = self.place(digest, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            try:
                _check_kept(place, digest)
            except InputError:
                place.rename(self.partial / "damaged")
        if not place.exists():
            try:
                arrived.rename(place)
            except OSError:  # another reference to the same content was faster
                if not place.exists():
                    raise
        kind: Literal["release", "weights"] = "release" if place.is_dir() else "weights"
        self.pin_file.parent.mkdir(exist_ok=True)
        pin = {"reference": self.wanted.shown, "kind": kind, "digest": digest, "name": name}
        write_json(self.pin_file, pin | ({"commit": commit} if commit else {}))
        shutil.rmtree(self.partial, ignore_errors=True)
        return Fetched(place, kind, digest, self.wanted.shown, commit)


def _check_kept(path: Path, digest: str) -> None:
    hint = f"the cache is damaged; remove {path.parent} and fetch it again"
    if path.is_dir():
        try:
            found = read_manifest(path).digest
        except InputError as error:
            raise type(error)([*error.problems, hint]) from None
    else:
        found = file_digest(path)
    if found != digest:
        raise CorruptionError(f"{path}: has sha256 {found}, and was fetched as {digest}; {hint}")


def _read_pin(file: Path) -> dict[str, Any] | None:
    """A pin; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        pin = json.loads(file.read_text(encoding="utf-8"))
        if re.fullmatch("[0-9a-f]{64}", pin["digest"]) and is_safe(pin["name"]):
            return dict(pin)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{file}: is no pin that can be read; remove it")
