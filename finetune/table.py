"""The table: what pretraining was worth, from the rows of finished runs.

Rows meet in a group when they share data set, split, labels and recipe (`config_hash`). In a
group, each checkpoint's pretrained arm is compared with the scratch twin, case by case and draw
by draw. Scores are averaged in this order: classes of a case, cases of a subject, subjects and
draws. A class that is absent from truth and prediction has no score and is not averaged; cases
that the checkpoint has seen in pretraining are left out and counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from finetune.anchor import ANCHOR, Anchor, Labels, read_anchors
from finetune.budget import MARGIN, Curve, mean_curve, read_budget, read_curve
from finetune.comparisons import holm_by_family, median_difference, share_improved, suitability
from finetune.intervals import Estimate, estimate, estimate_folds
from finetune.rows import Row, read_rows

ALL_CLASSES = "mean"
ELSEWHERE = "predicted elsewhere"


@dataclass(frozen=True)
class Metric:
    """How a column of the rows is reported."""

    name: str
    title: str
    scale: float
    unit: str
    higher_is_better: bool
    best: float
    """The end of the scale that no interval of a mean goes beyond."""
    of_lesions: bool = False
    """Whether only classes that are made of lesions have it."""


METRICS = (
    Metric("dsc", "Dice", 100.0, "points", True, 100.0),
    Metric("nsd", "Surface Dice", 100.0, "points", True, 100.0),
    Metric("hd95", "HD95", 1.0, "mm", False, 0.0),
    Metric("assd", "ASSD", 1.0, "mm", False, 0.0),
    Metric("volume_difference_ml", "Volume difference", 1.0, "ml", False, 0.0),
    Metric("lesion_f1", "Lesion F1", 100.0, "points", True, 100.0, of_lesions=True),
    Metric("lesion_pq", "Lesion PQ", 100.0, "points", True, 100.0, of_lesions=True),
)


Scores = dict[tuple[str, str], float]
"""(case, draw) to a score."""

BETTER, WORSE, UNCLEAR = "pretrained better", "scratch better", "no clear difference"
LEVEL = 0.05

Run = tuple[str, ...]
"""What tells a run among others: data set, split, labels, recipe, arm, draw."""
LabelDraw = tuple[str, str, str, int]
"""Data set, split hash, labels and label seed."""

SEEN = "tainted"
"""The verdict where pretraining has seen every test case."""

NOTHING = estimate(np.empty((0, 0)), 0)
"""What is known where every case had to be left out."""


@dataclass(frozen=True)
class Line:
    """One comparison: a checkpoint against its scratch twin in one metric and class.

    `class_name` is "mean" for the mean over classes. Estimates are in the metric's reported unit
    (Dice points, mm); `difference` is pretrained minus its scratch twin, `against_own` pretrained
    minus scratch at its own best recipe (`own`). What is missing is None. `improved` is the share
    of subjects that gain over the twin, `median` the median over subjects of the difference to it.
    `adjusted_p` stands in main lines alone: p of the deciding difference, adjusted over the data
    sets (Holm 1979). `split` is name and part, `recipe` the hash of all that arms share.
    `still_gains` is what the last quarter of training gained on validation, in Dice points and in
    the arm that gained most, NaN where runs were not validated: above 0.5 it was too short.
    `anchor` is nnU-Net's Dice over the cases of the difference; one run, so it has no interval.
    `leakage` says of a checkpoint whether it has seen test cases: clean, tainted (these cases are
    left out) or unknown.
    """

    dataset: str
    labels: str
    n_labels: int
    steps: int
    checkpoint: str
    checkpoint_digest: str
    metric: str
    class_name: str
    pretrained: Estimate | None
    scratch: Estimate | None
    difference: Estimate | None
    improved: float
    verdict: str
    own: Estimate | None = None
    against_own: Estimate | None = None
    own_is_stronger: bool = False
    median: float = math.nan
    adjusted_p: float = math.nan
    split: str = ""
    protocol: str = ""
    recipe: str = ""
    still_gains: float = math.nan
    anchor: Estimate | None = None
    leakage: str = ""

    @property
    def decides(self) -> Estimate | None:
        """The difference that the verdict is about: to the stronger of both scratch arms."""
        return self.against_own if self.own_is_stronger else self.difference


@dataclass(frozen=True)
class Group:
    """All lines of one checkpoint on one data set with one label count, and what to know of it."""

    dataset: str
    labels: str
    n_labels: int
    checkpoint: str
    lines: tuple[Line, ...]
    scores: dict[str, dict[tuple[str, str], float]] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> Line:
        """Dice over all classes: what the verdict is about."""
        return self.lines[0]

    @property
    def sentence(self) -> str:
        """The verdict with its numbers."""
        return _sentence(self)


@dataclass(frozen=True)
class Table:
    """Groups in the order of data set, labels, checkpoint."""

    groups: tuple[Group, ...]

    @property
    def lines(self) -> list[Line]:
        """The lines of all groups."""
        return [line for group in self.groups for line in group.lines]

    @property
    def verdict(self) -> str:
        """One sentence for each group."""
        return " ".join(group.sentence for group in self.groups)

    def to_dict(self) -> dict[str, object]:
        """Plain data, as table.json holds it."""
        return _plain(self)


def read_table(runs: Sequence[Path], anchor: str = "") -> Table:
    """The table of finished runs, written nowhere.

    Args:
        runs: run folders of finetune (or their rows.csv), or folders that hold such folders.
        anchor: summary.json of nnU-Net, as `read_anchors` takes it; none by default.

    Raises:
        InputError: a folder has no rows, two runs are the same arm and seed, or the anchor does not
            fit the runs.
    """
    rows: list[Row] = []
    values: dict[str, dict[str, Labels]] = {}
    unlabelled: dict[LabelDraw, Sequence[str]] = {}
    curves: dict[Run, Curve] = {}
    for path in find_rows(runs):
        found, facts, curve = read_rows(path), _facts(path), read_curve(path.parent)
        rows += found
        for row in found[:1]:
            if curve is not None:
                curves[_run(row)] = curve
            if "classes_without_label" in facts:
                unlabelled[_label_draw(row)] = facts["classes_without_label"]
            if task := facts.get("recipe", {}).get("task"):
                classes = task["regions"] or task["classes"]
                values[row.dataset] = {c["name"]: frozenset(c["values"]) for c in classes}
    return tabulate(rows, read_anchors(anchor, values) if anchor else {}, unlabelled, curves)


def _facts(rows: Path) -> dict[str, Any]:
    """The run.json beside a rows.csv; rows that were made or moved elsewhere have none."""
    path = rows.with_name("run.json")
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it, or remove it") from error


def find_rows(runs: Sequence[Path]) -> list[Path]:
    """The rows.csv of each run.

    Raises:
        InputError: names every path that leads to none.
    """
    found: list[Path] = []
    problems = []
    for run in runs:
        if run.is_file():
            found.append(run)
            continue
        if not run.is_dir():
            problems.append(f"{run}: no such folder; give finetuning runs, or a folder of them")
            continue
        here = [run / "rows.csv"] if (run / "rows.csv").is_file() else []
        here = here or sorted(run.glob("*/rows.csv"))
        if not here:
            problems.append(
                f"{run}: no rows.csv in it or one level below; expected finetune runs that have "
                "finished (an unfinished one goes on with the same command)"
            )
        found += here
    if not runs:
        problems.append("no run folder was given")
    if problems:
        raise InputError(problems)
    return list(dict.fromkeys(path.resolve() for path in found))


def tabulate(
    rows: Sequence[Row],
    anchors: Mapping[str, Anchor] | None = None,
    unlabelled: Mapping[LabelDraw, Sequence[str]] | None = None,
    curves: Mapping[Run, Curve] | None = None,
) -> Table:
    """Compares arms within each group of rows.

    Args:
        rows: of all runs.
        anchors: of data sets.
        unlabelled: the classes that no labelled case of a draw has.
        curves: validation Dice over the steps of those runs that have it.

    Raises:
        InputError: an arm holds the same case, class and seed twice, or an anchor does not fit.
    """
    versions = sorted({row.metric_version for row in rows})
    if len(versions) > 1:
        raise InputError(
            f"rows with metric versions {versions} cannot be compared; "
            "score the kept predictions again with `voxelith evaluate`"
        )
    twins: dict[tuple[str, str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        arms = twins.setdefault((row.dataset, _whole(row), row.labels, row.config_hash), {})
        arms.setdefault(_arm(row), []).append(row)
    groups = []
    order = sorted(twins.items(), key=lambda item: (item[0][0], _labels(item[1]), item[0]))
    for (dataset, *_), arms in order:
        scratch, own = arms.pop("scratch", []), arms.pop("scratch-own", [])
        anchor = (anchors or {}).get(dataset)
        for others in [found for _, found in sorted(arms.items())] or [[]]:
            group = _group(others, scratch, own, anchor)
            missing = _without_label(others + scratch + own, unlabelled or {})
            group = dataclasses.replace(group, notes=(*group.notes, *missing))
            groups.append(_with_budget(group, others, scratch, curves or {}))
    return Table(tuple(_adjusted(groups)))


def _adjusted(groups: list[Group]) -> list[Group]:
    """The main lines with p values adjusted over the data sets of a checkpoint and its labels."""
    mains = [group.main for group in groups]
    adjusted = holm_by_family(
        [(one.checkpoint_digest, one.labels, one.split, one.protocol) for one in mains],
        [math.nan if line.decides is None else line.decides.p for line in mains],
    )
    return [_with_p(group, p) for group, p in zip(groups, adjusted, strict=True)]


def _with_p(group: Group, p: float) -> Group:
    """The group with its adjusted p, which takes back a verdict that chance over many explains."""
    main, notes = dataclasses.replace(group.main, adjusted_p=p), group.notes
    if main.verdict in (BETTER, WORSE) and p >= LEVEL:
        assert main.decides is not None
        notes += (
            f"{main.verdict} by itself (p {main.decides.p:.2g}), not among the data sets that this "
            f"checkpoint is compared on (p {p:.2g}, Holm)",
        )
        main = dataclasses.replace(main, verdict=UNCLEAR)
    return dataclasses.replace(group, lines=(main, *group.lines[1:]), notes=notes)


def _whole(row: Row) -> str:
    """What is averaged over: a split, or the folds of a corpus, each scored on its validation."""
    return "folds" if re.fullmatch(r"fold-\d+/validation", row.split) else row.split_hash


def _run(row: Row) -> Run:
    return (row.dataset, row.split_hash, row.labels, row.config_hash, _arm(row), row.draw)


def _arm(row: Row) -> str:
    return row.arm if row.arm in ("scratch", "scratch-own") else _name(row)


def _with_budget(
    group: Group, pretrained: list[Row], scratch: list[Row], curves: Mapping[Run, Curve]
) -> Group:
    """The group with what its arms' curves say: whether training ended, and who was faster."""
    a, b = (
        mean_curve([curves.get(run) for run in dict.fromkeys(map(_run, rows))])
        for rows in (pretrained, scratch)
    )
    gains = {arm: c.last_gain for arm, c in (("pretrained", a), ("scratch", b)) if c is not None}
    if not gains:
        return group
    notes = []
    if a is not None and b is not None:
        read = read_budget(a, b)
        speed = f", {read.speed:.1f} times as fast" if math.isfinite(read.speed) else ""
        sure = group.main.verdict in (BETTER, WORSE)
        said: str = read.reading if sure or "generalises" not in read.reading else "ends apart"
        chance = "" if sure or said == read.reading else ", no more than chance may do"
        notes.append(
            f"validation Dice over training: {said}, {read.gap:+.1f} points at the end"
            f"{chance}{speed}"
        )
    notes += [
        f"not converged: the last quarter of training still gained {arm} {gain:.1f} points"
        for arm, gain in gains.items()
        if gain > MARGIN
    ]
    lines = [dataclasses.replace(line, still_gains=max(gains.values())) for line in group.lines]
    return dataclasses.replace(group, lines=tuple(lines), notes=(*group.notes, *notes))


