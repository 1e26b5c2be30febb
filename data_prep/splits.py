"""Splits by subject: who trains, who validates, who is tested. They live beside the shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.corpus import split_hash
from data_prep.errors import InputError, Naming, some
from data_prep.files import write_bytes
from data_prep.shards import canonical_json

PARTS = ("train", "validation", "test")
SPELLINGS = {
    "train": "train", "training": "train", "tr": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip
DEFAULT_FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def make_split(
    keys: Sequence[str],
    subjects: Sequence[str],
    seed: int = 0,
    fractions: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The split `default`: splits samples so that no subject is in two parts.

    Subjects are ranked by a hash of (seed, subject), so the split depends on neither order nor
    count of samples per subject. A part with a fraction above zero gets at least one subject as
    long as there are enough.

    Args:
        keys: One per sample.
        subjects: One per sample.
        seed: Another seed is another draw.
        fractions: Shares of the subjects; 70 % train, 10 % validation, 20 % test by default.
    """
    shares = dict(fractions or DEFAULT_FRACTIONS)
    if set(shares) - set(PARTS) or abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise InputError(f"fractions of a split are shares of {PARTS} that sum to 1, got {shares}")
    ranked = sorted(set(subjects), key=lambda subject: drawn_order(seed, subject))
    count = len(ranked)
    sizes = {}
    left = count
    # The smaller parts take theirs first; training gets what remains.
    for part in ("test", "validation"):
        share = shares.get(part, 0.0)
        wanted = max(round(share * count), 1) if share > 0 and left > 1 else 0
        sizes[part] = min(wanted, max(left - 1, 0))
        left -= sizes[part]
    sizes["train"] = left
    part_of, position = {}, 0
    for part in ("test", "validation", "train"):
        for subject in ranked[position : position + sizes[part]]:
            part_of[subject] = part
        position += sizes[part]
    return split_from("default", keys, subjects, [part_of[subject] for subject in subjects], seed)


def split_from(
    name: str,
    keys: Sequence[str],
    subjects: Sequence[str],
    parts: Sequence[str],
    seed: int | None = None,
) -> dict[str, Any]:
    """A split as it is stored, from the part of each sample; an empty part leaves a sample out.

    Raises InputError if a subject is in two parts: its samples would answer for each other.
    """
    homes: dict[str, set[str]] = {}
    for subject, part in zip(subjects, parts, strict=True):
        if part:
            homes.setdefault(subject, set()).add(part)
    torn = sorted(subject for subject, found in homes.items() if len(found) > 1)
    if torn:
        several = f"split {name}: {len(torn)} subjects are in more than one part"
        rule = "all samples of a subject belong to one"
        raise InputError(Naming(f"{several} ({some(torn)}); {rule}", f"{several}; {rule}"))
    rows = sorted(zip(keys, subjects, parts, strict=True))
    data: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "groups": {p: sorted({s for _, s, part in rows if part == p}) for p in PARTS},
        "parts": {p: [key for key, _, part in rows if part == p] for p in PARTS},
    }
    return {**data, "hash": split_hash(data)}


def write_split(data: Mapping[str, Any], folder: Path) -> Path:
    """Write a split to `folder/NAME.json`, with its hash, atomically."""
    content = {name: value for name, value in data.items() if name != "hash"}
    folder.mkdir(exist_ok=True)
    path = folder / f"{content['name']}.json"
    write_bytes(path, canonical_json({**content, "hash": split_hash(content)}))
    return path


def drawn_order(seed: int, text: str) -> bytes:
    """Sorts texts in an order that the seed alone draws, whatever else is sorted."""
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()
