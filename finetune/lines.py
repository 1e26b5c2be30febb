"""The lines of a table, one comparison each, their verdicts, and the sentence of a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.budget import Curve
from finetune.comparisons import p_against_stronger
from finetune.intervals import LEVEL, NOTHING, Estimate
from finetune.rows import Row

ALL_CLASSES = "mean"
ELSEWHERE = "predicted elsewhere"
OWN = "scratch at its own best"
"""What the third arm is called to readers."""

BETTER, WORSE, UNCLEAR = "pretrained better", "scratch better", "no clear difference"
SEEN = "tainted"
"""The verdict where pretraining has seen every test case."""
UNDECIDED = "undecided"
"""The verdict where an interval that it needs is refused."""
UNDEFINED = "not defined"
"""The verdict where the test cases do not tell: all of one class."""
NO_TWIN, NO_PRETRAINED = "no scratch twin", "no pretrained arm"
"""The verdicts where an arm is missing."""


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
    of_scans: bool = False
    """Whether it is of answers for whole scans (finetune/scan_metrics.py)."""
    pseudo: bool = False
    """Whether numbers of single cases are pseudovalues, which mean nothing one by one."""
    by_class: bool = True
    """Whether each class has it too."""
    digits: int | None = 1
    """Digits behind the point; None: as many as show three of the number."""
    least: float = 0.0
    """The other end of the scale where there is one."""


SEGMENTATION = (
    Metric("dsc", "Dice", 100.0, "points", True, 100.0),
    Metric("nsd", "Surface Dice", 100.0, "points", True, 100.0),
    Metric("hd95", "HD95", 1.0, "mm", False, 0.0),
    Metric("assd", "ASSD", 1.0, "mm", False, 0.0),
    Metric("volume_difference_ml", "Volume difference", 1.0, "ml", False, 0.0),
    Metric("lesion_f1", "Lesion F1", 100.0, "points", True, 100.0, of_lesions=True),
    Metric("lesion_pq", "Lesion PQ", 100.0, "points", True, 100.0, of_lesions=True),
)
CLASSIFICATION = (
    Metric("auroc", "AUROC", 100.0, "points", True, 100.0, of_scans=True, pseudo=True),
    Metric(
        "log_loss", "Log loss", 1.0, "nats", False, 0.0, of_scans=True, by_class=False, digits=None
    ),
    Metric("accuracy", "Accuracy", 100.0, "points", True, 100.0, of_scans=True, by_class=False),
    Metric(
        "balanced_accuracy", "Balanced accuracy", 100.0, "points", True, 100.0, of_scans=True,
        pseudo=True, by_class=False,
    ),
)  # fmt: skip
REGRESSION = (
    Metric("mae", "MAE", 1.0, "{unit}", False, 0.0, of_scans=True, by_class=False, digits=None),
    Metric(
        "rmse", "RMSE", 1.0, "{unit}", False, 0.0, of_scans=True, pseudo=True, by_class=False,
        digits=None,
    ),
    Metric(
        "r2", "R²", 1.0, "1 is perfect", True, 1.0, of_scans=True, pseudo=True, by_class=False,
        digits=3, least=-math.inf,
    ),
)  # fmt: skip
METRICS = {m.name: m for m in (*SEGMENTATION, *CLASSIFICATION, *REGRESSION)}


def metrics_of(rows: Sequence[Row]) -> tuple[Metric, ...]:
    """Those of the rows' task, the main one first."""
    if any(row.unit for row in rows):
        return REGRESSION
    return CLASSIFICATION if any(math.isfinite(row.truth) for row in rows) else SEGMENTATION


def shown_digits(metric: Metric, mean: float) -> int:
    """Digits behind the point that numbers of this size are shown with."""
    if metric.digits is not None:
        return metric.digits
    size = math.floor(math.log10(abs(mean))) if mean and math.isfinite(mean) else 0
    return min(max(2 - size, 1), 6)


