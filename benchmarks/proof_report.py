"""What came of the proof, from its archives alone; see docs/results/protocol.md.

    python benchmarks/proof_report.py

Reads docs/results/proof/*.tar.xz, which benchmarks/proof.py has kept, and writes beside them
rounds.md (recipes on validation subjects, the gate), a folder with the table and pictures of each
cell of test subjects, hippocampus/ with all label counts of that task, proof.md, the summary, and
what was looked at on validation subjects: one label, shifted scans, the other objectives.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pilot import mean_dice
from proof import (
    CELLS,
    HEADS,
    NOMINATED,
    PRIMARY,
    PROOF,
    RELEASE,
    ROUND_2,
    SCRATCHS_BEST,
    SEEDS,
)

from data_prep.files import write_bytes, write_text
from finetune.budget import MARGIN, Curve, mean_curve, read_curve
from finetune.comparisons import holm
from finetune.figures import draw_table
from finetune.formats import cell, make_table
from finetune.lines import Group, Line, Table
from finetune.table import read_table

FULL, NOT_WORSE = "hippocampus-all", 1
"""Where pretraining should at least do no harm, and the margin in points of Dice."""
LATE = f"late-{HEADS}"
"""On test subjects, decided on after they had been looked at."""
LOOKED = ("one-label", "heads-longer", "shift-plain", "shift-blurred", "shift-coarse")
"""On validation subjects: where an interval holds zero, and what the gain on heads hangs on."""
TITLES = {
    PRIMARY: f"{PRIMARY}, the primary cell",
    "probe": "hippocampus-8, frozen features beside random ones (ridge probe)",
    LATE: f"{HEADS} at the rate that is best for both arms, decided on after the row above",
    "one-label": "Looked at, validation subjects: hippocampus with one label",
    "heads-longer": "Looked at, validation subjects: heads, four times the steps, first seed",
    "shift-plain": "Looked at, validation subjects: the networks of the primary cell",
    "shift-blurred": "Looked at, validation subjects: the same on scans of half the resolution",
    "shift-coarse": "Looked at, validation subjects: the same on scans with voxels of 1.5 mm",
}

SEED = re.compile(r"-(\d+|\{[\d,]+\})(?= with |$)")
"""What the name of an encoder ends with."""
SHOWN = {
    "forest.png": "Differences of all cells of test subjects with their intervals",
    "label_curves.png": "Dice against the number of labels",
}
"""Pictures of all cells together."""


def main() -> None:
    write_text(PROOF / "rounds.md", rounds())
    with tempfile.TemporaryDirectory() as folder:
        for archive in PROOF.glob("*.tar.xz"):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        for name in ("explored", "probed"):
            if (Path(folder) / name).exists():
                make_table([Path(folder) / name], PROOF / name)
        runs = {name: Path(folder) / f"test-{name}" for name in CELLS}
        runs |= {LATE: Path(folder) / LATE, "probe": Path(folder) / "test-probe"}
        runs |= {name: Path(folder) / name for name in LOOKED}
        for path in runs.values():
            by_names_of_the_protocol(path)
        for name in CELLS:
            leave_out_begun(runs[name])
        runs = {name: path for name, path in runs.items() if any(path.glob("*"))}
        if not runs.keys() & CELLS:
            return
        search = Path(folder) / "round-1"
        for run in (Path(folder) / "heads-rates").glob("ixi_dlmuse-*"):
            if "permuted" not in run.name:  # a control, not a choice
                run.rename(search / run.name)
        for method in ROUND_2:  # each was searched at the one rate that is best for scratch
            for run in (Path(folder) / "round-2").glob(f"hippocampus-{method}-0-*"):
                run.rename(search / run.name)
        tables = {
            name: judged(
                make_table([path], PROOF / name, search=search),
                0 if name in (LATE, *LOOKED) else len(NOMINATED),
            )
            for name, path in runs.items()
        }
        of_task = [name for name, (task, *_) in CELLS.items() if task == "hippocampus"]
        hippocampi = [runs[name] for name in of_task if name in runs]
        if len(hippocampi) > 1:
            make_table(hippocampi, PROOF / "hippocampus", search=search)
        wide = {
            name: judged(read_table([path.with_name(f"{path.name}-2mm")]), 0)
            for name, path in runs.items()
            if path.with_name(f"{path.name}-2mm").exists()
        }
        used = weights([path for name, path in runs.items() if name in CELLS])
    pictures = draw_table(overview(tables))
    for name in SHOWN:
        (PROOF / name).unlink(missing_ok=True)
        if name in pictures:
            write_bytes(PROOF / name, pictures[name])
    said = summary(tables, wide, [n for n in SHOWN if n in pictures])
    write_text(PROOF / "proof.md", said + used)


def by_names_of_the_protocol(cell: Path) -> None:
    """In its rows the release is a seed of its recipe, also where a run took it as released."""
    first = f"{next(iter(NOMINATED))}-{SEEDS[0]}"
    for rows in cell.glob("*/rows.csv"):
        write_text(rows, rows.read_text().replace(f",{RELEASE},", f",{first},"))


def leave_out_begun(cell: Path) -> None:
    """Takes the runs of recipes away that are not there with all of their seeds, and their twins.

    Test subjects are looked at once, and not while encoders of a recipe are still to be scored.
    """
    recipes = {run: compared_within(run) for run in cell.glob("*/")}
    begun = set()
    for method in NOMINATED:
        seeds = [[run for run in recipes if f"-{method}-{seed}-" in run.name] for seed in SEEDS]
        if not all(seeds):
            begun |= {recipes[run] for found in seeds for run in found}
    for run, recipe in recipes.items():
        if recipe in begun:
            shutil.rmtree(run)


def compared_within(run: Path) -> str:
    """The hash of the recipe whose arms a run is one of; scratch at its own best has another."""
    hashed: str = json.loads((run / "run.json").read_text())["identity"]["config_hash"]
    return hashed


def overview(tables: Mapping[str, Table]) -> Table:
    """All cells of test subjects as one table, by the names of the protocol."""
    groups = []
    rate, best = NOMINATED["cnn-mae-spatial"], SCRATCHS_BEST[CELLS[HEADS][0]]
    besides = {HEADS: f" at {float(rate):g}, scratch at {float(best):g}",
               LATE: f", both at {float(best):g}", "probe": ", frozen"}  # fmt: skip
    for name in (*CELLS, LATE, "probe"):
        for group in shown(tables[name]) if name in tables else ():
            whose = told(group) + besides.get(name, "")
            groups.append(dataclasses.replace(group, checkpoint=whose))
    return Table(tuple(groups))


def judged(table: Table, nominated: int) -> Table:
    """A cell by the rules of the protocol.

    The verdicts of recipes are those after Holm over all that were nominated for it, those that are
    still to be scored included.
    """
    recipes = [group for group in table.groups if group.of_recipe]
    missing = [1.0] * max(0, nominated - len(recipes))
    adjusted = iter(holm([*(group.main.p for group in recipes), *missing]))
    groups = []
    for group in table.groups:
        main, *others = group.lines
        if group.of_recipe:
            main = main.adjusted(next(adjusted))
        groups.append(dataclasses.replace(group, lines=(main, *others)))
    return Table(tuple(groups))


def summary(tables: Mapping[str, Table], wide: Mapping[str, Table], pictures: Sequence[str]) -> str:
    """What proof.md shows: the nominated recipes and the controls of each cell."""
    lines = [
        "# The proof",
        "",
        "Made by `python benchmarks/proof_report.py` from the archives beside it, by the "
        "[protocol](../protocol.md). Means over subjects and draws of labels, with 95 % intervals; "
        "of a recipe over three pretraining seeds, which are random too. Differences are to "
        "scratch; where scratch has a better rate of its own, to the arm over which a gain is less "
        "sure. p: Holm's, over both nominated recipes. *Seen*: the true difference that one such "
        "test would have found with a chance of 80 %, by what varied here. The last three columns "
        "are differences too, and like the controls one look each, corrected for nothing.",
    ]
    for picture in pictures:
        lines += ["", f"![{SHOWN[picture]}]({picture})"]
    for name, table in tables.items():
        groups = shown(table)
        at_two = {told(group): group for group in wide[name].groups} if name in wide else {}
        lines += [
            "",
            f"## {TITLES.get(name, name)}",
            "",
            f"[All lines]({name}/table.md), each by itself.{still_gaining(groups)}"
            f"{not_worse(groups) if name == FULL else ''}",
            "",
            "| encoder | subjects | draws | Dice | scratch | difference | p | seen "
            "| surface Dice 1 mm | 2 mm | HD95, mm |",
            "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        ]
        for group in groups:
            main = group.main
            found = main.decides
            seen = f"{found.detectable():.1f}" if found is not None else ""
            p = main.adjusted_p if group.of_recipe else None
            basis = "" if found is None else f"{found.units} | {found.draws}"
            lines.append(
                f"| {told(group)} | {basis or ' | '} "
                f"| {cell(main.pretrained)} | {cell(beaten(main))} "
                f"| {cell(found, sign=True)} | {'' if p is None else f'{p:.2g}'} "
                f"| {seen} | {difference_in(group, 'nsd')} "
                f"| {difference_in(at_two.get(told(group)), 'nsd')} "
                f"| {difference_in(group, 'hd95')} |"
            )
    return "\n".join(lines) + "\n"


def weights(cells: Sequence[Path]) -> str:
    """Whether the runs on test subjects used the weights that they say, by encoder."""
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for path in cells:
        for run in sorted(path.glob("*/load_report.json")):
            config = json.loads((run.parent / "config.json").read_text())
            arm = "scratch" if config["init"] == "scratch" else Path(config["ckpt"]).name
            step_zero = json.loads((run.parent / "step_zero.json").read_text())
            found[SEED.sub("", arm)].append((json.loads(run.read_text()), step_zero))
    lines = [
        "",
        "## The weights that were used",
        "",
        "Of all runs on test subjects: the least share of the encoder's parameters that came from "
        "the release, tensors that were copied and that began anew, and runs whose features before "
        "the first step are those of the release to the last bit, on its golden scan.",
        "",
        "| encoder | runs | taken | copied | anew | equal to the release |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for arm, both in found.items():
        reports = [report for report, _ in both]
        copied = {len(one["copied"]) for one in reports}
        anew = {len(one["new"]) + len(one["skipped"]) for one in reports}
        counts = [" to ".join(map(str, sorted(number))) for number in (copied, anew)]
        equal = sum(one["features_equal_release"] for _, one in both)
        lines.append(
            f"| {arm} | {len(both)} | {min(one['covered'] for one in reports):.0%} "
            f"| {' | '.join(counts)} | {equal} |"
        )
    return "\n".join(lines) + "\n"


def shown(table: Table) -> list[Group]:
    """Recipes, then encoders that there is one of: no single seed of a recipe."""
    recipes = [group for group in table.groups if group.of_recipe]
    names = {told(group) for group in recipes}
    others = [group for group in table.groups if told(group) not in names]
    order = list(NOMINATED)
    return sorted(recipes, key=lambda one: order.index(told(one).split(" with ")[0])) + others


def told(group: Group) -> str:
    """The encoder without its pretraining seed, or seeds."""
    return SEED.sub("", group.checkpoint)


def still_gaining(groups: Sequence[Group]) -> str:
    """What training still gained at its end, where that is more than nothing."""
    gains = [g.main.still_gains for g in groups if not math.isnan(g.main.still_gains)]
    if max(gains, default=0.0) <= MARGIN:
        return ""
    return (
        f" Not converged: the last quarter of training still gained up to {max(gains):.1f} points "
        "on validation subjects, in one arm or the other."
    )


def not_worse(groups: Sequence[Group]) -> str:
    """Whether recipes are not worse than scratch by more than the protocol's margin."""
    said = ""
    for group in [one for one in groups if one.of_recipe]:
        low = math.nan if group.main.decides is None else group.main.decides.low
        what = "is not" if low > -NOT_WORSE else "may be"
        said += f" {told(group)} {what} worse by more than {NOT_WORSE} point (from {low:+.1f} on)."
    return said


