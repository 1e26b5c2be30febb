import itertools
import math

import numpy as np
import pytest

from finetune.budget import FASTER, Curve, _steps_to, read_budget

STEPS = list(range(100, 2001, 100))


def noisy(time: float, rng: np.random.Generator) -> Curve:
    curve = rising(80, time)
    return Curve(curve.steps, [dice + 0.3 * rng.normal() for dice in curve.dice])


def rising(end: float, time: float, steps: list[int] = STEPS) -> Curve:
    return Curve(steps, [end * (1 - math.exp(-s / time)) for s in steps])


def test_the_last_quarters_gain_is_the_rise_of_a_line() -> None:
    line = Curve(STEPS, [50 + 0.004 * s for s in STEPS])  # 0.004 x 500 steps
    assert line.last_gain == pytest.approx(2.0) and not line.converged
    assert line.end == pytest.approx(50 + 0.004 * 1750)
    assert Curve([25, 50, 75, 100], [10, 60, 70, 70.6]).last_gain == pytest.approx(0.6)


@pytest.mark.parametrize(("gain", "converged"), [(0.49, True), (0.51, False), (-3.0, True)])
def test_half_a_point_in_the_last_quarter_is_the_limit(gain: float, converged: bool) -> None:
    dice = [70.0 if s <= 1500 else 70 + gain * (s - 1500) / 500 for s in STEPS]
    assert Curve(STEPS, dice).converged == converged


def test_noise_alone_is_no_gain(seed: int) -> None:
    """Half a point of validation noise: ended curves are seldom called rising."""
    rng = np.random.default_rng(seed)
    called = [not Curve(STEPS, list(70 + 0.25 * rng.normal(size=20))).converged for _ in range(200)]
    assert np.mean(called) < 0.15


def test_a_head_start_is_not_a_better_end() -> None:
    first, second = [rising(80, 100)] * 6, [rising(80, 250)] * 6
    found = read_budget(first, second)
    assert found.reading == "converges faster" and found.p == 2 / 2**6  # all draws, either way
    assert abs(found.gap) < 0.5
    # 1 - exp(-s / time) reaches the same level after steps in proportion to time.
    assert found.speed == pytest.approx(2.5, rel=0.15)
    assert read_budget(second, first).reading == "converges slower"
    # Five draws of arms that are alike would look so once in sixteen times.
    few = read_budget(first[:5], second[:5])
    assert (few.reading, few.p) == ("no difference", 2 / 2**5)
    assert few.speed == pytest.approx(found.speed)
    many = read_budget(
        first * 3, second * 3
    )  # not all exchanges are tried, and these do not chance
    assert many.reading == "converges faster" and many.p < 0.001


def steps_to(curve: Curve, level: float) -> float:
    steps, dice = np.asarray(curve.steps, float), np.asarray(curve.dice, float)
    return float(_steps_to(steps, dice, np.asarray(level)))


def slow_p(first: list[Curve], second: list[Curve]) -> float:
    """Every exchange of every draw, curve by curve."""

    def log_speed(a: list[Curve], b: list[Curve]) -> float:
        ends = [np.mean([c.dice for c in arm], axis=0) for arm in (a, b)]
        mean = [Curve(first[0].steps, dice.tolist()) for dice in ends]
        steps = [steps_to(one, min(one.end for one in mean) - 0.5) for one in mean]
        return 0.0 if steps == [math.inf, math.inf] else abs(math.log(steps[1] / steps[0]))

    found = []
    for exchanged in itertools.product([False, True], repeat=len(first)):
        pairs = [
            (b, a) if swap else (a, b) for a, b, swap in zip(first, second, exchanged, strict=True)
        ]
        found.append(log_speed([a for a, _ in pairs], [b for _, b in pairs]))
    return float(np.mean(np.array(found) >= found[0] - 1e-9))


def test_p_is_the_share_of_all_exchanges_in_any_order_of_draws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = [noisy(time, rng) for time in rng.lognormal(math.log(150), 0.3, 7)]
    second = [noisy(time, rng) for time in rng.lognormal(math.log(200), 0.3, 7)]
    p = read_budget(first, second).p
    assert p == pytest.approx(slow_p(first, second))
    assert read_budget(first[::-1], second[::-1]).p == pytest.approx(p)
    assert read_budget(second, first).p == pytest.approx(p)


def test_chance_makes_no_arm_faster(seed: int) -> None:
    """Noisy draws of two equal arms: speeds differ, and seldom more than the level says."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(100):
        times = rng.lognormal(math.log(80), 0.5, (2, 8))
        arms = [[noisy(time, rng) for time in arm] for arm in times]
        found.append(read_budget(*arms))
    called = [one.reading.startswith("converges") for one in found]
    unequal = [one.speed > 1 / FASTER or one.speed < FASTER for one in found]
    assert np.mean(called) < 0.14 < 0.3 < np.mean(unequal)  # which alone would call them so


def test_a_better_end_is_called_so_even_if_it_comes_later() -> None:
    found = read_budget([rising(84, 300)], [rising(80, 150)])
    assert found.reading == "generalises better" and found.gap == pytest.approx(4, abs=0.3)
    assert read_budget([rising(80, 150)], [rising(84, 300)]).reading == "generalises worse"


def test_a_gap_before_the_end_is_no_verdict() -> None:
    """With a tenth of the steps the head start looks like a better end."""
    short = list(range(10, 201, 10))
    found = read_budget([rising(80, 100, short)], [rising(80, 250, short)])
    assert found.gap > 5 and found.reading == "not converged" and math.isnan(found.speed)


def test_a_higher_curve_is_not_a_faster_one() -> None:
    """It passes the lower end early, whatever its pace."""
    first, second = [rising(81, 200)] * 6, [rising(80, 200)] * 6
    found = read_budget(first, second)
    assert found.reading == "generalises better" and math.isnan(found.speed)


def test_equal_curves_differ_in_nothing() -> None:
    found = read_budget([rising(80, 200)], [rising(80.2, 210)])
    assert found.reading == "no difference"


def test_the_step_is_the_one_from_which_the_curve_stays() -> None:
    curve = Curve([100, 200, 300, 400], [60, 40, 80, 80])
    assert steps_to(curve, 60) == pytest.approx(250)
    assert steps_to(curve, 40) == 100 and steps_to(curve, 81) == math.inf


@pytest.mark.parametrize(
    ("steps", "dice"),
    [
        ([], []),
        ([100], [1.0]),
        ([50, 100], [1.0, 2.0]),
        ([1, 2, 3], [1.0, 2.0]),
        ([100, 100], [1.0, 2.0]),
        ([0, 100], [1.0, 2.0]),
        ([90, 100], [1.0, math.nan]),
    ],
)
def test_curves_that_say_nothing_are_refused(steps: list[int], dice: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected|rise|quarter"):
        Curve(steps, dice)
