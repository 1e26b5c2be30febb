"""How well the order of samples is mixed: pairs in a batch that belong together, beside chance.

    python benchmarks/shuffling.py

Volumes lie in shards in the order of their keys. With names as keys the scans of a subject are
neighbours; with hashes (the default of `voxelith prep`) they lie anywhere. Counted over whole
epochs is how often two samples of a global batch are of one shard or one subject; ideal is a
uniform permutation, in closed form. Where weights (`sampling`) bring some volumes often, two of a
batch may be of one volume. Beside it what shuffling costs: shards that are in use at once, which is
what a cache must hold. Writes docs/results/shuffling/; seconds, no data.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from line import ROOT
from numpy.typing import NDArray

from data_prep.files import write_json, write_text
from pretrain.schedule import WINDOW, Schedule, generator

OUT = ROOT / "docs" / "results" / "shuffling"
SCANS = 3
"""Of a subject, one after the other."""
EPOCHS = 5
CASES = [
    # volumes, in a shard, batch, lanes, share of the volumes that are half of an epoch
    (1_000, 20, 32, 64, None),
    (36_000, 20, 64, 8, None),
    (36_000, 20, 64, 64, None),
    (36_000, 20, 512, 512, None),
    (115_000, 40, 512, 512, None),
    (36_000, 20, 64, 8, 0.03),
    (36_000, 20, 64, 64, 0.03),
    (36_000, 20, 512, 64, 0.03),
    (36_000, 20, 512, 512, 0.03),
]


def paired(order: NDArray[np.int64], group: NDArray[np.int64], batch: int) -> float:
    """The chance that two samples of a batch are of one group."""
    whole = order[: len(order) // batch * batch].reshape(-1, batch)
    rows = np.sort(group[whole], axis=1)
    pairs = 0
    for row in rows:
        counts = np.unique(row, return_counts=True)[1]
        pairs += int((counts * (counts - 1)).sum())
    return pairs / (len(rows) * batch * (batch - 1))


def ideal(group: NDArray[np.int64]) -> float:
    """The same for a uniform permutation."""
    counts = np.unique(group, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(group) * (len(group) - 1)))


def measured(
    volumes: int, per_shard: int, batch: int, lanes: int, rare: float | None, seed: int
) -> dict[str, Any]:
    times = None
    if rare is not None:
        often = generator("rare", seed).permutation(volumes) < rare * volumes
        times = np.where(often, 0.5 * volumes / often.sum(), 0.5 * volumes / (~often).sum())
    shard = np.arange(volumes) // per_shard
    neighbours = np.arange(volumes) // SCANS
    anywhere = generator("subjects", seed).permutation(neighbours)
    schedule = Schedule(shard, seed, lanes, times)
    orders = [schedule.order(epoch) for epoch in range(EPOCHS)]
    found: dict[str, Any] = {
        "volumes": volumes, "per_shard": per_shard, "batch": batch, "lanes": lanes, "rare": rare,
        "seed": seed,
        "shards_at_once": min(lanes * WINDOW, volumes // per_shard), "shards": int(shard.max()) + 1,
    }  # fmt: skip
    for name, group in (
        ("volume", np.arange(volumes)),
        ("shard", shard),
        ("subject, keys=names", neighbours),
        ("subject, keys=hmac", anywhere),
    ):
        each = [paired(order, group, batch) for order in orders]
        found[name] = {"each": each, "mean": float(np.mean(each)), "ideal": ideal(group[orders[0]])}
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = [measured(*case, seed=0) for case in CASES]
    OUT.mkdir(parents=True, exist_ok=True)
    facts = {"numpy": np.__version__, "python": sys.version.split()[0], "epochs": EPOCHS}
    write_json(OUT / "shuffling.json", facts | {"rows": rows})
    names = ("volume", "shard", "subject, keys=names", "subject, keys=hmac")
    lines = [
        "# How well the order is mixed",
        "",
        f"`python benchmarks/shuffling.py`: the chance that two samples of a global batch are of "
        f"one volume, shard or subject ({SCANS} scans each), mean of {EPOCHS} epochs, and in "
        "brackets that of a uniform permutation of the epoch. With weights 3 % of the volumes are "
        "half of it. Lanes are as many as a batch is large, 64 at least, unless `lanes=` says "
        "otherwise.",
        "",
        "| volumes | weights | in a shard | batch | lanes | shards at once | "
        f"{' | '.join(names)} |",
        "| ---: | :---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row[name]['mean']:.2%} ({row[name]['ideal']:.3%})" for name in names]
        lines.append(
            f"| {row['volumes']:,} | {'yes' if row['rare'] else ''} | {row['per_shard']} | "
            f"{row['batch']} | {row['lanes']} | {row['shards_at_once']} of {row['shards']:,} | "
            f"{' | '.join(cells)} |"
        )
    lines += [
        "",
        f"{WINDOW} shards of each lane are mixed. More lanes mix better and need a larger cache "
        "where shards come from elsewhere; on a local disk they cost nothing.",
    ]
    write_text(OUT / "shuffling.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