def _labels(arms: dict[str, list[Row]]) -> int:
    return next(iter(arms.values()))[0].n_labels


def _name(row: Row) -> str:
    return f"{row.arm}:{row.checkpoint_digest}:{row.checkpoint}"


def _group(
    pretrained: list[Row], scratch: list[Row], own: list[Row], anchor: Anchor | None
) -> Group:
    head = (pretrained or scratch or own)[0]
    tainted = {row.case for row in pretrained if row.status == "tainted"}
    all_seen = bool(pretrained) and tainted == {row.case for row in pretrained}
    leakage = _leakage(pretrained)
    notes = []
    if tainted:
        notes.append(f"{len(tainted)} test cases were seen in pretraining and are left out")
    if leakage == "unknown":
        notes.append("whether the checkpoint has seen the test cases is unknown: it does not say")
    if anchor is not None and (more := anchor.left_over(pretrained + scratch + own)):
        notes.append(f"{ANCHOR}: {more} cases of {anchor.path.name} are no test cases, left out")
    pretrained, scratch, own = (
        [row for row in rows if row.case not in tainted] for rows in (pretrained, scratch, own)
    )
    rows = pretrained + scratch + own
    given = anchor.rows(rows) if anchor is not None else []
    notes += _wrong(head.arm, pretrained) + _wrong("scratch", scratch)
    notes += _wrong("scratch at its own best", own)
    classes = list(dict.fromkeys(row.class_name for row in pretrained or scratch or own))
    every = (pretrained, scratch, own)
    invented = [_invented(found) for found in every]
    folds = {row.case: row.split for row in rows}
    subjects = _subjects(rows)
    columns = [ALL_CLASSES, *classes] if len(classes) > 1 else [ALL_CLASSES]
    scores: dict[str, Scores] = {}
    lines = []
    for metric in METRICS:
        for name in columns:
            a, b, c = (
                _scores(found, metric, name, wrong)
                for found, wrong in zip(every, invented, strict=True)
            )
            n = _scores(given, metric, name, _invented(given)) if metric.name == "dsc" else {}
            if metric.of_lesions and not a and not b:
                continue
            gaps = [
                _differences(pretrained, found, metric, name, invented[0] | wrong)
                for found, wrong in zip(every[1:], invented[1:], strict=True)
            ]
            if metric.name == "dsc" and name == ALL_CLASSES:
                scores = {"pretrained": a, "scratch": b}
                notes += _gaps(a, b) + _unsuitable((a, b, c), subjects)
            line = _line(head, metric, name, (a, b, c, n), gaps, subjects, folds)
            verdict = SEEN if all_seen else line.verdict
            lines.append(dataclasses.replace(line, verdict=verdict, leakage=leakage))
    notes += _power(lines[0])
    return Group(
        head.dataset,
        head.labels,
        head.n_labels,
        head.checkpoint,
        tuple(lines),
        scores,
        tuple(notes),
    )


