"""The table: what pretraining was worth, from the rows of finished runs.

Rows meet in a group when they share data set, split, labels and recipe (`config_hash`). In a
group, each checkpoint's pretrained arm is compared with the scratch twin, case by case and draw
by draw. Scores are averaged in this order: classes of a case, cases of a subject, subjects and
draws. A class that is absent from truth and prediction has no score and is not averaged; cases
that the checkpoint has seen in pretraining are left out and counted. Answers for whole scans are
compared in the same way (`scan_metrics`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import InputError, named
from finetune.anchor import ANCHOR, Anchor, read_anchors
from finetune.budget import MARGIN, Curve, mean_curve, read_budget
from finetune.cells import (
    Parts,
    Scores,
    case_scores,
    complete_cases,
    independent_draws,
    invented_structures,
    mean_scores,
    merged,
    score_cube,
    score_differences,
    score_matrix,
    subjects_of,
)
from finetune.comparisons import holm_by_family, median_difference, share_improved
from finetune.costs import cost_note
from finetune.facts import Facts, Run, arm_of, find_rows, read_run, refuse_mixed, run_of
from finetune.intervals import (
    LEVEL,
    Estimate,
    estimate,
    estimate_folds,
    estimate_recipe,
    without_interval,
)
from finetune.lines import (
    ALL_CLASSES,
    BETTER,
    CLASSIFICATION,
    ELSEWHERE,
    NO_PRETRAINED,
    NO_TWIN,
    OWN,
    SEEN,
    UNCLEAR,
    UNDECIDED,
    UNDEFINED,
    WORSE,
    Group,
    Line,
    Metric,
    Table,
    metrics_of,
    shown_digits,
)
from finetune.notes import (
    draws_that_count,
    few_subjects,
    folds_of_one_class,
    missed_or_invented,
    not_compared,
    not_enough,
    power_of,
    rounded_otherwise,
    too_few_of_a_class,
    unpaired,
    unsuitable,
    untested_classes,
    what_leaked,
    without_label,
)
from finetune.rows import Row
from finetune.search import Search, read_searches, search_notes

TWINS = ("pretrained", "scratch")
"""The arms whose runs are pairs."""


def read_table(runs: Sequence[Path], anchor: str = "", search: Path | None = None) -> Table:
    """The table of finished runs, written nowhere.

    Args:
        runs: run folders of finetune (or their rows.csv), or folders that hold such folders.
        anchor: summary.json of nnU-Net, as `read_anchors` takes it; none by default.
        search: folder of the runs in which rates were chosen; none by default.

    Raises:
        InputError: a folder has no rows, two runs are the same arm and seed, runs of one arm have
            several recipes or a fold several splits, or the anchor does not fit the runs.
    """
    rows: list[Row] = []
    facts: dict[Run, Facts] = {}
    for path in find_rows(runs):
        found, known = read_run(path)
        rows += found
        facts |= {run_of(row): known for row in found[:1]}
    classes = {dataset: known.classes for (dataset, *_), known in facts.items() if known.classes}
    anchors = read_anchors(anchor, classes) if anchor else {}
    return tabulate(
        rows, anchors, facts, named("search", search, read_searches) if search else None
    )


def tabulate(
    rows: Sequence[Row],
    anchors: Mapping[str, Anchor] | None = None,
    facts: Mapping[Run, Facts] | None = None,
    searches: Mapping[str, Search] | None = None,
) -> Table:
    """Compares arms within each group of rows.

    Args:
        rows: of all runs.
        anchors: of data sets.
        facts: what run folders say beside their rows.
        searches: the runs in which the rates of each data set were chosen.

    Raises:
        InputError: an arm holds the same case, class and seed twice, or several recipes, a fold
            has several splits, or an anchor does not fit.
    """
    versions = sorted({row.metric_version for row in rows})
    if len(versions) > 1:
        raise InputError(
            f"rows with metric versions {versions} cannot be compared; "
            "start the runs of the older one again: they score their kept predictions anew and "
            "train nothing"
        )
    twins: dict[tuple[str, str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        arms = twins.setdefault((row.dataset, _whole(row), row.labels, row.config_hash), {})
        arms.setdefault(arm_of(row), []).append(row)
    groups: list[Group] = []
    curves: list[Mapping[str, Mapping[str, Curve]]] = []
    order = sorted(twins.items(), key=lambda item: (item[0][0], _labels(item[1]), item[0]))
    for (dataset, *_), arms in order:
        refuse_mixed(row for found in arms.values() for row in found)
        scratch, own = arms.pop("scratch", []), arms.pop("scratch-own", [])
        anchor = (anchors or {}).get(dataset)
        checkpoints = [found for _, found in sorted(arms.items(), key=_by_name)]
        for others in [[one] for one in checkpoints or [[]]] + recipes(checkpoints):
            alone = _alone(others, scratch)
            if len(others) - len(alone) < 2 <= len(others):
                continue  # no recipe is left, and each checkpoint has a line of its own
            paired = [one for one in others if one not in alone]
            pretrained = [row for one in paired for row in one]
            group = _group(paired, scratch, own, anchor)
            if alone:
                names = ", ".join(one[0].checkpoint for one in alone)
                note = f"left out of the recipe, no seed in common with scratch: {names}"
                group = dataclasses.replace(group, notes=(*group.notes, note))
            found = {"pretrained": pretrained, "scratch": scratch, "scratch-own": own}
            groups.append(_with_facts(group, found, facts or {}, searches))
            curves.append({arm: _curves(found[arm], facts or {}) for arm in TWINS})
    told = _adjusted(_told_apart(groups, facts or {}))
    return Table(tuple(map(_with_budget, told, curves)))


def _alone(recipe: Sequence[list[Row]], scratch: Sequence[Row]) -> list[list[Row]]:
    """The checkpoints of a recipe that have no draw in common with scratch: they are no pairs."""
    draws = {row.draw for row in scratch}
    if len(recipe) < 2 or not draws:
        return []
    return [one for one in recipe if draws.isdisjoint(row.draw for row in one)]


def _by_name(arm: tuple[str, list[Row]]) -> tuple[str, str]:
    """Checkpoints in the order of their names; of one name, by their digests."""
    key, rows = arm
    return rows[0].checkpoint, key


def _told_apart(groups: Sequence[Group], facts: Mapping[Run, Facts]) -> list[Group]:
    """Groups that differ in nothing but their recipe with what differs in it, such as its rate."""
    known_recipes = {
        config_hash[:8]: _flat(known.trained)
        for (*_, config_hash, arm, _), known in facts.items()
        if known.trained and arm != "scratch-own"
    }
    alike: dict[tuple[Any, ...], dict[str, dict[str, str]]] = {}
    for group in groups:
        recipe = group.main.recipe
        alike.setdefault(group.but_recipe, {})[recipe] = known_recipes.get(recipe, {})

    def departs(group: Group) -> str:
        others = alike[group.but_recipe]
        if not all(others.values()):
            return ""  # a folder does not say its recipe: what differs is not known
        own = others[group.main.recipe]
        keys = [key for key in own if len({one.get(key) for one in others.values()}) > 1]
        return ", ".join(f"{key}={own[key]}" for key in keys)

    return [
        dataclasses.replace(
            group,
            lines=tuple(dataclasses.replace(line, departs=departs(group)) for line in group.lines),
        )
        for group in groups
    ]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Keys with dots to values, as one types them."""
    found: dict[str, str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            found[prefix + key] = f"{value:g}"
        else:
            found[prefix + key] = json.dumps(value).replace('"', "")
    return found


def recipes(checkpoints: Sequence[list[Row]]) -> list[list[list[Row]]]:
    """Those checkpoints that are one pretraining but for its seed, together: a recipe's own line.

    A checkpoint that does not say how it was made belongs to none. Of two with the same seed the
    first counts: they are no two draws of anything.
    """
    found: dict[str, dict[int, list[Row]]] = {}
    for rows in checkpoints:
        if rows[0].pretrain_recipe:
            found.setdefault(rows[0].pretrain_recipe, {}).setdefault(rows[0].pretrain_seed, rows)
    return [[one for _, one in sorted(seeds.items())] for seeds in found.values() if len(seeds) > 1]


def _adjusted(groups: list[Group]) -> list[Group]:
    """The main lines with p values adjusted over the data sets of a checkpoint and its labels."""
    mains = [group.main for group in groups]
    families = [
        (one.checkpoint_digest, one.labels, one.protocol, _is_look(one.split)) for one in mains
    ]
    adjusted = holm_by_family(families, [line.p for line in mains])
    tested = Counter(
        one for one, line in zip(families, mains, strict=True) if not math.isnan(line.p)
    )
    return [
        _with_p(group, p, tested[one])
        for group, p, one in zip(groups, adjusted, families, strict=True)
    ]


def _is_look(split: str) -> bool:
    """Whether a split is one of validation cases, to choose by; all folds of them are a result."""
    return split.endswith("/validation") and not re.match(r"\d+ folds/", split)


def _with_p(group: Group, p: float, tested: int) -> Group:
    """The group with its adjusted p, which takes back a verdict that chance over many explains.

    Args:
        group: with the p of its main line by itself.
        p: adjusted.
        tested: how many comparisons p is adjusted over.
    """
    main, notes = group.main.adjusted(p), group.notes
    if tested > 1 and not math.isnan(p):
        notes += (f"p is adjusted over {tested} comparisons (Holm); chances are those of one",)
    if main.verdict != group.main.verdict:
        notes += (
            f"{group.main.verdict} by itself (p {main.p:.2g}), not among the data sets that this "
            f"checkpoint is compared on (p {p:.2g}, Holm)",
        )
    return dataclasses.replace(group, lines=(main, *group.lines[1:]), notes=notes)


def _whole(row: Row) -> str:
    """What is averaged over: a split, or the folds of a corpus, each scored on its validation."""
    fold = re.fullmatch(r"fold-\d+/validation", row.split)
    # All parts of a split share its hash, and predictions of other tools have no recipe to differ.
    return "folds" if fold else f"{row.split_hash} {row.split}"


def _with_facts(
    group: Group,
    arms: Mapping[str, list[Row]],
    facts: Mapping[Run, Facts],
    searches: Mapping[str, Search] | None,
) -> Group:
    """The group with what the folders of its runs say, and the runs in which rates were chosen."""
    known = {
        arm: [facts.get(run) for run in dict.fromkeys(map(run_of, rows))]
        for arm, rows in arms.items()
    }
    every = [row for rows in arms.values() for row in rows]
    notes = without_label(every, facts) + few_subjects(every, facts)
    notes += not_compared(arms["pretrained"], facts) if arms.get("pretrained") else []
    notes += search_notes(arms, known, searches)
    twins = [one for arm in TWINS for one in known[arm] if one is not None]
    if costs := [one.cost for one in twins if one.cost is not None]:
        notes.append(cost_note(costs))
    notes += rounded_otherwise({arm: arms.get(arm, []) for arm in TWINS}, facts)
    if seen := {key for one in twins for key in one.validation_seen}:
        notes.append(
            f"{len(seen)} validation cases were seen in pretraining: its curve is not read"
        )
    return dataclasses.replace(group, notes=(*group.notes, *notes))


def _curves(rows: Sequence[Row], facts: Mapping[Run, Facts]) -> dict[str, Curve]:
    """The curve of each draw of an arm, the mean over its checkpoints.

    None if one is not known, or is of cases that pretraining has seen.
    """
    runs: dict[str, dict[Run, Curve | None]] = defaultdict(dict)
    for row in rows:
        known = facts.get(run_of(row))
        told = known is not None and not known.validation_seen
        runs[row.draw][run_of(row)] = known.curve if known is not None and told else None
    if mean_curve([curve for found in runs.values() for curve in found.values()]) is None:
        return {}
    means = {draw: mean_curve(list(found.values())) for draw, found in runs.items()}
    return {draw: mean for draw, mean in means.items() if mean is not None}


def _with_budget(group: Group, by_draw: Mapping[str, Mapping[str, Curve]]) -> Group:
    """The group with what its arms' curves say: whether training ended, and who was faster."""
    means = {arm: mean_curve(list(found.values())) for arm, found in by_draw.items()}
    curves = {arm: curve for arm, curve in means.items() if curve is not None}
    gains = {arm: curve.last_gain for arm, curve in curves.items()}
    if not gains:
        return group
    notes = []
    first, second = by_draw["pretrained"], by_draw["scratch"]
    both = sorted(first.keys() & second.keys())
    if both and first[both[0]].steps == second[both[0]].steps:
        read = read_budget([first[draw] for draw in both], [second[draw] for draw in both])
        # A test over draws alone takes the checkpoints as they are.
        whose = " of these checkpoints" if group.of_recipe else ""
        speed = f", {read.speed:.1f} times as fast (p {read.p:.2g}{whose})"
        speed = speed if math.isfinite(read.speed) else ""
        # The curves are of the twin: the test has to find the same of it, and not take it back.
        clear = _sign_of(group.main.difference) * read.gap > 0
        sure = clear and group.main.verdict == (BETTER if read.gap > 0 else WORSE)
        said: str = read.reading if sure or "generalises" not in read.reading else "ends apart"
        chance = "" if clear or said == read.reading else ", no more than chance may do"
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
    notes = [*group.notes, *notes]
    return dataclasses.replace(group, lines=tuple(lines), notes=tuple(notes), curves=curves)


def _sign_of(difference: Estimate | None) -> int:
    """Of a difference whose interval leaves zero out; else 0."""
    if difference is None or not difference.has_interval:
        return 0
    return int(difference.low > 0) - int(difference.high < 0)


def _labels(arms: dict[str, list[Row]]) -> int:
    return next(iter(arms.values()))[0].n_labels


def _group(
    checkpoints: Sequence[list[Row]], scratch: list[Row], own: list[Row], anchor: Anchor | None
) -> Group:
    """What one checkpoint is worth, or several of one recipe."""
    given = [row for rows in checkpoints for row in rows]
    tainted = {row.case for row in given if row.status == "tainted"}
    all_seen = bool(given) and tainted == {row.case for row in given}
    leakage = what_leaked(given)
    head = _head(checkpoints, scratch, own)
    notes = []
    if tainted:
        notes.append(f"{len(tainted)} test cases were seen in pretraining and are left out")
    if leakage == "unknown":
        notes.append("whether the checkpoint has seen the test cases is unknown: it does not say")
    if anchor is not None and (more := anchor.left_over(given + scratch + own)):
        notes.append(f"{ANCHOR}: {more} cases of {anchor.path.name} are no test cases, left out")
    *checkpoints, scratch, own = (
        [row for row in rows if row.case not in tainted] for rows in (*checkpoints, scratch, own)
    )
    pretrained = [row for rows in checkpoints for row in rows]
    rows = pretrained + scratch + own
    anchored = anchor.rows(rows) if anchor is not None else []
    notes += missed_or_invented(head.arm, pretrained) + missed_or_invented("scratch", scratch)
    notes += missed_or_invented(OWN, own)
    classes = list(dict.fromkeys(row.class_name for row in pretrained or scratch or own))
    to_twin, to_own = (invented_structures([*pretrained, *arm]) for arm in (scratch, own))
    draws = independent_draws(rows)
    notes += draws_that_count(rows, draws)
    folds = {row.case: row.split for row in rows}
    subjects = subjects_of(rows)
    metrics = metrics_of(rows)
    columns = [ALL_CLASSES, *classes] if len(classes) > 1 else [ALL_CLASSES]
    if metrics is CLASSIFICATION and len(classes) == 2:
        columns = [ALL_CLASSES]  # what is right of the one is right of the other
    few = too_few_of_a_class(rows) if metrics is CLASSIFICATION else ""
    notes += untested_classes(rows) if metrics is CLASSIFICATION else []
    shown = next(metric for metric in metrics if not metric.pseudo)
    scores: dict[str, Scores] = {}
    lines = []
    for metric in metrics:
        for name in columns if metric.by_class else [ALL_CLASSES]:
            *a, b = (case_scores(one, metric, name, to_twin) for one in (*checkpoints, scratch))
            c = case_scores(own, metric, name, to_own)
            n = case_scores(anchored, metric, name, to_twin) if metric.name == "dsc" else {}
            if metric.of_lesions and not any(a) and not b:
                continue
            gaps = [
                [
                    merged(score_differences(one, found, metric, name, wrong), draws)
                    for one in checkpoints
                ]
                for found, wrong in ((scratch, to_twin), (own, to_own))
            ]
            if metric is metrics[0] and name == ALL_CLASSES:
                notes += list(dict.fromkeys(note for one in a for note in unpaired(one, b)))
                aa = [case_scores(one, metric, name, to_own) for one in checkpoints]
                notes += list(dict.fromkeys(note for one in aa for note in unpaired(one, c, OWN)))
            *a, b, c = (merged(found, draws) for found in (*a, b, c))
            if metric is shown and name == ALL_CLASSES:
                scores = {"pretrained": mean_scores(a), "scratch": b}
            if metric is metrics[0] and name == ALL_CLASSES:
                notes += unsuitable((mean_scores(a), b, c), subjects)
            line = _line(head, metric, name, (a, [b], [c], [n]), gaps, subjects, folds)
            if few and metric.pseudo:
                line = _undecided(line, few)
            nothing = metric.of_scans and rows and not any(a) and not b and not c
            verdict = SEEN if all_seen else UNDEFINED if nothing else line.verdict
            lines.append(dataclasses.replace(line, verdict=verdict, leakage=leakage))
    if len(checkpoints) > 1 and (difference := lines[0].difference) is not None:
        notes.append(f"its difference is about {difference.claim}")
    notes += folds_of_one_class(rows) if metrics is CLASSIFICATION else []
    notes += not_enough(lines[0]) + power_of(lines[0])
    return Group(
        head.dataset,
        head.labels,
        head.n_labels,
        head.checkpoint,
        tuple(lines),
        scores,
        tuple(notes),
        shown=shown.title,
    )


def _undecided(line: Line, note: str) -> Line:
    """The line without its intervals, and why."""

    def mean(value: Estimate | None) -> Estimate | None:
        if value is None:
            return None
        counts = value.cases, value.units, value.draws
        return without_interval(value.mean, *counts, note, value.pretrainings)

    decided = line.verdict in (BETTER, WORSE, UNCLEAR)
    return dataclasses.replace(
        line,
        pretrained=mean(line.pretrained),
        scratch=mean(line.scratch),
        difference=mean(line.difference),
        own=mean(line.own),
        against_own=mean(line.against_own),
        verdict=UNDECIDED if decided else line.verdict,
    )


def _head(checkpoints: Sequence[list[Row]], scratch: list[Row], own: list[Row]) -> Row:
    """A row that says what a group is about."""
    heads = [rows[0] for rows in checkpoints if rows] or (scratch or own)[:1]
    if len(checkpoints) < 2:
        return heads[0]
    return dataclasses.replace(
        heads[0],
        checkpoint=_together([row.checkpoint for row in heads]),
        checkpoint_digest="+".join(row.checkpoint_digest for row in heads),
    )


def _together(names: Sequence[str]) -> str:
    """Names of a recipe's checkpoints as one: mae-0, mae-1, mae-2 are mae-{0,1,2}."""
    if len(set(names)) == 1:
        return f"{names[0]}, {len(names)} pretraining seeds"
    words = [re.findall(r"\w+|\W+", name) for name in names]
    head = _alike(words)
    tail = _alike([one[head:][::-1] for one in words])
    varied = ",".join("".join(one[head : len(one) - tail]) for one in words)
    return f"{''.join(words[0][:head])}{{{varied}}}{''.join(words[0][len(words[0]) - tail :])}"


def _alike(words: Sequence[Sequence[str]]) -> int:
    """With how many of the same they all begin."""
    both = itertools.takewhile(lambda found: len(set(found)) == 1, zip(*words, strict=False))
    return len(list(both))


def _line(
    head: Row,
    metric: Metric,
    class_name: str,
    arms: tuple[Parts, Parts, Parts, Parts],
    differences: Sequence[Parts],
    subjects: dict[str, str],
    folds: dict[str, str],
) -> Line:
    a, b, c, anchor = arms
    pretrained, scratch, own, difference, against_own = (
        _estimate(parts, subjects, folds) for parts in (a, b, c, *differences)
    )
    paired, _ = score_matrix(mean_scores(differences[0]), subjects)
    shared = complete_cases(next((p for p in (differences[0], a, b, c) if any(p)), a))
    [anchored] = anchor
    anchored = {cell: value for cell, value in anchored.items() if cell[0] in shared}
    names = set(folds.values())
    if scratch is None:
        against_own = None  # no delta without a twin
    line = Line(
        head.dataset,
        head.labels,
        head.n_labels,
        head.steps,
        head.checkpoint,
        head.checkpoint_digest,
        metric.name,
        class_name,
        _bounded(pretrained, metric) if pretrained else None,
        _bounded(scratch, metric) if scratch else None,
        difference,
        math.nan
        if metric.pseudo
        else share_improved(paired, higher_is_better=metric.higher_is_better),
        ELSEWHERE,
        own=_bounded(own, metric) if own else None,
        against_own=against_own,
        own_decides=_own_decides(difference, against_own, metric),
        median=math.nan if metric.pseudo else median_difference(paired),
        split=head.split if len(names) < 2 else f"{len(names)} folds/validation",
        protocol=head.protocol,
        recipe=head.config_hash[:8],
        anchor=_estimate([anchored], subjects, {}),
        unit=metric.unit.format(unit=head.unit),
        digits=shown_digits(metric, next((e.mean for e in (scratch, pretrained, own) if e), 0.0)),
    )
    if head.arm == "external":
        return line
    verdict = _verdict(line, has_scratch=any(b), has_pretrained=any(a))
    return dataclasses.replace(line, verdict=verdict)


def _own_decides(twin: Estimate | None, own: Estimate | None, metric: Metric) -> bool:
    """Whether scratch at its own best is harder to beat than the twin.

    A gain has to be one over both, so it is about the arm over which it is less sure; what is no
    gain is about the stronger arm. Each difference is over its own pairs: means of arms that have
    other seeds, or cases, tell nothing.
    """
    if twin is None or own is None:
        return False
    sign = 1 if metric.higher_is_better else -1
    if min(sign * twin.mean, sign * own.mean) > 0:
        return _unsure(own) > _unsure(twin)
    return sign * own.mean < sign * twin.mean


def _unsure(difference: Estimate) -> float:
    """Its p; above all of them where there is none."""
    return math.inf if math.isnan(difference.p) else difference.p


def _estimate(parts: Parts, subjects: dict[str, str], folds: dict[str, str]) -> Estimate | None:
    """Over subjects and draws, and over the checkpoints that have a part each.

    Where the cases lie in several `folds`, over folds. None where there is nothing.
    """
    if not all(parts):
        return None
    if len(parts) > 1:
        cube, shared, cases = score_cube(parts, subjects)
        found = estimate_recipe(cube, "shared" if shared else "own", cases)
        if len(set(folds.values())) < 2:
            return found
        note = "several pretraining seeds over several folds: each checkpoint has its own interval"
        counts = found.cases, found.units, found.draws
        return without_interval(found.mean, *counts, note, found.pretrainings)
    by_fold: dict[str, Scores] = {}
    for cell, value in parts[0].items():
        by_fold.setdefault(folds.get(cell[0], ""), {})[cell] = value
    tables = [score_matrix(part, subjects) for _, part in sorted(by_fold.items())]
    if len(tables) == 1:
        return estimate(*tables[0])
    return estimate_folds([table for table, _ in tables], sum(cases for _, cases in tables))


def _bounded(value: Estimate, metric: Metric) -> Estimate:
    """With an interval that ends where the scale does; Student's knows no end."""
    high = min(value.high, metric.best) if metric.higher_is_better else value.high
    return dataclasses.replace(value, low=max(value.low, metric.least), high=high)


def _verdict(line: Line, *, has_scratch: bool, has_pretrained: bool) -> str:
    difference = line.decides
    if not has_pretrained:
        return NO_PRETRAINED
    if not has_scratch:
        return NO_TWIN
    if difference is None:
        return "nothing to pair"
    if math.isnan(line.p):
        return UNDECIDED
    if line.p >= LEVEL:
        return UNCLEAR
    return BETTER if (difference.mean > 0) == line.measures.higher_is_better else WORSE
