"""Which scans become samples and where they lie: a pure function of what scanning found.

Written down once, so that whoever writes shards, in whatever order, follows the same plan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.errors import InputError
from data_prep.exclusions import Exclusions
from data_prep.files import write_bytes
from data_prep.fingerprint import as_text
from data_prep.layouts.case import Layout, LeftOut
from data_prep.progress import bar
from data_prep.request import class_rows, combined_rows, nothing_left
from data_prep.scan import ScanJob, Scanned
from data_prep.settings import PrepSettings
from data_prep.shards import canonical_json
from data_prep.sketch import SketchIndex
from data_prep.work import WorkFolder
from data_prep.write import assign_shards, sample_json


@dataclass(frozen=True)
class Plan:
    """The cases of each shard, in order of their keys; what was left out; rows of the classes."""

    shards: list[list[int]]
    left_out: list[LeftOut]
    classes: list[dict[str, Any]]
    labelled: bool
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    """Copies that are left out: number of the case, of that which stays, and their similarity."""

    @property
    def known(self) -> list[int] | None:
        """Label values that were looked for; None without labels."""
        if not self.labelled:
            return None
        return [row["value"] for row in self.classes if row["value"] and not row["ignore"]]


def make_plan(
    settings: PrepSettings,
    layout: Layout,
    jobs: Sequence[ScanJob],
    scanned: Sequence[Scanned | LeftOut],
    classes: list[dict[str, Any]] | None,
    exclusions: Exclusions,
) -> Plan:
    """The plan of all cases; InputError if none is left."""
    kept, left_out = _survivors(jobs, scanned, exclusions)
    pairs: list[tuple[int, int, float]] = []
    if settings.duplicates == "all":
        kept, near, pairs = _without_near_duplicates(jobs, kept)
        left_out += near
    left_out = [*layout.left_out, *left_out]
    if not kept:
        raise InputError(nothing_left(settings, layout, left_out))
    labelled = jobs[0].labelled
    if labelled and classes is None:
        values = {int(v) for sample in kept for v in sample.meta["class_counts"]}
        classes = class_rows({0: "background", **{v: f"class_{v}" for v in values}})
    if labelled and classes and any(s.meta["seg_encoding"] == "bits" for s in kept):
        classes = combined_rows(classes, {int(v) for s in kept for v in s.meta["class_counts"]})
    plan = Plan([], left_out, classes or [], labelled, pairs)
    sizes = [len(sample_json(s.meta, plan.known)) + sum(s.sizes.values()) for s in kept]
    for members in assign_shards(sizes, int(settings.shard_mib * 2**20)):
        plan.shards.append([kept[i].number for i in members])
    return plan


def write_plan(work: WorkFolder, plan: Plan) -> None:
    """Notes the plan."""
    write_bytes(work.plan, canonical_json(asdict(plan)), mode=0o600)


def read_plan(work: WorkFolder) -> Plan:
    """The plan that was noted."""
    note = json.loads(work.plan.read_bytes())
    return Plan(**{**note, "left_out": [LeftOut(**row) for row in note["left_out"]]})


def _survivors(
    jobs: Sequence[ScanJob], scanned: Sequence[Scanned | LeftOut], excluded: Exclusions
) -> tuple[list[Scanned], list[LeftOut]]:
    """Samples sorted by key, and files left out; of equal scans `_precedence` says which stays."""
    kept: dict[str, Scanned] = {}
    left_out: list[LeftOut] = []
    for number in sorted(range(len(jobs)), key=lambda n: _precedence(jobs[n])):
        job, result = jobs[number], scanned[number]
        if isinstance(result, LeftOut):
            left_out.append(result)
            continue
        print_text = as_text(result.meta["fingerprint"])
        if reason := excluded.reason(result):
            left_out.append(LeftOut(job.case.name, "excluded", reason))
        elif print_text in kept:
            left_out.append(_duplicate(job, result, kept[print_text], jobs))
        else:
            kept[print_text] = result
    return sorted(kept.values(), key=lambda sample: sample.key), left_out


def _without_near_duplicates(
    jobs: Sequence[ScanJob], samples: Sequence[Scanned]
) -> tuple[list[Scanned], list[LeftOut], list[tuple[int, int, float]]]:
    """As `_survivors`, by sketches; volumes of one file or series are alike and mean to be."""
    order = sorted(samples, key=lambda sample: _precedence(jobs[sample.number]))
    wholes = [jobs[sample.number].case.whole for sample in order]
    looks = [sample.look for sample in order]
    index = SketchIndex(looks)
    kept: dict[int, Scanned] = {}
    left_out, pairs = [], []
    # Copies that are left out themselves must not hide the one that stays.
    alike = index.find_all(looks, among=lambda n, m: m in kept and wholes[m] != wholes[n])
    each = zip(order, alike, strict=True)
    for n, (sample, found) in enumerate(bar(iterable=each, desc="duplicates", total=len(order))):
        job = jobs[sample.number]
        if found:
            other, share = found[0]
            how = f"a near-duplicate of {order[other].key} ({share:.0%} of features)"
            left_out.append(_duplicate(job, sample, order[other], jobs, how))
            pairs.append((sample.number, order[other].number, share))
        else:
            kept[n] = sample
    return sorted(kept.values(), key=lambda sample: sample.key), left_out, pairs


def _precedence(job: ScanJob) -> tuple[int, int]:
    """Test before validation before any other part, then the order of the input.

    So a duplicate costs training and not the test.
    """
    return {"test": 0, "validation": 1}.get(job.case.split, 2), job.number


def _duplicate(
    job: ScanJob, sample: Scanned, first: Scanned, jobs: Sequence[ScanJob], how: str = ""
) -> LeftOut:
    """The verdict on a scan that another case has already; says what makes it worse."""
    here, there = job.case.split or "no part", jobs[first.number].case.split or "no part"
    code = "near_duplicate" if how else "duplicate"
    detail = how or f"duplicate of {first.key}"
    if here != there:
        code, detail = "duplicate_across_splits", f"{detail}, which is in {there}, this in {here}"
    if not how and sample.meta.get("class_counts") != first.meta.get("class_counts"):
        detail += "; their labels differ"
    return LeftOut(job.case.name, code, detail)