def _leakage(rows: list[Row]) -> str:
    """What is known of a checkpoint and the test cases; nothing of predictions from elsewhere."""
    if any(row.status == "tainted" for row in rows):
        return "tainted"
    found = {row.status for row in rows if row.arm == "pretrained"}
    return "unknown" if "unknown" in found else "clean" if found else ""


def _label_draw(row: Row) -> LabelDraw:
    return row.dataset, row.split_hash, row.labels, row.label_seed


def _without_label(rows: list[Row], unlabelled: Mapping[LabelDraw, Sequence[str]]) -> list[str]:
    """Which classes have no labelled case, and in which draws: there, nobody could learn them."""
    seeds: dict[str, list[str]] = {}
    for draw in sorted({_label_draw(row) for row in rows}):
        for name in unlabelled.get(draw, ()):
            seeds.setdefault(name, []).append(str(draw[-1]))
    return [
        f"no labelled case has {name} in label draw {', '.join(n)}" for name, n in seeds.items()
    ]


def _unsuitable(arms: Sequence[Scores], subjects: dict[str, str]) -> list[str]:
    """What speaks against deciding between the arms on this data set."""
    present = [scores for scores in arms if scores]
    cells = set.intersection(*(set(scores) for scores in present)) if len(present) > 1 else set()
    tables = [_matrix({cell: scores[cell] for cell in cells}, subjects) for scores in present]
    if not cells or not tables[0][1]:
        return []
    means = np.array([table.mean(axis=0) for table, _ in tables])
    flags = suitability(means, tables[0][1]).flags
    return [f"suitability: {'; '.join(flags)}"] if flags else []


