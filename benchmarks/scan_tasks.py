"""Tasks of whole scans on real data, and how often the interval of AUROC is wrong.

    python benchmarks/scan_tasks.py --data DIR --work DIR [--output docs/results] [--jobs 1]

`--data` has `msd_task04_hippocampus/` (images, labels) and `ixi_t1_dlmuse/` (t1). The encoder of a
residual U-Net, 0.5 M parameters, is pretrained for a few steps on IXI's heads and finetuned, three
draws beside its scratch twin, to tell from the image of a hippocampus

- its volume in ml, which the label knows and the network does not see, and
- whether its number is odd or even: two cases of a person are numbered one after the other, and
  whether that is a side is nowhere stated.

Of the subjects that the default split trains or validates on, two fifths are scored; test subjects
take no part. The pretraining is far too short to say anything about pretraining: the page shows
that such tasks are learnt, and what their tables look like.

The second part draws tables of two equal arms, whose separation of the classes varies by draw, and
counts how often the difference of their AUROCs is called one. What is finished is not done again;
`--work` holds it. Writes scan_tasks.json (raw values) and scan_tasks.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from line import ROOT, heads, hippocampi, prep, voxelith, write_list

from data_prep.corpus import Corpus
from data_prep.files import write_json, write_text
from data_prep.splits import make_split, split_from, write_split
from finetune.formats import markdown
from finetune.intervals import spread
from finetune.table import read_table
from pretrain.bench import machine
from pretrain.run_folder import versions

PRETRAIN_STEPS, STEPS, LABELS, SEEDS = 200, 300, 64, (0, 1, 2)
CROP = "crop_size=[24,40,24]"
"""At 1.5 mm a hippocampus' image of MSD Task04 lies in it."""
TASKS = {
    "volume": "name: volume\ntarget: volume\nkind: regression\nunit: ml\n"
    "flip: [false, false, true]\n",
    "side": "name: side\ntarget: side\nkind: classification\nclasses: [odd, even]\n"
    "flip: [false, false, false]\n",
}
TABLES = ((60, 30), (60, 12), (60, 10), (60, 6))
"""Cases, and how many of them are of the class."""
DRAWS, DRAW_SPREADS = (3, 5), (0.0, 0.3, 0.8)
"""Draws, and the standard deviation by draw and arm of how far apart the classes are."""
TRIALS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    make_corpora(chosen.data.resolve(), work)
    if not (work / "heads-mae").exists():
        voxelith("pretrain", "experiment=cnn_mae_small", f"corpus={work / 'heads'}",
                  "run=heads-mae", f"runs={work / 'pretrained'}", "trainer=cpu",
                  "backbone.features=[8,16,32,64]", CROP, f"steps={PRETRAIN_STEPS}", "warmup=20",
                  "trainer.threads=1", "augment=light")  # fmt: skip
        voxelith("export", str(work / "pretrained" / "heads-mae"), str(work / "heads-mae"))
    for task in TASKS:
        voxelith("finetune", "-m", f"--config-dir={work / 'conf'}", f"task={task}",
                  f"targets={work / 'targets.csv'}", f"corpus={work / 'hippocampus'}",
                  "split=scans", "part=validation", f"ckpt={work / 'heads-mae'}",
                  f"runs={work / 'runs'}", f"labels={LABELS}", f"steps={STEPS}", "warmup=20",
                  f"seed={','.join(map(str, SEEDS))}", "lr=3e-3", "trainer=cpu",
                  "trainer.threads=1", f"jobs={chosen.jobs}")  # fmt: skip
    rates = [level(*table, draws, by) for table in TABLES for draws in DRAWS for by in DRAW_SPREADS]
    table = read_table([work / "runs"])
    seconds = round(time.perf_counter() - began)
    result = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "seconds": seconds,
        "table": table.to_dict(),
        "answers": {
            path.parent.name: path.read_text().splitlines()
            for path in sorted((work / "runs").glob("*/answers.csv"))
        },
        "levels": rates,
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "scan_tasks.json", result)
    write_text(chosen.output / "scan_tasks.md", page(markdown(table), rates, work))


def make_corpora(data: Path, work: Path) -> None:
    """Hippocampi with their split and targets, heads without labels, and the tasks."""
    write_list(work / "hippocampus.csv", ["image", "label", "subject", "modality"],
                hippocampi(data))  # fmt: skip
    prep(work / "hippocampus", "classes={1: anterior, 2: posterior}", "shard_mib=4")
    write_list(work / "heads.csv", ["image", "subject", "modality"],
                [[head, *told] for head, _, *told in heads(data)])  # fmt: skip
    prep(work / "heads", "labels=false", "spacing=[1.5,1.5,1.5]", "shard_mib=16")
    corpus = Corpus.open(work / "hippocampus")
    usual = corpus.split("default")["parts"]
    open_keys = {*usual["train"], *usual["validation"]}
    drawn = make_split(corpus.keys, corpus.subjects, 1, {"train": 0.6, "validation": 0.4})
    part = {key: name for name, keys in drawn["parts"].items() for key in keys}
    parts = [part[key] if key in open_keys else "" for key in corpus.keys]
    write_split(split_from("scans", corpus.keys, corpus.subjects, parts), corpus.path / "splits")
    targets = []
    for i, key in enumerate(corpus.keys):
        voxels = int((corpus.read(i, "seg") > 0).sum())
        volume = voxels * math.prod(corpus.meta(i)["spacing"]) / 1000
        number = int(re.findall(r"\d+", key)[-1])
        targets.append([key, f"{volume:.6g}", "odd" if number % 2 else "even"])
    write_list(work / "targets.csv", ["key", "volume", "side"], targets)
    (work / "conf" / "task").mkdir(parents=True, exist_ok=True)
    for name, text in TASKS.items():
        write_text(work / "conf" / "task" / f"{name}.yaml", text)


