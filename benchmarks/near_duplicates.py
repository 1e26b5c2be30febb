"""How well sketches find copies of scans, and how seldom they take two scans for one.

    VOXELITH_TEST_SEED=0 python benchmarks/near_duplicates.py DATA [--synthetic 1000000]

DATA is a folder of scans; benchmarks/natural_duplicates.csv names the pairs in it that are of one
subject, and those that a person has judged to be copies. Plants are drawn by the seed: of every
kind (tests/data_prep/plants.py) --plants copies of as many scans, each searched among all scans.
Wrongly flagged are scans of different subjects; pairs of one subject are told apart. Synthetic
sketches are real features in new company, with some bits changed. Writes
docs/results/near_duplicates.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import beta

from data_prep.files import write_json, write_text
from data_prep.images import SUFFIXES, Reject
from data_prep.layouts.case import looks_like_a_label, modality_from_name
from data_prep.request import versions
from data_prep.sketch import FEWEST, MOST, NEAR, Sketch, SketchIndex, similarity, sketch
from data_prep.volume import Volume, read_nifti
from pretrain.bench import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data_prep"))
from plants import KINDS

HERE = Path(__file__).parent
JUDGED = HERE / "natural_duplicates.csv"
OUTPUT = HERE.parent / "docs" / "results" / "near_duplicates"


@dataclass(frozen=True)
class Scan:
    """An image of the folder."""

    name: str
    volume: Volume
    look: Sketch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--plants", type=int, default=60)
    parser.add_argument("--synthetic", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=50)
    chosen = parser.parse_args()
    seed = int(os.environ.get("VOXELITH_TEST_SEED", "0"))
    began = time.perf_counter()
    scans, seconds = read_scans(chosen.data)
    pairs = judged_pairs()
    comparable = [scan for scan in scans if scan.look.is_comparable]
    copies = {frozenset(p) for p, verdict in pairs.items() if verdict == "copy"}
    distinct = [s for s in comparable if not any(s.name == sorted(c)[1] for c in copies)]
    result: dict[str, Any] = {
        "seed": seed,
        "scans": len(scans),
        "not_comparable": [s.name for s in scans if not s.look.is_comparable],
        "distinct": len(distinct),
        "sketch_seconds": {"median": float(np.median(seconds)), "largest": max(seconds)},
        "bytes": {"median": float(np.median([len(s.look.to_bytes()) for s in comparable]))},
        "near": NEAR,
        "kinds": planted(distinct, chosen.plants, seed, pairs),
        "pairs": all_pairs(comparable, pairs),
        "synthetic": synthetic(distinct, chosen.synthetic, chosen.queries, seed),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    result["minutes"] = (time.perf_counter() - began) / 60
    OUTPUT.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT / "near_duplicates.json", result)
    write_text(OUTPUT / "near_duplicates.md", text(result))
    print(text(result))


def read_scans(data: Path) -> tuple[list[Scan], list[float]]:
    """Every image that can be read, with its sketch; how long each sketch took."""
    found, seconds = [], []
    for path in sorted(p for p in data.rglob("*") if p.name.lower().endswith(SUFFIXES)):
        name = path.relative_to(data).as_posix()
        said = modality_from_name(name)
        if looks_like_a_label(name) or "dlmuse_seg" in name or said not in (None, "CT", "MR"):
            continue
        try:
            volume = read_nifti(path)
        except Reject:
            continue
        before = time.perf_counter()
        look = sketch(volume)
        seconds.append(time.perf_counter() - before)
        found.append(Scan(name, volume, look))
    return found, seconds


def judged_pairs() -> dict[tuple[str, str], str]:
    """Pairs of one subject, and what a person says of them."""
    with JUDGED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(sorted((row["one"], row["other"]))): row["judged"] for row in rows}  # type: ignore[misc]


def same_subject(one: str, other: str) -> bool:
    """Neighbours among the hippocampi are mostly the two sides of one subject."""
    if "hippocampus_" not in one or "hippocampus_" not in other:
        return False
    numbers = [int(name.rpartition("_")[2].split(".")[0]) for name in (one, other)]
    return (numbers[0] + 1) // 2 == (numbers[1] + 1) // 2


def planted(
    scans: Sequence[Scan], count: int, seed: int, pairs: dict[tuple[str, str], str]
) -> dict[str, Any]:
    """Of each kind: plants that were found, those that were too small, and others found by them.

    `pairs` are scans of one subject, which may find each other.
    """
    index = SketchIndex([scan.look for scan in scans])
    found: dict[str, Any] = {}
    used: set[int] = set()
    for k, (kind, plant) in enumerate(KINDS.items()):
        rng = np.random.default_rng((seed, k))
        chosen = rng.choice(len(scans), min(count, len(scans)), replace=False)
        used |= set(chosen.tolist())
        hits, small = 0, 0
        others: list[list[str]] = []
        shares: list[float] = []
        missed: list[list[Any]] = []
        for n in chosen:
            with tempfile.TemporaryDirectory() as folder:
                look = sketch(plant(scans[n].volume, rng, Path(folder)))
            if not look.is_comparable:
                small += 1
                continue
            matches = dict(index.find(look))
            shares.append(similarity(scans[n].look, look))
            strangers = [
                name
                for name in (scans[m].name for m in matches if m != n)
                if not same_subject(name, scans[n].name)
                and tuple(sorted((name, scans[n].name))) not in pairs
            ]
            others += [[scans[n].name, *strangers]] * bool(strangers)
            hits += int(n) in matches
            if int(n) not in matches:
                missed.append([scans[n].name, round(shares[-1], 3)])
        tried = len(chosen) - small
        found[kind] = {
            "plants": tried,
            "found": hits,
            "interval": exact_interval(hits, tried),
            "too_small": small,
            "found_others": len(others),
            "others": others,
            "similarity": [float(v) for v in np.percentile(shares, [0, 5, 50])],
            "missed": missed,
        }
        print(f"{kind}: {hits} of {tried}, {small} too small, lowest {min(shares):.2f}", flush=True)
    found["volumes"] = len(used)
    return found


def exact_interval(hits: int, of: int, level: float = 0.95) -> list[float]:
    """Clopper-Pearson."""
    low = beta.ppf((1 - level) / 2, hits, of - hits + 1) if hits else 0.0
    high = beta.ppf((1 + level) / 2, hits + 1, of - hits) if hits < of else 1.0
    return [float(low), float(high)]


def all_pairs(scans: Sequence[Scan], pairs: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Every pair as it lies, and by the index in every turn; flagged ones by what they are."""
    index = SketchIndex([scan.look for scan in scans])
    shares: dict[tuple[int, int], float] = {}
    for a, b in combinations(range(len(scans)), 2):
        shares[a, b] = similarity(scans[a].look, scans[b].look, {0})
    for n, scan in enumerate(scans):
        for other, share in index.find(scan.look, 0.0):
            key = (min(n, other), max(n, other))
            if n != other:
                shares[key] = max(shares[key], share)
    kinds: dict[str, list[float]] = {}
    flagged: set[int] = set()
    rows = []
    for (a, b), share in shares.items():
        names = sorted((scans[a].name, scans[b].name))
        kind = pairs.get((names[0], names[1]))
        kind = kind or ("other side" if same_subject(*names) else "different subjects")
        kinds.setdefault(kind, []).append(share)
        if share >= NEAR or (kind != "different subjects" and "side" not in kind):
            rows.append([round(share, 3), kind, *names])
        if share >= NEAR and kind == "different subjects":
            flagged |= {a, b}
    return {
        "scans": len(scans),
        "wrongly_flagged": len(flagged),
        "interval": exact_interval(len(flagged), len(scans)),
        "kinds": {
            kind: {
                "pairs": len(values),
                "flagged": sum(v >= NEAR for v in values),
                "similarity": [float(v) for v in np.percentile(values, [50, 99.9, 100])],
            }
            for kind, values in kinds.items()
        },
        "told": sorted(rows, reverse=True),
    }


