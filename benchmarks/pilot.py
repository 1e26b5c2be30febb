"""Can the benchmark tell good pretraining from none? A pilot with controls, validation alone.

    python benchmarks/pilot.py --data DIR --work DIR [--output docs/results] [--jobs 2]

`--data` has `msd_task04_hippocampus/` (images, labels) and `ixi_t1_dlmuse/` (t1, dlmuse_seg).
A residual U-Net of 0.5 M parameters in the encoder learns, without labels, from the training
subjects' hippocampi and from IXI's heads, and is finetuned on 2 and on 8 labelled hippocampi, three
draws each, beside scratch at the same recipe and at its own best. Controls stand beside it:

- permuted: the weights of `cnn-mae`, shuffled within each tensor: sizes without meaning;
- one-step: the same pretraining after a single step;
- supervised-ixi: trained to segment IXI's heads with their labels;
- supervised-all: trained on this very task with all training labels, so the gain is planted: a
  benchmark that does not see this one sees nothing.

Negative controls that help, or a positive one that does not, say something about the benchmark.
Test subjects take no part. What is finished is not done again; `--work` holds it. Writes pilot.json
(machine, versions, raw values) and pilot.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line import ROOT, heads, hippocampi, prep, voxelith, write_list

from data_prep.files import write_json, write_text
from finetune.budget import read_curve
from finetune.formats import cell, notes_of
from finetune.lines import Group, Table
from finetune.rows import read_rows
from finetune.table import read_table
from pretrain.bench import machine
from pretrain.release import load_release, write_release
from pretrain.run_folder import versions

FEATURES = "backbone.features=[8,16,32,64]"
PRETRAIN_STEPS, SUPERVISED_STEPS, STEPS, ALL_STEPS = 600, 4000, 300, 1200
RATES = (1e-3, 3e-3, 1e-2)
LABELS, DRAWS, SEARCH_DRAW = (2, 8), (0, 1, 2), 100
HIPPOCAMPUS = (
    "task=hippocampus", "part=validation", "protocol=tiny", "trainer=cpu", "trainer.threads=1",
    "batch_size=2", f"steps={STEPS}", "warmup=20", "validations=4",
)  # fmt: skip
ARMS = ("cnn-mae", "volume-fusion", "permuted", "one-step", "supervised-ixi", "supervised-all")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_corpora(chosen.data.resolve(), work)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        first = pool.submit(controls, work), pool.submit(search, work)
        fusion = pool.submit(pretrain, work, "volume-fusion", "volume_fusion_small", PRETRAIN_STEPS)
        for one in (*first, fusion):
            one.result()
    best = best_rates(work / "search")
    sweep = [*HIPPOCAMPUS, f"corpus={work / 'hippocampus'}", f"runs={work / 'runs'}",
             f"lr={best['pretrained']:g}", f"labels={','.join(map(str, LABELS))}",
             f"seed={','.join(map(str, DRAWS))}", f"jobs={chosen.jobs}"]  # fmt: skip
    voxelith("finetune", "-m", *sweep, "ckpt=" + ",".join(str(work / name) for name in ARMS))
    if best["scratch"] != best["pretrained"]:
        voxelith("finetune", "-m", *sweep, f"ckpt={work / 'cnn-mae'}", "init=scratch",
                  "recipe_of=own", f"own={{lr: {best['scratch']:g}}}",
                  f"search={{lr: [{_rates()}], draws: 1}}")  # fmt: skip
    chosen.output.mkdir(parents=True, exist_ok=True)
    report(work, chosen.output, best)


def make_corpora(data: Path, work: Path) -> None:
    """Labelled hippocampi by subject, labelled heads, and what pretraining may see of both."""
    rows = hippocampi(data)
    write_list(work / "hippocampus.csv", ["image", "label", "subject", "modality"], rows)
    prep(work / "hippocampus", "classes={1: anterior, 2: posterior}", "shard_mib=4")
    split = json.loads((work / "hippocampus" / "splits" / "default.json").read_text())
    train = set(split["groups"]["train"])
    scans = [[image, subject, "MR"] for image, _, subject, _ in rows if subject in train]
    rows = heads(data)
    write_list(work / "heads.csv", ["image", "label", "subject", "modality"], rows)
    prep(work / "heads", "shard_mib=16")
    scans += [[image, subject, "MR"] for image, _, subject, _ in rows]
    write_list(work / "unlabelled.csv", ["image", "subject", "modality"], scans)
    prep(work / "unlabelled", "labels=false", "spacing=[1,1,1]", "shard_mib=16")


def pretrain(work: Path, name: str, experiment: str, steps: int) -> None:
    """The release `name` of a run of its own."""
    if not (work / name).exists():
        voxelith("pretrain", f"experiment={experiment}", f"corpus={work / 'unlabelled'}",
                  f"run={name}", f"runs={work / 'pretrained'}", FEATURES, f"steps={steps}",
                  f"warmup={steps // 10}", "trainer.threads=1", "augment=light")  # fmt: skip
        voxelith("export", str(work / "pretrained" / name), str(work / name))


def search(work: Path) -> None:
    """Pretraining in question, its weights without their meaning, and rates for both arms."""
    pretrain(work, "cnn-mae", "cnn_mae_small", PRETRAIN_STEPS)
    if not (work / "permuted").exists():
        permute(work / "cnn-mae", work / "permuted")
    voxelith("finetune", "-m", *HIPPOCAMPUS, f"corpus={work / 'hippocampus'}",
              f"ckpt={work / 'cnn-mae'}", "labels=8", f"seed={SEARCH_DRAW}", f"lr={_rates()}",
              f"runs={work / 'search'}", "jobs=1")  # fmt: skip


def controls(work: Path) -> None:
    """One step, what labelled heads teach, and scratch with all labels."""
    pretrain(work, "one-step", "cnn_mae_small", 1)
    scratch = [f"ckpt={work / 'one-step'}", "init=scratch", "labels=all", "lr=3e-3", "warmup=60",
               "part=validation", "trainer=cpu", "trainer.threads=1"]  # fmt: skip
    if not (work / "supervised-ixi").exists():
        voxelith("finetune", "task=ixi_dlmuse", f"corpus={work / 'heads'}", *scratch,
                  f"steps={SUPERVISED_STEPS}", "overlap=0.0", f"runs={work / 'supervised'}",
                  "run=ixi")  # fmt: skip
        voxelith("export", str(work / "supervised" / "ixi"), str(work / "supervised-ixi"))
    voxelith("finetune", "task=hippocampus", f"corpus={work / 'hippocampus'}", *scratch,
              f"steps={ALL_STEPS}", f"runs={work / 'all'}", "run=all")  # fmt: skip
    if not (work / "supervised-all").exists():
        voxelith("export", str(work / "all" / "all"), str(work / "supervised-all"))


def permute(source: Path, output: Path) -> None:
    """A release whose weights are another's, shuffled within each tensor."""
    release = load_release(source)
    encoder = release.build_encoder()
    release.load(encoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in encoder.state_dict().values():
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    config = release.config | {"name": output.name, "decoder": None, "transfers": "encoder"}
    prints = json.loads((source / "fingerprints.json").read_text())
    card = f"# {output.name}\n\nThe weights of {release.name}, shuffled within each tensor.\n"
    write_release(output, encoder=encoder, config=config, fingerprints=prints, card=card)


def best_rates(runs: Path) -> dict[str, float]:
    """The rate of each arm with the highest Dice over the validation cases."""
    found: dict[str, dict[float, float]] = {"pretrained": {}, "scratch": {}}
    for run in sorted(runs.glob("*/rows.csv")):
        found[_config(run)["init"]][_config(run)["lr"]] = mean_dice(run)
    return {arm: max(rates, key=lambda rate: rates[rate]) for arm, rates in found.items()}


def mean_dice(rows: Path) -> float:
    """Dice in points over classes, then cases, of a run's rows."""
    cases: dict[str, list[float]] = {}
    for row in read_rows(rows):
        cases.setdefault(row.case, []).append(row.dsc)
    return 100 * sum(sum(v) / len(v) for v in cases.values()) / len(cases)


def report(work: Path, output: Path, best: dict[str, float]) -> None:
    """Writes pilot.json and pilot.md."""
    table = read_table([work / "runs"], search=work / "search")
    everything = mean_dice(work / "all" / "all" / "rows.csv")
    search = {
        run.parent.name: {"dice": mean_dice(run), "lr": _config(run)["lr"]}
        for run in sorted((work / "search").glob("*/rows.csv"))
    }
    runs = {
        run.parent.name: {
            "arm": _config(run)["init"],
            "curve": _curve(run),
            "cases": {f"{row.case} {row.class_name}": round(row.dsc, 5) for row in read_rows(run)},
        }
        for run in sorted((work / "runs").glob("*/rows.csv"))
    }
    result = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "steps": {
            "pretraining": PRETRAIN_STEPS,
            "supervised": SUPERVISED_STEPS,
            "finetuning": STEPS,
        },
        "all_labels_dice": everything,
        "rates": best,
        "search": search,
        "table": table.to_dict(),
        "runs": runs,
    }
    write_json(output / "pilot.json", result)
    write_text(output / "pilot.md", markdown(table, everything, best))
    print(markdown(table, everything, best))


