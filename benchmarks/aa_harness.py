"""How often the whole harness finds a difference where there is none, on real scans.

    python benchmarks/aa_harness.py --work DIR [--output docs/results] [--jobs 2] [--draws 12]

`--work` is that of benchmarks/pilot.py, which has made the corpus of hippocampi. An arm that is
called pretrained gets, in each draw, an encoder of random weights of its own: exactly what scratch
has, by other numbers. Both arms are finetuned, predicted, scored and tabulated as any other, 2
labels, the pilot's recipe. All draws together are one study; every choice of 3, of 5 and of 8 of
them is another, and shares draws with the rest, so the shares below are one study's luck, seen
from many sides, and no proof by themselves: that is docs/results/aa_grid.md. Writes
aa_harness.json (machine, versions, raw values) and aa_harness.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line import ROOT, voxelith
from pilot import FEATURES, HIPPOCAMPUS

from data_prep.files import write_json, write_text
from finetune.facts import find_rows
from finetune.intervals import estimate
from finetune.lines import Line
from finetune.rows import Row, read_rows
from finetune.table import tabulate
from pretrain.bench import machine
from pretrain.release import load_release, write_release
from pretrain.run_folder import versions

LR = 3e-3
SIZES = (3, 5, 8)
SAME = {"checkpoint": "no pretraining", "checkpoint_digest": "random"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--draws", type=int, default=12)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    for draw in range(chosen.draws):
        start = work / "random" / f"random-{draw}"
        if not start.exists():
            randomise(work / "one-step", start, seed=1000 + draw)
        voxelith("finetune", "-m", *HIPPOCAMPUS, f"corpus={work / 'hippocampus'}",
                 f"runs={work / 'aa'}", f"lr={LR:g}", "labels=2", f"seed={draw}",
                 f"jobs={chosen.jobs}", f"ckpt={start}")  # fmt: skip
    rows = [row for file in find_rows([work / "aa"]) for row in read_rows(file)]
    rows = [row if row.arm == "scratch" else dataclasses.replace(row, **SAME) for row in rows]
    chosen.output.mkdir(parents=True, exist_ok=True)
    report(rows, chosen.output)


def randomise(source: Path, output: Path, seed: int) -> None:
    """A release of the same network with the weights that it begins with."""
    release = load_release(source)
    torch.manual_seed(seed)
    encoder = release.build_encoder()
    config = release.config | {"name": output.name, "decoder": None, "transfers": "encoder"}
    prints = {"format": 1, "values": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_release(output, encoder=encoder, config=config, fingerprints=prints,
                  card=f"# {output.name}\n\nRandom weights, seed {seed}.\n")  # fmt: skip


def report(rows: list[Row], output: Path) -> None:
    """Writes aa_harness.json and aa_harness.md."""
    [group] = tabulate(rows).groups
    draws = sorted({row.seed for row in rows})
    arms = {arm: by_draw(rows, arm, draws) for arm in ("pretrained", "scratch")}
    gap = arms["pretrained"] - arms["scratch"]  # [subjects, draws]
    found = {}
    for size in SIZES:
        chosen = list(itertools.combinations(range(len(draws)), size))
        estimates = [estimate(gap[:, list(columns)]) for columns in chosen]
        wrong = [one.p < 0.05 for one in estimates]
        boot = [bootstrap_excludes_zero(gap[:, list(c)], k) for k, c in enumerate(chosen)]
        found[size] = {
            "studies": len(chosen),
            "wrong": float(np.mean(wrong)),
            "bootstrap_wrong": float(np.mean(boot)),
            "half_width": float(np.median([one.high - one.mean for one in estimates])),
            "detectable": float(np.median([one.detectable() for one in estimates])),
        }
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "network": FEATURES,
        "line": dataclasses.asdict(group.main),
        "subsets": found,
        "dice": {arm: values.round(4).tolist() for arm, values in arms.items()},
    }
    write_json(output / "aa_harness.json", result)
    text = markdown(group.main, found)
    write_text(output / "aa_harness.md", text)
    print(text)


def by_draw(rows: list[Row], arm: str, draws: list[int]) -> np.ndarray:
    """[subjects, draws]: Dice in points over classes, then the cases of a subject."""
    cells: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        if row.arm == arm:
            cells.setdefault((row.subject, row.seed), {}).setdefault(row.case, []).append(row.dsc)
    subjects = sorted({subject for subject, _ in cells})
    return np.array(
        [
            [100 * np.mean([np.mean(v) for v in cells[subject, draw].values()]) for draw in draws]
            for subject in subjects
        ]
    )


def bootstrap_excludes_zero(gap: np.ndarray, seed: int, resamples: int = 1000) -> bool:
    """The percentile bootstrap over subjects and draws, as it is often done."""
    rng = np.random.default_rng(seed)
    units, draws = gap.shape
    means = [
        gap[rng.integers(units, size=units)][:, rng.integers(draws, size=draws)].mean()
        for _ in range(resamples)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return bool(low > 0 or high < 0)


def markdown(line: Line, found: dict[int, dict[str, float]]) -> str:
    """What docs/results/aa_harness.md shows."""
    d = line.difference
    assert d is not None and line.pretrained is not None and line.scratch is not None
    rows = [
        f"| {size} | {one['studies']} | {one['wrong']:.1%} | {one['bootstrap_wrong']:.1%} "
        f"| {one['half_width']:.1f} | {one['detectable']:.1f} |"
        for size, one in found.items()
    ]
    return (
        "\n".join(
            [
                "# A/A on real scans: two arms without a difference",
                "",
                "Made by `python benchmarks/aa_harness.py`; raw values in "
                "[aa_harness.json](aa_harness.json). Both arms begin with random encoders, each "
                f"draw with others; MSD Task04, 2 labels, {d.cases} cases of {d.units} subjects, "
                f"{d.draws} draws. Dice {line.pretrained.mean:.1f} and {line.scratch.mean:.1f}, "
                f"difference {d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}], p {d.p:.2g}: "
                f"{line.verdict}. Standard deviations of the differences: subjects "
                f"{d.sd_units:.1f}, draws {d.sd_draws:.1f}, rest {d.sd_rest:.1f} points.",
                "",
                "Every choice of so many of the draws as a study of its own; they share draws and "
                "all subjects, so a share far from 5 % may be chance.",
                "",
                "| draws | studies | called different | by a percentile bootstrap "
                "| half width of the interval | found with 80 % |",
                "| --: | --: | --: | --: | --: | --: |",
                *rows,
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