def synthetic(scans: Sequence[Scan], count: int, queries: int, seed: int) -> dict[str, Any]:
    """Search among many: features of real scans in random company, 4 % of their bits changed."""
    rng = np.random.default_rng((seed, 99))
    by_grid: dict[float, list[Any]] = {}
    held = rng.permutation(len(scans))[:queries]
    for n, scan in enumerate(scans):
        if n not in held:
            for grid, bits in scan.look.sets:
                by_grid.setdefault(grid, []).append(bits)
    pools = {grid: np.concatenate(parts) for grid, parts in by_grid.items()}
    grids = sorted(pools, key=lambda grid: -len(pools[grid]))[:2]
    looks = []
    for n in range(count):
        pool = pools[grids[n % 2]]
        bits = pool[rng.integers(0, len(pool), MOST)]
        changed = np.packbits(rng.random((MOST, 144), dtype=np.float32) < 0.04, axis=1)
        looks.append(Sketch(((grids[n % 2], bits ^ changed),)))
    began = time.perf_counter()
    index = SketchIndex(looks)
    built = time.perf_counter() - began
    times, flagged, highest = [], 0, 0.0
    for n in held:
        began = time.perf_counter()
        found = index.find(scans[n].look, 0.0)
        times.append(time.perf_counter() - began)
        flagged += sum(share >= NEAR for _, share in found)
        highest = max(highest, *(share for _, share in found), 0.0)
    hits = 0
    for n in range(0, count, max(1, count // queries)):  # with as many bits changed once more
        ((grid, bits),) = looks[n].sets
        changed = np.packbits(rng.random((MOST, 144)) < 0.02, axis=1)
        hits += n in dict(index.find(Sketch(((grid, bits ^ changed),))))
    return {
        "sketches": count,
        "build_seconds": built,
        "search_seconds": [float(v) for v in np.percentile(times, [0, 50, 100])],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "queries": len(held),
        "flagged": flagged,
        "of_pairs": len(held) * count,
        "highest": highest,
        "copies": len(range(0, count, max(1, count // queries))),
        "copies_found": hits,
    }


def text(found: dict[str, Any]) -> str:
    """The tables."""
    many, pairs, seconds = found["synthetic"], found["pairs"], found["sketch_seconds"]
    kinds = {kind: row for kind, row in found["kinds"].items() if kind != "volumes"}
    lines = [
        "# Near-duplicates",
        "",
        f"{found['scans']} scans, {len(found['not_comparable'])} of them too small or too empty to "
        f"be compared (fewer than {FEWEST} features); seed {found['seed']}. A sketch takes "
        f"{seconds['median']:.2f} s on one thread (the slowest {seconds['largest']:.1f} s) and "
        f"{found['bytes']['median'] / 1024:.1f} KiB. Flagged from a similarity of {found['near']} "
        f"on. {found['machine']['processor']}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        "",
        f"## Plants, of {found['kinds']['volumes']} distinct scans",
        "",
        "| kind | found | 95 % interval | too small | with others | lowest, 5 %, median share |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in kinds.items():
        low, high = row["interval"]
        shares = ", ".join(f"{v:.2f}" for v in row["similarity"])
        lines.append(
            f"| {kind} | {row['found']} of {row['plants']} | {low:.1%} to {high:.1%} | "
            f"{row['too_small']} | {row['found_others']} | {shares} |"
        )
    low, high = pairs["interval"]
    lines += [
        "",
        "With others: plants for which a scan of another subject was found as well.",
        "",
        "## Pairs of scans",
        "",
        f"Of {pairs['scans']} scans {pairs['wrongly_flagged']} are flagged with a scan of another "
        f"subject (95 % interval {low:.2%} to {high:.2%}).",
        "",
        "| pairs | n | flagged | share: median, 99.9 %, highest |",
        "|---|---|---|---|",
    ]
    for kind, row in pairs["kinds"].items():
        shares = ", ".join(f"{v:.3f}" for v in row["similarity"])
        lines.append(f"| {kind} | {row['pairs']} | {row['flagged']} | {shares} |")
    lines += ["", "| share | judged | one | other |", "|---|---|---|---|"]
    lines += [f"| {share} | {kind} | {a} | {b} |" for share, kind, a, b in pairs["told"]]
    low, middle, high = many["search_seconds"]
    lines += [
        "",
        f"## Among {many['sketches']:,} synthetic sketches",
        "",
        f"Built in {many['build_seconds']:.0f} s, {many['peak_gib']:.1f} GiB at most; a search in "
        f"all 48 turns takes {middle:.2f} s ({low:.2f} to {high:.2f}). {many['queries']} real "
        f"scans that gave no features to them: {many['flagged']} of {many['of_pairs']:,} pairs "
        f"flagged, highest share {many['highest']:.3f}. Of {many['copies']} copies with 2 % "
        f"of bits changed {many['copies_found']} are found.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