def markdown(table: Table, everything: float, best: dict[str, float]) -> str:
    """What docs/results/pilot.md shows."""
    rows = []
    for group in sorted(table.groups, key=lambda g: (g.n_labels, ARMS.index(arm_of(g)))):
        line = group.main
        values = [arm_of(group), str(group.n_labels), cell(line.pretrained), cell(line.scratch)]
        values += [cell(line.difference, sign=True), cell(line.own)]
        values += [cell(line.against_own, sign=True), f"{line.adjusted_p:.2g}", line.verdict]
        rows.append(f"| {' | '.join(values)} |")
    basis = table.groups[0].main.difference
    assert basis is not None
    notes = [f"- {note}" for note in notes_of(table)]
    return (
        "\n".join(
            [
                "# Pilot: can the benchmark tell good pretraining from none?",
                "",
                "Made by `python benchmarks/pilot.py`; what the arms and controls are stands at "
                "the head of that file, raw values in [pilot.json](pilot.json). Dice in points "
                f"over the validation part of MSD Task04 ({basis.cases} cases of {basis.units} "
                f"subjects, {basis.draws} draws), 95 % intervals over subjects and draws. "
                f"Pretraining: {PRETRAIN_STEPS} steps of 2 crops of 32x48x32; finetuning: {STEPS} "
                f"steps of 2. Rates from {', '.join(f'{r:g}' for r in RATES)}, chosen on these "
                f"cases with a draw of its own: {best['pretrained']:g} for cnn-mae, and so for "
                f"every arm and twin, {best['scratch']:g} for scratch at its own best. "
                f"Scratch with all labels, {ALL_STEPS} steps: {everything:.1f}.",
                "",
                "| checkpoint | labels | pretrained | scratch | difference | scratch, own best "
                "| difference to it | p | verdict |",
                "| --- | --: | --: | --: | --: | --: | --: | --: | --- |",
                *rows,
                "",
                "## What it says",
                "",
                *reading(table),
                "",
                "## Notes of the table",
                "",
                *notes,
            ]
        ).rstrip()
        + "\n"
    )


