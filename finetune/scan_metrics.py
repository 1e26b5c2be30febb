"""Scores of whole scans, as one number per case whose mean over subjects is the score.

Accuracy, log loss and absolute error are means over cases as they are. AUROC, balanced accuracy,
RMSE and R2 are not, and get pseudovalues: the score plus what the case moves it by. So cases that
the checkpoint has seen are left out first, and intervals come as those of every other score.

AUROC A is the chance that a case of the class gets a higher probability than one that is not (ties
count half). V of a case is the share of the other group that is ranked correctly against it, whose
mean over either group is A. With N cases, m in the case's group, the pseudovalue is

    A + N / m * sqrt(m (N - 1) / ((m - 1) N)) * (V - A)

so that the variance of its mean over cases is exactly the one of DeLong, DeLong and Clarke-Pearson
1988 (Biometrics 44:837), and that of two arms' differences theirs for two curves; without the root
it is smaller by (m - 1) / m * N / (N - 1) in each group. With draws as the second side this is the
design of Dorfman, Berbaum and Metz 1992 (Investigative Radiology 27:723) for readers. Why:
docs/decisions/0021.

A subject's cases count by what they bring together (Obuchowski 1997, Biometrics 53:567): the mean
over subjects is the score over all cases. Shapes: N cases, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.lines import ALL_CLASSES, Metric
from finetune.rows import Row

Floats = NDArray[np.float64]
Scores = dict[tuple[str, str], float]
"""(case, draw) to a score."""

LEAST = 1e-6
"""Probabilities below it are taken for it in the log loss: one sure mistake is not infinite."""


def scan_scores(rows: Sequence[Row], metric: Metric, class_name: str) -> Scores:
    """(case, draw) to the case's number, of each run by itself; none where it is not defined.

    Args:
        rows: of one arm, as `finetune.answers.score_answers` gives them.
        metric: one of whole scans.
        class_name: a class, or all of them.
    """
    runs: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault((row.draw, row.split), {}).setdefault(row.case, []).append(row)
    scores: Scores = {}
    for (draw, _), cases in runs.items():
        order = sorted(next(iter(cases.values())), key=lambda row: row.class_value)
        names = [row.class_name for row in order]
        table = [sorted(found, key=lambda row: row.class_value) for found in cases.values()]
        truth = np.array([[row.truth for row in found] for found in table])
        answer = np.array([[row.answer for row in found] for found in table])
        chosen = range(len(names)) if class_name == ALL_CLASSES else [names.index(class_name)]
        values = SCORES[metric.name](truth, answer, list(chosen))
        if values is None:
            continue
        if metric.pseudo:
            values = by_subject(values, [found[0].subject for found in table])
        scores |= {(c, draw): metric.scale * float(v) for c, v in zip(cases, values, strict=True)}
    return scores


def by_subject(values: Floats, subjects: Sequence[str]) -> Floats:
    """Pseudovalues of cases, such that the mean over subjects of their means is that over cases."""
    names, index, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    mean = values.mean()
    share: Floats = counts[index] * len(names) / len(values)
    return mean + share * (values - mean)


def pseudovalues(score: float, values: Floats, groups: NDArray[np.bool_ | np.intp]) -> Floats:
    """The score and what each case moves it by, for a score that is a sum of means over groups.

    Args:
        score: of all cases.
        values: [N], whose means over the groups, summed, are the score but for a constant.
        groups: [N].
    """
    n, found = len(values), np.full(len(values), score)
    for group in np.unique(groups):
        own = groups == group
        m = int(own.sum())
        if m > 1:
            factor = n / m * math.sqrt(m * (n - 1) / ((m - 1) * n))
            found[own] += factor * (values[own] - values[own].mean())
    return found


def ranked_correctly(answer: Floats, positive: NDArray[np.bool_]) -> Floats:
    """V of each case, [N]: the share of the other group that it is ranked correctly against."""
    inside, outside = np.sort(answer[positive]), np.sort(answer[~positive])

    def below(values: Floats, others: Floats) -> Floats:
        """The share of others that lie below each value, ties half."""
        sides = [np.searchsorted(others, values, side=side) for side in ("left", "right")]
        return np.asarray(sum(sides) / (2 * len(others)))

    out = np.empty(len(answer))
    out[positive] = below(answer[positive], outside)
    out[~positive] = 1 - below(answer[~positive], inside)
    return out


def _auroc(truth: Floats, answer: Floats, chosen: list[int]) -> Floats | None:
    """Mean over those classes that some cases are of and some are not, one against the rest."""
    found = []
    for k in chosen:
        positive = truth[:, k] == 1
        if 0 < positive.sum() < len(positive):
            v = ranked_correctly(answer[:, k], positive)
            found.append(pseudovalues(float(v[positive].mean()), v, positive))
    return np.mean(found, axis=0) if found else None


def _correct(truth: Floats, answer: Floats) -> Floats:
    return (truth.argmax(1) == answer.argmax(1)).astype(np.float64)


def _accuracy(truth: Floats, answer: Floats, chosen: list[int]) -> Floats | None:
    return _correct(truth, answer)


def _balanced(truth: Floats, answer: Floats, chosen: list[int]) -> Floats | None:
    """Mean over the classes that occur of the share of their cases that are told right."""
    classes, correct = truth.argmax(1), _correct(truth, answer)
    present = np.unique(classes)
    recalls = [correct[classes == k].mean() for k in present]
    return pseudovalues(float(np.mean(recalls)), correct / len(present), classes)


def _log_loss(truth: Floats, answer: Floats, chosen: list[int]) -> Floats | None:
    given = answer[np.arange(len(answer)), truth.argmax(1)]
    return -np.log(np.clip(given, LEAST, 1))


def _mae(truth: Floats, answer: Floats, chosen: list[int]) -> Floats | None:
    return np.abs(answer - truth)[:, 0]


def _rmse(truth: Floats, answer: Floats, chosen: list[int]) -> Floats | None:
    """Linearised at the score (delta method): the mean is the root itself."""
    squared = np.square(answer - truth)[:, 0]
    root = math.sqrt(squared.mean())
    return root + (squared - root**2) / (2 * root) if root else np.zeros(len(squared))


def _r2(truth: Floats, answer: Floats, chosen: list[int]) -> Floats | None:
    """Linearised likewise; not defined where all cases have the same truth."""
    squared = np.square(answer - truth)[:, 0]
    around = np.square(truth[:, 0] - truth[:, 0].mean())
    error, spread = squared.mean(), around.mean()
    if spread == 0:
        return None
    moved = (squared - error) / spread - error * (around - spread) / spread**2
    return np.asarray(1 - error / spread - moved)


SCORES: dict[str, Callable[[Floats, Floats, list[int]], Floats | None]] = {
    "auroc": _auroc,
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced,
    "log_loss": _log_loss,
    "mae": _mae,
    "rmse": _rmse,
    "r2": _r2,
}
"""Truth and answers [N, K] and the columns of the classes asked for to numbers of cases [N]."""