def beaten(line: Line) -> Any:
    """The scratch arm that the difference is to: the one that is harder to beat."""
    return line.own if line.own_decides else line.scratch


def difference_in(group: Group | None, metric: str) -> str:
    """The difference in another score, the mean of the classes."""
    for line in group.lines if group is not None else ():
        if line.metric == metric and line.class_name == "mean":
            return cell(line.decides, sign=True, digits=line.digits)
    return ""


def rounds() -> str:
    """What rounds.md shows: each round's recipes, by arm and rate, the gate."""
    lines = [
        "# Rounds on validation subjects",
        "",
        "Made by `python benchmarks/proof_report.py` from the archives beside it. Dice in points, "
        "the mean of the classes over the scans of a draw: its mean over draws, and their standard "
        "deviation. *last quarter*: what the mean curve of up to 8 cases still gained in it.",
    ]
    looked = [*sorted(PROOF.glob("round-*.tar.xz")), PROOF / "gate.tar.xz"]
    looked += PROOF.glob("heads-rates.tar.xz")
    for archive in looked:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            runs = sorted(Path(folder).glob("*/*/rows.csv"))
            found: dict[tuple[str, str, float, str], list[tuple[float, Curve | None]]] = {}
            for rows in runs:
                config = json.loads((rows.parent / "config.json").read_text())
                arm = "scratch" if config["init"] == "scratch" else Path(config["ckpt"]).name
                key = (arm, str(config["labels"]), float(config["lr"]), _departs(config))
                found.setdefault(key, []).append((mean_dice(rows), read_curve(rows.parent)))
        lines += ["", f"## {archive.name.removesuffix('.tar.xz')}", "",
                  "| arm | labels | rate | besides | draws | Dice | draws' SD | last quarter |",
                  "| --- | --- | --: | --- | --: | --: | --: | --: |"]  # fmt: skip
        for (arm, labels, rate, more), values in sorted(found.items()):
            dice = [value for value, _ in values]
            curve = mean_curve([one for _, one in values])
            gain = "" if curve is None else f"{curve.last_gain:+.1f}"
            spread = f"{statistics.stdev(dice):.1f}" if len(dice) > 1 else ""
            lines.append(
                f"| {arm} | {labels} | {rate:g} | {more} | {len(dice)} "
                f"| {statistics.mean(dice):.1f} | {spread} | {gain} |"
            )
    lines += [
        "",
        "nnU-Net v2 on the cases of the gate (benchmarks/nnunet_gate.py):",
        "",
        "| its network | seconds of training | steps | Dice |",
        "| --- | --: | --: | --: |",
    ]
    for file in sorted(PROOF.glob("nnunet-*.json")):
        one = json.loads(file.read_text())
        lines.append(
            f"| {'its own' if one['network'] == 'own' else 'ours'} | {one['train_seconds']:.0f} "
            f"| {one['steps']} | {one['dice']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _departs(config: dict[str, Any]) -> str:
    """What a run has that others of its round have not."""
    said = [f"decoder alone for {phase['steps']} steps first" for phase in config["phases"]]
    if config["freeze"] != "none":
        said.append("encoder frozen")
    if config["layer_decay"] != 1:
        said.append(f"layer decay {config['layer_decay']:g}")
    if config["transfer"] != "auto":
        said.append("decoder transferred")
    return ", ".join(said)


if __name__ == "__main__":
    main()
