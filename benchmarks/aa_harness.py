"""How often the whole harness finds a difference where there is none, and one that is planted.

    python benchmarks/aa_harness.py --work DIR [--output docs/results] [--jobs 2] [--draws 8]

`--work` is that of benchmarks/pilot.py, which has made the corpus of hippocampi. An arm that is
called pretrained gets, in each draw, an encoder of random weights of its own: exactly what scratch
has, by other numbers. A third arm begins with a gain that is there: the pilot's network of all
labels, finetuned again. All are finetuned, predicted, scored and tabulated as any other, 2 labels,
the pilot's recipe, the same draws. All draws together are one study; every choice of 3, of 5 and of
8 of them is another, and shares draws with the rest, so the shares below are one study's luck, seen
from many sides, and no proof by themselves: that is docs/results/aa_grid.md. Writes
aa_harness.json (machine, versions, raw values) and aa_harness.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

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
    parser.add_argument("--draws", type=int, default=8)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    sweep = [*HIPPOCAMPUS, f"corpus={work / 'hippocampus'}", f"runs={work / 'aa'}", f"lr={LR:g}",
             "labels=2", f"jobs={chosen.jobs}"]  # fmt: skip
    for draw in range(chosen.draws):
        start = work / "random" / f"random-{draw}"
        if not start.exists():
            randomise(work / "one-step", start, seed=1000 + draw)
        voxelith("finetune", "-m", *sweep, f"seed={draw}", f"ckpt={start}")
    seeds = ",".join(map(str, range(chosen.draws)))
    voxelith("finetune", "-m", *sweep, f"seed={seeds}", f"ckpt={work / 'supervised-all'}")
    rows = [row for file in find_rows([work / "aa"]) for row in read_rows(file)]
    arms: dict[str, list[Row]] = {"scratch": [], "random": [], "planted": []}
    for row in rows:
        if row.seed >= chosen.draws:
            continue
        if row.arm == "scratch":
            arms["scratch"].append(row)
        elif row.checkpoint.startswith("random-"):
            arms["random"].append(dataclasses.replace(row, **SAME))
        else:
            arms["planted"].append(row)
    chosen.output.mkdir(parents=True, exist_ok=True)
    scratch = arms.pop("scratch")
    report({name: scratch + found for name, found in arms.items()}, chosen.output)


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


def report(arms: dict[str, list[Row]], output: Path) -> None:
    """Writes aa_harness.json and aa_harness.md."""
    studies = {name: study(rows) for name, rows in arms.items()}
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "network": FEATURES,
        **{
            name: {
                "line": dataclasses.asdict(one.line),
                "subsets": one.subsets,
                "dice": {arm: values.round(4).tolist() for arm, values in one.dice.items()},
            }
            for name, one in studies.items()
        },
    }
    write_json(output / "aa_harness.json", result)
    text = markdown(studies)
    write_text(output / "aa_harness.md", text)
    print(text)


class Study(NamedTuple):
    """An arm beside scratch: its line, Dice of both [subjects, draws], and its smaller studies."""

    line: Line
    dice: dict[str, np.ndarray]
    subsets: dict[int, dict[str, float]]


def study(rows: list[Row]) -> Study:
    """The table's line of an arm, and what every choice of so many draws would have said."""
    [group] = tabulate(rows).groups
    draws = sorted({row.seed for row in rows})
    dice = {arm: by_draw(rows, arm, draws) for arm in ("pretrained", "scratch")}
    gap = dice["pretrained"] - dice["scratch"]  # [subjects, draws]
    found = {}
    for size in SIZES:
        chosen = list(itertools.combinations(range(len(draws)), size))
        estimates = [estimate(gap[:, list(columns)]) for columns in chosen]
        boot = [bootstrap_excludes_zero(gap[:, list(c)], k) for k, c in enumerate(chosen)]
        found[size] = {
            "studies": len(chosen),
            "different": float(np.mean([one.p < 0.05 for one in estimates])),
            "bootstrap_different": float(np.mean(boot)),
            "half_width": float(np.median([one.high - one.mean for one in estimates])),
            "detectable": float(np.median([one.detectable() for one in estimates])),
        }
    return Study(group.main, dice, found)


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


def markdown(studies: dict[str, Study]) -> str:
    """What docs/results/aa_harness.md shows."""
    d = studies["random"].line.difference
    assert d is not None
    lines = [
        "# A/A on real scans: arms without a difference, and one with a planted gain",
        "",
        "Made by `python benchmarks/aa_harness.py`; raw values in "
        f"[aa_harness.json](aa_harness.json). MSD Task04, 2 labels, {d.cases} cases of {d.units} "
        f"subjects, {d.draws} draws, which all arms share. Below, every choice of so many of the "
        "draws as a study of its own; they share draws and all subjects, so a share far from what "
        "it should be may be chance.",
    ]
    for name, heading in (
        ("random", "Random encoders, each draw with others: nothing to find"),
        ("planted", "The network of all labels, finetuned again on 2: a gain that is there"),
    ):
        line, found = studies[name].line, studies[name].subsets
        d = line.difference
        assert d is not None and line.pretrained is not None and line.scratch is not None
        lines += [
            "",
            f"## {heading}",
            "",
            f"Dice {line.pretrained.mean:.1f}, scratch {line.scratch.mean:.1f}, difference "
            f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}], p {d.p:.2g}: {line.verdict}. Standard "
            f"deviations of the differences: subjects {d.sd_units:.1f}, draws {d.sd_draws:.1f}, "
            f"rest {d.sd_rest:.1f} points.",
            "",
            "| draws | studies | called different | by a percentile bootstrap "
            "| half width of the interval | found with 80 % |",
            "| --: | --: | --: | --: | --: | --: |",
            *[
                f"| {size} | {one['studies']} | {one['different']:.1%} "
                f"| {one['bootstrap_different']:.1%} | {one['half_width']:.1f} "
                f"| {one['detectable']:.1f} |"
                for size, one in found.items()
            ],
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