def _wrong(arm: str, rows: list[Row]) -> list[str]:
    """What an arm missed or invented."""
    words = {"missed": "missed a structure", "false_positive": "invented a structure"}
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in words}
    return [f"{arm} {words[name]} {n} times (scored 0)" for name, n in counts.items() if n]


def _subjects(rows: Iterable[Row]) -> dict[str, str]:
    return {row.case: row.subject for row in rows}


def _differences(
    a: list[Row],
    b: list[Row],
    metric: Metric,
    class_name: str,
    invented: Collection[tuple[str, int]],
) -> Scores:
    """(case, draw) to the score of one arm minus another's.

    Where a run of either `invented` a structure that is not there, finding nothing is the best:
    otherwise the two would be compared over other classes, or the case with the invention would
    drop out.
    """
    first, second = (_scores(rows, metric, class_name, invented) for rows in (a, b))
    return {cell: first[cell] - second[cell] for cell in first.keys() & second.keys()}


def _invented(rows: list[Row]) -> set[tuple[str, int]]:
    """Case and class of structures that are not there and that some run found."""
    return {(row.case, row.class_value) for row in rows if row.outcome == "false_positive"}


def _scores(
    rows: list[Row], metric: Metric, class_name: str, invented: Collection[tuple[str, int]]
) -> Scores:
    """(case, draw) to the score, meaned over classes; cases without any score are absent.

    Args:
        rows: of one arm.
        metric: the column.
        class_name: a class, or all of them.
        invented: case and class of structures that this arm, or the one that it is compared
            with, found where there are none; see `_differences`.
    """
    values: dict[tuple[str, str], list[float]] = {}
    seen: set[tuple[str, str, int]] = set()
    for row in rows:
        cell = (row.case, row.draw, row.class_value)
        if cell in seen:
            raise InputError(
                f"{row.arm} of {row.checkpoint or row.dataset}, labels={row.labels}, seed="
                f"{row.draw}: case {row.case} occurs twice; two runs of the same settings were "
                "given, leave one out"
            )
        seen.add(cell)
        if metric.of_lesions and row.lesion_tp < 0:
            continue
        if class_name in (ALL_CLASSES, row.class_name):
            value = metric.scale * getattr(row, metric.name)
            if row.outcome == "true_negative" and (row.case, row.class_value) in invented:
                value = metric.best
            if not math.isnan(value):
                values.setdefault((row.case, row.draw), []).append(value)
    return {cell: float(np.mean(found)) for cell, found in values.items()}


