"""What must stay out of a corpus, test sets above all: lists, corpora or their splits, releases."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.corpus import CORPUS_FILE, Corpus
from data_prep.errors import InputError, Naming, attempt, named, some
from data_prep.files import write_bytes
from data_prep.fingerprint import as_text
from data_prep.naming import KEY_PATTERN
from data_prep.scan import Scanned
from data_prep.sketch import PREFIX, Sketch, SketchIndex

_LINE = re.compile(
    rf"{KEY_PATTERN.pattern}|[a-z0-9-]+-\d+:[0-9a-f]+|{re.escape(PREFIX)}.*|subject .+"
)
"""A key or the value of a fingerprint, a whole one, a sketch, a line of what was withdrawn."""
RELEASE_PRINTS = "fingerprints.json"
"""Of a release: what its weights were trained on."""


@dataclass
class Exclusions:
    """Names and looks of what must stay out.

    Attributes:
        names: Fingerprints, and keys that lists name.
        sketches: Of scans of which there are any.
        sources: Where each of these comes from: a path, and the key if it is a corpus.
    """

    names: set[str] = field(default_factory=set)
    sketches: list[Sketch] = field(default_factory=list)
    sources: list[tuple[Path, str]] = field(default_factory=list)

    @cached_property
    def _index(self) -> SketchIndex:
        # Not for those who only ask whether the words of a request are sound: each task does.
        return SketchIndex(self.sketches)

    def reason(self, sample: Scanned) -> str:
        """Why a scan must stay out; empty if it may come in."""
        if self._names(sample):
            return "named by exclude="
        for number, share in self._index.find(sample.look):
            path, key = self.sources[number]
            return f"a near-duplicate of {key or 'a scan'} of {path.name} ({share:.0%} of features)"
        return ""

    def copy_of(self, sample: Scanned) -> tuple[Path, str, float] | None:
        """The corpus, key and similarity of what a scan is a copy of, if it is not simply equal."""
        if self._names(sample):
            return None
        for number, share in self._index.find(sample.look):
            path, key = self.sources[number]
            if key:
                return path, key, share
        return None

    def notes(self) -> list[str]:
        """Of how many scans copies cannot be looked for."""
        small = Counter(
            path.name
            for (path, _), look in zip(self.sources, self.sketches, strict=True)
            if not look.is_comparable
        )
        return [
            f"exclude={name}: {count} of its scans are too small to be compared, or have no "
            "sketches: only equal ones stay out"
            for name, count in sorted(small.items())
        ]

    def _names(self, sample: Scanned) -> bool:
        prints = [sample.meta, *(c for c in sample.meta["channels"] if "fingerprint" in c)]
        known = {sample.key, sample.meta["fingerprint"]["value"]}
        known |= {as_text(one["fingerprint"]) for one in prints}
        return not self.names.isdisjoint(known)


def read_exclusions(paths: Sequence[Path], equal: Collection[Path] = ()) -> Exclusions:
    """All that some lists (keys or fingerprints, one a line), corpora and releases name.

    A split of a corpus, splits/NAME.json in it, names its test and validation samples. Scans of a
    corpus are known by what is in them: another scan may have the same key elsewhere.

    Args:
        paths: of each of these.
        equal: those of which only equal scans stay out, and near-duplicates may come in.

    Raises:
        InputError: with all that are none of these.
    """
    names: set[str] = set()
    sketches: list[Sketch] = []
    sources: list[tuple[Path, str]] = []
    problems: list[str] = []
    for path in paths:
        if found := attempt(problems, named, "exclude", path, _read):
            names |= found[0]
            if path not in equal:
                sketches += found[1]
                sources += found[2]
    if problems:
        raise InputError(problems)
    return Exclusions(names, sketches, sources)


def write_excluded(file: Path, paths: Sequence[Path]) -> None:
    """Notes what `exclude=` names, beside what an earlier note has, as a list that it reads."""
    before = set(file.read_text().splitlines()) if file.is_file() else set()
    names = {name for name in read_exclusions(paths).names if _LINE.fullmatch(name)} | before
    if names:
        write_bytes(file, "".join(f"{name}\n" for name in sorted(names)).encode(), mode=0o600)


def exclusion_digest(path: Path) -> str:
    """Says whether a path of `exclude=` still names the same."""
    found = [path / name for name in (CORPUS_FILE, RELEASE_PRINTS) if (path / name).is_file()]
    return hashlib.sha256((found[0] if found else path).read_bytes()).hexdigest()


def _read(path: Path) -> tuple[set[str], list[Sketch], list[tuple[Path, str]]]:
    """Names, sketches, and where each of these comes from."""
    if (path / CORPUS_FILE).is_file():
        corpus = Corpus.open(path)
        return _of_samples(corpus, set(corpus.keys))
    whole = path.absolute()  # splits may be where we are
    if whole.parent.name == "splits" and (whole.parents[1] / CORPUS_FILE).is_file():
        corpus = Corpus.open(whole.parents[1])
        parts = corpus.split(path.stem)["parts"]
        held = {key for part in ("test", "validation") for key in parts.get(part, ())}
        if not held:
            raise InputError(f"{path}: this split has no test or validation part")
        return _of_samples(corpus, held)
    if path.name == RELEASE_PRINTS:
        path = path.parent
    if (path / RELEASE_PRINTS).is_file():
        names, looks = _of_release(path / RELEASE_PRINTS)
        return names, looks, [(path, "")] * len(looks)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: a list of keys or fingerprints, a corpus or a release is needed ({error})"
        ) from error
    names = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    # A list that names nothing would keep nothing out, without a word.
    if strange := sorted(name for name in names if not _LINE.fullmatch(name)):
        way = (
            "expected a key of a corpus or a fingerprint on each line; or give a corpus, a split "
            "of it, or a release"
        )
        shown = some([one[:60] for one in strange])
        raise InputError(
            Naming(f"{path}: {shown}: {way}", f"{path}: {len(strange)} of its lines: {way}")
        )
    try:
        looks = [Sketch.from_text(one) for one in sorted(names) if one.startswith(PREFIX)]
    except ValueError as error:
        raise InputError(f"{path}: a line that begins with {PREFIX} is no sketch") from error
    return names, looks, [(path, "")] * len(looks)


def _of_samples(
    corpus: Corpus, keys: set[str]
) -> tuple[set[str], list[Sketch], list[tuple[Path, str]]]:
    """The same of some samples of a corpus."""
    names = {one for key, prints in corpus.scan_prints().items() if key in keys for one in prints}
    looks = {
        key: look for key, look in zip(corpus.keys, corpus.sketches(), strict=True) if key in keys
    }
    return names, list(looks.values()), [(Path(corpus.path), key) for key in looks]


def _of_release(file: Path) -> tuple[set[str], list[Sketch]]:
    try:
        data: dict[str, Any] = json.loads(file.read_bytes())
        values = {str(value) for value in data["values"]}
        return values, [Sketch.from_text(one) for one in sorted(values) if one.startswith(PREFIX)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file.parent}: its {file.name} is not that of a release ({error})"
        ) from error
