from __future__ import annotations

import pytest
import torch

from pretrain.draws import uniform

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def oracle(seed: int, position: int, stream: int) -> float:
    key = mix((seed + (2 * stream + 1) * GAMMA) & MASK)
    return (mix((key + (position + 1) * GAMMA) & MASK) >> 40) * 2.0**-24


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of the published generator for seed 1234567.
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + GAMMA) & MASK
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_values_equal_unsigned_arithmetic(seed: int) -> None:
    drawn = uniform(seeds(seed), (2, 3), stream=5)
    assert drawn.dtype == torch.float32
    expected = [oracle(seed, i, 5) for i in range(6)]
    assert drawn.flatten().tolist() == expected


def test_a_sample_does_not_depend_on_its_batch() -> None:
    many = uniform(torch.arange(10), (4, 5), stream=1)
    assert torch.equal(many[3:7], uniform(torch.arange(3, 7), (4, 5), stream=1))


def test_a_longer_draw_begins_with_the_shorter() -> None:
    assert torch.equal(uniform(seeds(7), (100,), 0)[:, :10], uniform(seeds(7), (10,), 0))


def test_numbers_are_uniform_and_below_one() -> None:
    x = uniform(torch.arange(50), (4000,), stream=2).double()
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    expected = x.numel() / 100
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 50 < chi2 < 160  # 99 degrees of freedom


def test_seeds_streams_and_neighbours_are_uncorrelated() -> None:
    n = 20000
    near_seeds = uniform(torch.arange(2), (n,), 0)
    streams = torch.cat([uniform(seeds(0), (n,), s) for s in range(3)])
    lagged = torch.stack([near_seeds[0, :-1], near_seeds[0, 1:]])
    for rows in (near_seeds, streams, lagged):
        matrix = torch.corrcoef(rows.double())
        off_diagonal = matrix - torch.eye(len(matrix), dtype=matrix.dtype)
        assert off_diagonal.abs().max() < 0.03


def test_no_generator_is_touched() -> None:
    before = torch.get_rng_state()
    uniform(seeds(1, 2), (10,), 0)
    assert torch.equal(before, torch.get_rng_state())