def _line(
    head: Row,
    metric: Metric,
    class_name: str,
    arms: tuple[Scores, Scores, Scores, Scores],
    differences: list[Scores],
    subjects: dict[str, str],
    folds: dict[str, str],
) -> Line:
    a, b, c, anchor = arms
    difference, against_own = (
        _estimate(one, subjects, folds) if one else None for one in differences
    )
    paired, _ = _matrix(differences[0], subjects)
    shared = _complete(differences[0] or a or b or c)
    anchor = {cell: value for cell, value in anchor.items() if cell[0] in shared}
    names = set(folds.values())
    sign = 1 if metric.higher_is_better else -1
    scratch, own = (_estimate(one, subjects, folds) if one else None for one in (b, c))
    if scratch is None:
        against_own = None  # no delta without a twin
    own_is_stronger = (
        own is not None and scratch is not None and sign * own.mean > sign * scratch.mean
    )
    decides = against_own if own_is_stronger else difference
    return Line(
        head.dataset,
        head.labels,
        head.n_labels,
        head.steps,
        head.checkpoint,
        head.checkpoint_digest,
        metric.name,
        class_name,
        _bounded(_estimate(a, subjects, folds), metric) if a else None,
        _bounded(scratch, metric) if scratch else None,
        difference,
        share_improved(paired, higher_is_better=metric.higher_is_better),
        ELSEWHERE
        if head.arm == "external"
        else _verdict(decides, sign, has_scratch=bool(b), has_pretrained=bool(a)),
        own=_bounded(own, metric) if own else None,
        against_own=against_own,
        own_is_stronger=own_is_stronger,
        median=median_difference(paired),
        split=head.split if len(names) < 2 else f"{len(names)} folds/validation",
        protocol=head.protocol,
        recipe=head.config_hash[:8],
        anchor=_estimate(anchor, subjects, {}) if anchor else None,
    )


def _estimate(scores: Scores, subjects: dict[str, str], folds: dict[str, str]) -> Estimate:
    """Over subjects and draws; where the cases lie in several `folds`, over folds."""
    parts: dict[str, Scores] = {}
    for cell, value in scores.items():
        parts.setdefault(folds.get(cell[0], ""), {})[cell] = value
    found = [_matrix(part, subjects) for _, part in sorted(parts.items())]
    if len(found) == 1:
        return estimate(*found[0])
    return estimate_folds([matrix for matrix, _ in found], sum(cases for _, cases in found))


def _bounded(value: Estimate, metric: Metric) -> Estimate:
    """With an interval that ends where the scale does; Student's knows no end."""
    high = min(value.high, metric.best) if metric.higher_is_better else value.high
    return dataclasses.replace(value, low=max(value.low, 0.0), high=high)


