"""Scores of whole scans: closed forms, and DeLong's variance beside an oracle of its own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from arm_rows import BASE

from finetune.cells import score_in_words
from finetune.lines import ALL_CLASSES, METRICS
from finetune.rows import Row
from finetune.scan_metrics import (
    by_subject,
    pseudovalues,
    ranked_correctly,
    scan_scores,
)

Floats = np.ndarray


def pairs(answer: Floats, positive: Floats) -> Floats:
    """[positives, negatives]: 1 where the positive case is above, 1/2 where they are even."""
    gaps = answer[positive][:, None] - answer[~positive][None]
    return (np.sign(gaps) + 1) / 2


def delong(answers: list[Floats], positive: Floats) -> Floats:
    """Covariance of AUROCs, from all pairs, as DeLong and others write it."""
    found = [pairs(answer, positive) for answer in answers]
    inside = np.cov([one.mean(1) for one in found]) / positive.sum()
    outside = np.cov([one.mean(0) for one in found]) / (~positive).sum()
    return np.atleast_2d(inside + outside)


def drawn(seed: int) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng([seed, 5])
    positive = rng.random(41) < 0.3
    positive[:2] = [True, False]
    first = np.round(positive + rng.normal(0, 1.2, 41), 1)  # ties
    return positive, first, np.round(first + rng.normal(0, 0.6, 41), 1)


def auroc(answer: Floats, positive: Floats) -> Floats:
    v = ranked_correctly(answer, positive)
    return pseudovalues(float(v[positive].mean()), v, positive)


def test_the_mean_is_auroc_and_its_variance_delongs(seed: int) -> None:
    for number in range(20):
        positive, first, second = drawn(seed + number)
        v = ranked_correctly(first, positive)
        oracle = pairs(first, positive)
        assert v[positive] == pytest.approx(oracle.mean(1))
        assert v[~positive] == pytest.approx(oracle.mean(0))
        values = [auroc(one, positive) for one in (first, second)]
        assert values[0].mean() == pytest.approx(oracle.mean())
        covariance = delong([first, second], positive)
        n = len(positive)
        assert values[0].var(ddof=1) / n == pytest.approx(covariance[0, 0])
        gap = values[0] - values[1]
        expected = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        assert gap.var(ddof=1) / n == pytest.approx(expected)


def test_balanced_accuracy_is_the_mean_of_recalls(seed: int) -> None:
    rng = np.random.default_rng([seed, 6])
    truth = np.repeat(np.arange(3), [20, 6, 4])
    answer = rng.dirichlet(np.ones(3), 30) + 0.4 * np.eye(3)[truth]
    rows = [
        row(f"c{i}", f"k{k}", k, float(truth[i] == k), answer[i, k])
        for i in range(30)
        for k in range(3)
    ]
    correct = answer.argmax(1) == truth
    recalls = [correct[truth == k].mean() for k in range(3)]
    values = np.array(list(scan_scores(rows, METRICS["balanced_accuracy"], ALL_CLASSES).values()))
    assert values.mean() == pytest.approx(100 * np.mean(recalls))
    # Three independent means: the variance is that of their sum over K squared.
    expected = sum(correct[truth == k].var(ddof=1) / (truth == k).sum() for k in range(3)) / 9
    assert values.var(ddof=1) / 30 == pytest.approx(1e4 * expected)
    plain = np.array(list(scan_scores(rows, METRICS["accuracy"], ALL_CLASSES).values()))
    assert plain.mean() == pytest.approx(100 * correct.mean())
    logs = np.array(list(scan_scores(rows, METRICS["log_loss"], ALL_CLASSES).values()))
    given = np.clip(answer[np.arange(30), truth], 1e-6, 1)
    assert logs == pytest.approx(-np.log(given))
    # One class against the rest, and the mean over the classes.
    each = [np.mean(list(scan_scores(rows, METRICS["auroc"], f"k{k}").values())) for k in range(3)]
    assert each == pytest.approx([100 * pairs(answer[:, k], truth == k).mean() for k in range(3)])
    both = scan_scores(rows, METRICS["auroc"], ALL_CLASSES)
    assert np.mean(list(both.values())) == pytest.approx(np.mean(each))


def test_errors_of_numbers(seed: int) -> None:
    rng = np.random.default_rng([seed, 7])
    truth, error = rng.normal(50, 10, 25), rng.normal(1, 4, 25)
    rows = [row(f"c{i}", "age", 0, truth[i], truth[i] + error[i], unit="years") for i in range(25)]

    def mean(name: str) -> float:
        return float(np.mean(list(scan_scores(rows, METRICS[name], ALL_CLASSES).values())))

    assert mean("mae") == pytest.approx(np.abs(error).mean())
    assert mean("rmse") == pytest.approx(math.sqrt((error**2).mean()))
    assert mean("r2") == pytest.approx(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum())
    # What a case moves R2 and RMSE by is about what leaving it out does.
    for name in ("rmse", "r2"):
        values = np.array(list(scan_scores(rows, METRICS[name], ALL_CLASSES).values()))
        jackknife = np.array(
            [
                np.mean(list(scan_scores(rows[:i] + rows[i + 1 :], METRICS[name], "age").values()))
                for i in range(25)
            ]
        )
        assert np.corrcoef(values, mean(name) - jackknife)[0, 1] > 0.98
    assert score_in_words(rows) == f"MAE {mean('mae'):.2f} years"
    same = [dataclasses.replace(r, truth=50.0) for r in rows]
    assert scan_scores(same, METRICS["r2"], ALL_CLASSES) == {}


def test_the_mean_over_subjects_is_the_score_over_cases(seed: int) -> None:
    """Subjects with more cases count for more, and by nothing but what their cases bring."""
    positive, answer, _ = drawn(seed)
    values = auroc(answer, positive)
    subjects = [f"s{i // 3 if i < 30 else i}" for i in range(len(values))]
    found = by_subject(values, subjects)
    names = sorted(set(subjects))
    means = [found[[s == name for s in subjects]].mean() for name in names]
    assert np.mean(means) == pytest.approx(values.mean())
    brought = [(values - values.mean())[[s == name for s in subjects]].sum() for name in names]
    share = len(names) / len(values)
    assert np.array(means) - values.mean() == pytest.approx(np.array(brought) * share)
    assert by_subject(values, [str(i) for i in range(len(values))]) == pytest.approx(values)


def test_auroc_of_one_class_alone_is_not_defined() -> None:
    rows = [
        row(f"c{i}", name, k, float(k == 0), 0.5) for i in range(6) for k, name in enumerate("ab")
    ]
    assert scan_scores(rows, METRICS["auroc"], ALL_CLASSES) == {}
    assert score_in_words(rows) == "AUROC not defined"


def row(
    case: str, name: str, value: int, truth: float, answer: float, unit: str = "", **changes: object
) -> Row:
    given = {
        "case": case, "subject": case, "class_name": name, "class_value": value + 1,
        "truth": truth, "answer": answer, "unit": unit, "dsc": math.nan, "nsd": math.nan,
        "hd95": math.nan, "volume_pred_ml": math.nan, "volume_true_ml": math.nan,
    }  # fmt: skip
    return dataclasses.replace(BASE, **(given | changes))  # type: ignore[arg-type]
