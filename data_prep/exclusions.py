"""What must stay out of a corpus, test sets above all: named by lists, corpora or releases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.corpus import CORPUS_FILE, Corpus
from data_prep.errors import InputError
from data_prep.fingerprint import as_text
from data_prep.scan import Scanned
from data_prep.sketch import PREFIX, Sketch, SketchIndex

RELEASE_PRINTS = "fingerprints.json"
"""Of a release: what its weights were trained on."""


@dataclass
class Exclusions:
    """Names and looks of what must stay out.

    Attributes:
        names: Keys and fingerprints.
        sketches: Of scans of which there are any.
        sources: Where each of these comes from, to be told.
    """

    names: set[str] = field(default_factory=set)
    sketches: list[Sketch] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @cached_property
    def _index(self) -> SketchIndex:
        # Not for those who only ask whether the words of a request are sound: each task does.
        return SketchIndex(self.sketches)

    def reason(self, sample: Scanned) -> str:
        """Why a scan must stay out; empty if it may come in."""
        prints = [sample.meta, *(c for c in sample.meta["channels"] if "fingerprint" in c)]
        known = {sample.key, sample.meta["fingerprint"]["value"]}
        known |= {as_text(one["fingerprint"]) for one in prints}
        if self.names & known:
            return "named by exclude="
        for number, share in self._index.find(sample.look):
            return f"a near-duplicate of a scan of {self.sources[number]} ({share:.0%} of features)"
        return ""


def read_exclusions(paths: Sequence[Path]) -> Exclusions:
    """All that some lists (keys or fingerprints, one a line), corpora and releases name.

    Raises:
        InputError: with all that are none of these.
    """
    names: set[str] = set()
    sketches: list[Sketch] = []
    sources: list[str] = []
    problems: list[str] = []
    for path in paths:
        try:
            more, looks = _read(path)
        except InputError as error:
            problems += [f"exclude={path}: {p.removeprefix(f'{path}: ')}" for p in error.problems]
            continue
        names |= more
        sketches += looks
        sources += [path.name] * len(looks)
    if problems:
        raise InputError(problems)
    return Exclusions(names, sketches, sources)


def exclusion_digest(path: Path) -> str:
    """Says whether a path of `exclude=` still names the same."""
    found = [path / name for name in (CORPUS_FILE, RELEASE_PRINTS) if (path / name).is_file()]
    return hashlib.sha256((found[0] if found else path).read_bytes()).hexdigest()


def _read(path: Path) -> tuple[set[str], list[Sketch]]:
    if (path / CORPUS_FILE).is_file():
        corpus = Corpus.open(path)
        prints = {text for texts in corpus.scan_prints().values() for text in texts}
        return prints | set(corpus.keys), corpus.sketches()
    if (path / RELEASE_PRINTS).is_file():
        return _of_release(path / RELEASE_PRINTS)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: a list of keys or fingerprints, a corpus or a release is needed ({error})"
        ) from error
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}, []


def _of_release(file: Path) -> tuple[set[str], list[Sketch]]:
    try:
        data: dict[str, Any] = json.loads(file.read_bytes())
        values = {str(value) for value in data["values"]}
        return values, [Sketch.from_text(one) for one in sorted(values) if one.startswith(PREFIX)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file.parent}: its {file.name} is not that of a release ({error})"
        ) from error