def _matrix(
    scores: dict[tuple[str, str], float], subjects: dict[str, str]
) -> tuple[NDArray[np.float64], int]:
    """[subjects, draws] of the cases that every draw has scored, and how many cases these are."""
    draws = sorted({draw for _, draw in scores})
    complete = _complete(scores)
    by_subject: dict[str, list[list[float]]] = {}
    for case in complete:
        by_subject.setdefault(subjects[case], []).append([scores[case, draw] for draw in draws])
    if not by_subject:
        return np.empty((0, len(draws))), 0
    return np.array([np.mean(rows, axis=0) for rows in by_subject.values()]), len(complete)


def _complete(scores: Scores) -> list[str]:
    """The cases that every draw has scored."""
    draws = {draw for _, draw in scores}
    cases = sorted({case for case, _ in scores})
    return [case for case in cases if all((case, draw) in scores for draw in draws)]


def _gaps(a: dict[tuple[str, str], float], b: dict[tuple[str, str], float]) -> list[str]:
    """What could not be paired."""
    if not a or not b:
        return []
    notes = []
    draws_a, draws_b = {draw for _, draw in a}, {draw for _, draw in b}
    alone = sorted(draws_a ^ draws_b)
    if alone:
        notes.append(f"seeds {', '.join(map(str, alone))} have one arm only: not in the difference")
    common = draws_a & draws_b
    unpaired = {case for case, draw in a.keys() ^ b.keys() if draw in common}
    if unpaired:
        notes.append(f"{len(unpaired)} cases lack a score in one arm: not in the difference")
    return notes


def _verdict(
    difference: Estimate | None, sign: int, *, has_scratch: bool, has_pretrained: bool
) -> str:
    if not has_pretrained:
        return "no pretrained arm"
    if not has_scratch:
        return "no scratch twin"
    if difference is None:
        return "nothing to pair"
    if not difference.has_interval:
        return "undecided"
    if difference.low <= 0 <= difference.high:
        return UNCLEAR
    return BETTER if sign * difference.mean > 0 else WORSE


# Text


def _sentence(group: Group) -> str:
    line = group.main
    what = f"{group.dataset}, {group.n_labels} labels"
    what += f", {group.checkpoint}" if group.checkpoint else ""
    if line.verdict == ELSEWHERE and line.pretrained is not None:
        given = line.pretrained
        return f"{group.dataset}, {group.checkpoint}: Dice {given.mean:.1f} ({_basis(given)})."
    if line.difference is None or line.pretrained is None or line.scratch is None:
        missing = {
            SEEN: "every test case was seen in pretraining, so there is nothing to believe.",
            "no scratch twin": "no difference is shown without a scratch twin "
            "(run the same with init=scratch).",
            "no pretrained arm": "only the scratch arm is there.",
        }.get(line.verdict, "the arms share no case and seed.")
        return f"{what}: {missing}"
    d = line.decides or line.difference
    arms = f"Dice {line.pretrained.mean:.1f} pretrained, {line.scratch.mean:.1f} scratch"
    if line.own is not None:
        arms += f", {line.own.mean:.1f} scratch at its own best"
    basis = _basis(d)
    if not d.has_interval:
        return f"{what}: undecided, {arms}, difference {d.mean:+.1f} ({basis}; {d.note})."
    interval = f"difference {d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}] points ({basis})"
    return f"{what}: {line.verdict}, {arms}, {interval}."


def _power(line: Line) -> list[str]:
    """What a comparison of this size could have found."""
    found = line.decides
    if found is None or not found.has_interval:
        return []
    chances = " and ".join(f"{found.power(d):.0%} for +{d}" for d in (2, 5))
    return [
        f"a true difference would be found with a chance of {chances} Dice points, of 80% from "
        f"{found.detectable():.1f} points on"
    ]


def _basis(value: Estimate) -> str:
    subjects = f" of {value.units} subjects" if value.units != value.cases else ""
    folds = f", {value.folds} folds" if value.folds > 1 else ""
    return f"{value.cases} cases{subjects}{folds}, {value.draws} seed{'s' * (value.draws != 1)}"


def _plain(table: Table) -> dict[str, object]:
    groups = []
    for group in table.groups:
        groups.append(
            {
                "dataset": group.dataset,
                "labels": group.labels,
                "n_labels": group.n_labels,
                "checkpoint": group.checkpoint,
                "protocol": group.main.protocol,
                "verdict": group.main.verdict,
                "sentence": group.sentence,
                "notes": list(group.notes),
                "lines": [_without_nan(dataclasses.asdict(line)) for line in group.lines],
            }
        )
    return {"format": 1, "verdict": table.verdict, "groups": groups}


def _without_nan(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