def level(cases: int, of_class: int, draws: int, by_draw: float) -> dict[str, float]:
    """How often two equal arms are called different, with the factor of `scan_metrics` and without.

    Scores are normal: the classes lie 1.2 apart on the mean, a case differs by 1, and by 0.7 more
    in each arm and in each run.
    """
    rng = np.random.default_rng([cases, of_class, draws, round(10 * by_draw)])
    called = np.zeros(2)
    for _ in range(TRIALS // 250):
        size = (250, 2, draws, cases)
        own = rng.normal(0, by_draw, (250, 2, draws, 1))
        apart = 1.2 + rng.normal(0, 0.3, (250, 1, draws, 1)) + own
        case = rng.normal(size=(250, 1, 1, cases)) + 0.7 * rng.normal(size=(250, 2, 1, cases))
        scores = apart * (np.arange(cases) < of_class) + case + 0.7 * rng.normal(size=size)
        for k, values in enumerate(_pseudovalues(scores, of_class)):
            table = np.swapaxes(values[:, 0] - values[:, 1], 1, 2)
            found = spread(table)
            far = np.abs(table.mean((1, 2))) > found.critical() * np.sqrt(found.variance)
            called[k] += far.sum()
    exact, plain = (float(n) / TRIALS for n in called)
    return {
        "cases": cases, "of_class": of_class, "draws": draws, "by_draw": by_draw,
        "called_different": exact, "without_the_factor": plain,
    }  # fmt: skip


def _pseudovalues(scores: np.ndarray, of_class: int) -> list[np.ndarray]:
    """Of whole arrays [..., cases] at once, with the factor and without."""
    n = scores.shape[-1]
    above = np.sign(scores[..., :of_class, None] - scores[..., None, of_class:]) / 2 + 0.5
    auroc = above.mean((-2, -1), keepdims=True)[..., 0]
    found = []
    for exact in (True, False):
        parts = []
        for v in (above.mean(-1), above.mean(-2)):
            m = v.shape[-1]
            factor = math.sqrt(m * (n - 1) / ((m - 1) * n)) if exact else 1.0
            parts.append(auroc + n / m * factor * (v - auroc))
        found.append(np.concatenate(parts, axis=-1))
    return found


def page(table: str, rates: list[dict[str, float]], work: Path) -> str:
    """What docs/results/scan_tasks.md shows."""
    corpus = Corpus.open(work / "hippocampus")
    parts = corpus.split("scans")["parts"]
    with (work / "targets.csv").open() as file:
        targets = {row["key"]: row for row in csv.DictReader(file)}
    scored = [targets[key] for key in parts["validation"]]
    volumes = np.array([float(row["volume"]) for row in scored])
    odd = sum(row["side"] == "odd" for row in scored)
    lines = [
        f"| {r['cases']} | {r['of_class']} | {r['draws']} | {r['by_draw']} "
        f"| {100 * r['called_different']:.1f} | {100 * r['without_the_factor']:.1f} |"
        for r in rates
    ]
    guess = float(np.abs(volumes - volumes.mean()).mean())
    slack = 100 * 1.96 * math.sqrt(0.05 * 0.95 / TRIALS)
    return f"""# Tasks of whole scans

Made by `python benchmarks/scan_tasks.py`; what is done stands at the head of that file, raw values
in [scan_tasks.json](scan_tasks.json). Nothing here says what pretraining is worth:
{PRETRAIN_STEPS} steps are far too few.

## Volume and side of a hippocampus

MSD Task04: {len(parts["train"])} cases to draw {LABELS} labelled ones from, {len(scored)} scored \
on, {STEPS} steps of 2 crops of 24x40x24 at 1.5 mm, draws {", ".join(map(str, SEEDS))}. {odd} of \
the scored are odd. Whoever always said their mean volume would have an MAE of {guess:.3f} ml.

{table.strip()}

## How often the interval of AUROC is wrong

Two equal arms, {TRIALS} tables each; a difference should be called in 5 % (of so many tables, \
within {slack:.1f}). "By draw" is the standard deviation, by arm and draw, of how far the classes \
lie apart (1.2 on the mean). The last column is without the factor that makes the variance exactly \
DeLong's (`finetune/scan_metrics.py`). Below 10 subjects of a class the table gives no interval.

| cases | of the class | draws | by draw | called different, % | without the factor, % |
| --: | --: | --: | --: | --: | --: |
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    main()