def reading(table: Table) -> list[str]:
    """What the controls say of the benchmark, and what it could have found."""
    said = []
    for what, arms in (
        ("Negative controls (permuted, one-step)", ("permuted", "one-step")),
        ("Positive control (supervised-ixi)", ("supervised-ixi",)),
        ("Planted gain (supervised-all)", ("supervised-all",)),
        ("Methods (cnn-mae, volume-fusion)", ("cnn-mae", "volume-fusion")),
    ):
        lines = [group.main for group in table.groups if arm_of(group) in arms]
        gaps = [line.difference.mean for line in lines if line.difference is not None]
        verdicts = Counter(line.verdict for line in lines)
        told = ", ".join(f"{name} {count}" for name, count in verdicts.items())
        said.append(
            f"- {what}: {len(lines)} comparisons, differences to the twin {min(gaps):+.1f} to "
            f"{max(gaps):+.1f} points; {told}."
        )
    for labels in LABELS:
        found = [
            group.main.difference.detectable()
            for group in table.groups
            if group.n_labels == labels and group.main.difference is not None
        ]
        said.append(
            f"- {labels} labels, {len(DRAWS)} draws: true differences to the twin from "
            f"{np.median(found):.1f} points on would be found with 80 % (median of "
            f"{len(found)} comparisons, {min(found):.1f} to {max(found):.1f})."
        )
    return said


def arm_of(group: Group) -> str:
    """The arm of a checkpoint, whose name may say that its decoder came along."""
    [found] = [arm for arm in ARMS if group.checkpoint.split()[0] in (arm, arm.split("-")[-1])]
    return found


def _curve(rows: Path) -> dict[str, float]:
    curve = read_curve(rows.parent)
    assert curve is not None
    return {f"{step:g}": dice for step, dice in zip(curve.steps, curve.dice, strict=True)}


def _rates() -> str:
    return ",".join(f"{rate:g}" for rate in RATES)


def _config(rows: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((rows.parent / "config.json").read_text())
    return found


if __name__ == "__main__":
    main()