@dataclass(frozen=True)
class Line:
    """One comparison: a checkpoint against its scratch twin in one metric and class.

    `class_name` is "mean" for the mean over classes. Estimates are in the metric's reported unit
    (Dice points, mm, years); `difference` is pretrained minus its scratch twin, `against_own`
    pretrained minus scratch at its own best recipe (`own`). What is missing is None. `improved` is
    the share of subjects that gain over the twin, `median` the median over subjects of the
    difference to it. `adjusted_p` stands in main lines alone: p of the deciding difference,
    adjusted over the data sets (Holm 1979). `split` is name and part, `recipe` the hash of all that
    arms share, `departs` what tells that recipe from those of lines that are alike in all else
    ("lr=0.003"), if folders say it. `still_gains` is what the last quarter of training gained on
    validation, in Dice points and in the arm that gained most, NaN where runs were not validated:
    above 0.5 it was too short. `anchor` is nnU-Net's Dice over the cases of the difference; one
    run, so it has no interval. `leakage` says of a checkpoint whether it has seen test cases:
    clean, tainted (these cases are left out) or unknown. Numbers are in `unit`, shown with
    `digits` behind the point.
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
    own_decides: bool = False
    median: float = math.nan
    adjusted_p: float = math.nan
    split: str = ""
    protocol: str = ""
    recipe: str = ""
    departs: str = ""
    still_gains: float = math.nan
    anchor: Estimate | None = None
    leakage: str = ""
    unit: str = "points"
    digits: int = 1

    @property
    def measures(self) -> Metric:
        """Its metric."""
        return METRICS[self.metric]

    @property
    def quantity(self) -> str:
        """What its numbers are, with their unit."""
        return f"{self.measures.title} ({self.unit})"

    @property
    def basis(self) -> Estimate:
        """Whose cases, subjects and draws count: the difference's, or those of the arm there is."""
        return self.difference or self.pretrained or self.scratch or NOTHING

    @property
    def decides(self) -> Estimate | None:
        """The difference that the verdict is about: to the scratch arm that is harder to beat."""
        return self.against_own if self.own_decides else self.difference

    @property
    def p(self) -> float:
        """Of the deciding difference, as the choice among scratch arms makes it."""
        found = self.decides
        if found is None:
            return math.nan
        other = self.difference if self.own_decides else self.against_own
        others = [math.nan if other is None else other.p] if self.own is not None else []
        loses = found.mean < 0 if self.measures.higher_is_better else found.mean > 0
        return p_against_stronger(found.p, others, loses=loses)

    def adjusted(self, p: float) -> Line:
        """The line with its adjusted p, and no verdict where p lets chance over many explain it."""
        verdict = UNCLEAR if self.verdict in (BETTER, WORSE) and p >= LEVEL else self.verdict
        return dataclasses.replace(self, adjusted_p=p, verdict=verdict)


@dataclass(frozen=True)
class Group:
    """All lines of one checkpoint on one data set with one label count, and what to know of it."""

    dataset: str
    labels: str
    n_labels: int
    checkpoint: str
    lines: tuple[Line, ...]
    scores: dict[str, dict[tuple[str, str], float]] = field(repr=False)
    """Per arm, (case, draw) to what `shown` says: the main score, or one that single cases have."""
    notes: tuple[str, ...] = ()
    shown: str = "Dice"
    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False)
    """Per arm, validation Dice over training, where all its runs were validated."""

    @property
    def main(self) -> Line:
        """Dice, AUROC or MAE over all classes: what the verdict is about."""
        return self.lines[0]

    @property
    def of_recipe(self) -> bool:
        """Whether it is of several checkpoints, which differ in the seed of their pretraining."""
        found = self.main.pretrained
        return found is not None and found.pretrainings > 1

    @property
    def but_recipe(self) -> tuple[str, int, str, str, str]:
        """What it has in common with groups that differ in nothing but their recipe."""
        main = self.main
        return (self.dataset, self.n_labels, self.checkpoint, main.split, main.protocol)

    @property
    def told(self) -> str:
        """The checkpoint, with what tells its recipe from others; empty without both."""
        return ", ".join(filter(None, (self.checkpoint, self.main.departs)))

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


def _sentence(group: Group) -> str:
    line = group.main
    what = f"{group.dataset}, {group.n_labels} labels"
    what += f", {group.told}" if group.told else ""
    title, form = line.measures.title, f".{line.digits}f"
    if line.verdict == ELSEWHERE and line.pretrained is not None:
        given = line.pretrained
        score = f"{title} {given.mean:{form}} ({_basis(given)})"
        return f"{group.dataset}, {group.checkpoint}: {score}."
    if line.difference is None or line.pretrained is None or line.scratch is None:
        missing = {
            SEEN: "every test case was seen in pretraining, so there is nothing to believe.",
            UNDEFINED: f"{title} is not defined, for all test cases are of one class.",
            NO_TWIN: "no difference is shown without a scratch twin "
            "(run the same with init=scratch).",
            NO_PRETRAINED: "only the scratch arm is there.",
        }.get(line.verdict, "the arms share no case and seed.")
        return f"{what}: {missing}"
    d = line.decides or line.difference
    arms = f"{title} {line.pretrained.mean:{form}} pretrained, {line.scratch.mean:{form}} scratch"
    if line.own is not None:
        arms += f", {line.own.mean:{form}} {OWN}"
    basis, gap = _basis(d), f"{d.mean:+{form}}"
    if not d.has_interval:
        return f"{what}: {UNDECIDED}, {arms}, difference {gap} ({basis}; {d.note})."
    interval = f"difference {gap} [{d.low:+{form}}, {d.high:+{form}}] {line.unit} ({basis})"
    return f"{what}: {line.verdict}, {arms}, {interval}."


def _basis(value: Estimate) -> str:
    subjects = f" of {value.units} subjects" if value.units != value.cases else ""
    folds = f", {value.folds} folds" if value.folds > 1 else ""
    seeds = f"{value.draws} seed{'s' * (value.draws != 1)}"
    if value.pretrainings > 1:
        seeds = f"{value.pretrainings} pretraining seeds, {seeds} each"
    return f"{value.cases} cases{subjects}{folds}, {seeds}"


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
