"""What a table says beside its numbers: what speaks against believing a comparison, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from finetune.cells import Scores, score_matrix
from finetune.comparisons import suitability
from finetune.facts import Facts, Run, run_of
from finetune.intervals import LEVEL
from finetune.lines import OWN, Line
from finetune.rows import Row

CLASS_UNITS = 10
"""With 6 cases of a class up to 7 % of true zeros were called a difference, with 10 up to 6 %; see
docs/results/scan_tasks.md."""


def what_leaked(rows: list[Row]) -> str:
    """What is known of a checkpoint and the test cases; nothing of predictions from elsewhere."""
    if any(row.status == "tainted" for row in rows):
        return "tainted"
    found = {row.status for row in rows if row.arm == "pretrained"}
    return "unknown" if "unknown" in found else "clean" if found else ""


def without_label(rows: list[Row], facts: Mapping[Run, Facts]) -> list[str]:
    """Which classes have no labelled case, and in which draws: there, nobody could learn them."""
    seeds: dict[str, dict[str, None]] = {}
    for row in sorted(rows, key=lambda row: row.label_seed):
        for name in facts[run_of(row)].without_label if run_of(row) in facts else ():
            seeds.setdefault(name, {})[str(row.label_seed)] = None
    return [
        f"no labelled case has {name} in label draw {', '.join(n)}" for name, n in seeds.items()
    ]


def draws_that_count(rows: Sequence[Row], draws: Mapping[str, str]) -> list[str]:
    """Where seeds are fewer, or tell less, than they look; see `independent_draws`."""
    count = len(set(draws.values()))
    if count < len(draws):
        return [f"{len(draws)} draws count as {count}: those that share their labels are averaged"]
    chosen = {row.label_seed for row in rows if row.labels != "all"}
    if len(chosen) == 1 and count > 1 and chosen != {-1}:
        return ["all runs have the same labelled cases: intervals are for that choice alone"]
    return []


def few_subjects(rows: list[Row], facts: Mapping[Run, Facts]) -> list[str]:
    """Whose scans the labelled cases are, where some are of the same subject."""
    known = {run: facts[run].label_subjects for run in map(run_of, rows) if run in facts}
    cases = {row.n_labels for row in rows}
    found = sorted(set(known.values()) - {0})
    if not found or len(cases) > 1 or found == sorted(cases):
        return []
    people = str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
    return [f"draws take whole subjects first: {cases.pop()} labelled cases are of {people} people"]


def not_compared(rows: list[Row], facts: Mapping[Run, Facts]) -> list[str]:
    """Of how many test cases copies in pretraining would not have been found."""
    known = [facts[run] for run in dict.fromkeys(map(run_of, rows)) if run in facts]
    cases = {row.case for row in rows}
    alone = {case for one in known for case in one.by_voxels_alone} & cases
    if not alone:
        return []
    return [
        f"{len(alone)} of {len(cases)} test cases were compared with what the checkpoint has "
        "seen by equal voxels alone: copies are found by sketches, and it, or they, have none"
    ]


def unsuitable(arms: Sequence[Scores], subjects: dict[str, str]) -> list[str]:
    """What speaks against deciding between the arms on this data set."""
    present = [scores for scores in arms if scores]
    cells = set.intersection(*(set(scores) for scores in present)) if len(present) > 1 else set()
    tables = [score_matrix({cell: scores[cell] for cell in cells}, subjects) for scores in present]
    if not cells or not tables[0][1]:
        return []
    means = np.array([table.mean(axis=0) for table, _ in tables])
    flags = suitability(means, tables[0][1]).flags
    return [f"suitability: {'; '.join(flags)}"] if flags else []


def missed_or_invented(arm: str, rows: list[Row]) -> list[str]:
    """What an arm missed or invented."""
    words = {"missed": "missed a structure", "false_positive": "invented a structure"}
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in words}
    return [f"{arm} {words[name]} {n} times (scored 0)" for name, n in counts.items() if n]


def unpaired(a: Scores, b: Scores, other: str = "") -> list[str]:
    """What could not be paired; `other` names the second arm if it is not the twin."""
    if not a or not b:
        return []
    notes = []
    where = f"not in the difference{' to ' * bool(other)}{other}"
    draws_a, draws_b = {draw for _, draw in a}, {draw for _, draw in b}
    alone = sorted(draws_a ^ draws_b)
    if alone:
        notes.append(f"seeds {', '.join(map(str, alone))} have one arm only: {where}")
    common = draws_a & draws_b
    unpaired = {case for case, draw in a.keys() ^ b.keys() if draw in common}
    if unpaired:
        notes.append(f"{len(unpaired)} cases lack a score in one arm: {where}")
    return notes


def not_enough(line: Line) -> list[str]:
    """Why an interval that leaves zero out makes no verdict."""
    found = line.decides
    if found is None or not found.p < LEVEL or line.p < LEVEL:
        return []
    if (found.mean > 0) != line.measures.higher_is_better:
        return [
            "behind the stronger of two scratch arms, which the same scores picked: p "
            f"{found.p:.2g} counts double"
        ]
    other = line.difference if line.own_decides else line.against_own
    arm = "its twin" if line.own_decides else OWN
    known = f"p {other.p:.2g}" if other is not None and other.has_interval else "no interval"
    return [f"a gain has to be one over both scratch arms; over {arm} it is not clear ({known})"]


def power_of(line: Line) -> list[str]:
    """What a comparison of this size could have found."""
    found = line.decides
    if found is None or not found.has_interval:
        return []
    enough = f"of 80% from {found.detectable():.{line.digits}f} {line.unit} on"
    if line.unit != "points":
        return [f"a true difference would be found with a chance {enough}"]
    chances = " and ".join(f"{found.power(d):.0%} for +{d}" for d in (2, 5))
    return [
        f"a true difference would be found with a chance of {chances} {line.measures.title} "
        f"points, {enough}"
    ]


def untested_classes(rows: Sequence[Row]) -> list[str]:
    """Classes of a classification that no test case is of: nothing is known of them."""
    present = {row.class_name for row in rows if row.truth == 1}
    names = dict.fromkeys(row.class_name for row in rows)
    return [f"no test case is {name}" for name in names if name not in present]


def folds_of_one_class(rows: Sequence[Row]) -> list[str]:
    """How many folds tell no classes apart, as AUROC would have to."""
    classes: dict[str, set[str]] = {}
    for row in rows:
        if row.truth == 1:
            classes.setdefault(row.split, set()).add(row.class_name)
    alone = sum(len(found) == 1 for found in classes.values())
    if not alone or len(classes) < 2:
        return []
    return [f"{alone} of {len(classes)} folds have cases of one class alone, and no AUROC"]


def rounded_otherwise(arms: Mapping[str, list[Row]], facts: Mapping[Run, Facts]) -> list[str]:
    """Where twins were not computed in the same precision: `auto` is another on another device."""
    by_draw: dict[str, set[str]] = {}
    for row in (row for rows in arms.values() for row in rows):
        known = facts.get(run_of(row))
        if known is not None and known.precisions:
            by_draw.setdefault(row.draw, set()).update(known.precisions)
    apart = [found for found in by_draw.values() if len(found) > 1]
    if not apart:
        return []
    named = sorted(set().union(*apart))
    return [
        f"in {len(apart)} of {len(by_draw)} draws runs were computed in {' and in '.join(named)}, "
        "so the arms are not rounded alike: trainer.precision=auto is another on another device"
    ]


def too_few_of_a_class(rows: Sequence[Row]) -> str:
    """Why scores that compare classes get no interval; empty if they get one.

    The fewer cases of a class there are, the more the score hangs on each of them, and a variance
    over all cases does not know how few these are.
    """
    subjects: dict[tuple[str, float], set[str]] = {}
    for row in rows:
        subjects.setdefault((row.class_name, row.truth), set()).add(row.subject)
    fewest = min(map(len, subjects.values()), default=0)
    if fewest >= CLASS_UNITS:
        return ""
    return f"an interval needs {CLASS_UNITS} subjects of each class"
