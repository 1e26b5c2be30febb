"""Every small recipe as an encoder: frozen, a ridge probe on hippocampi, beside a random encoder.

    python benchmarks/probe_rows.py --work DIR [NAME ...] [--output docs/results] [--jobs 2]

`--work` is that of benchmarks/pilot.py, which has made the corpora: recipes learn, as they stand in
conf/experiment, from the pilot's unlabelled scans (training hippocampi and IXI's heads), and are
probed on 8 labelled hippocampi in three draws, scored on the validation part. The twin of each is
the same network with the weights that it begins with, frozen as well. One pretraining of each,
minutes long: rows for looking, no ranking of methods. What is finished is not done again. Writes
probe_rows.json (machine, versions, raw values) and probe_rows.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from line import ROOT, voxelith

from conf.compose import recipes, stages_for
from data_prep.files import write_json, write_text
from finetune.comparisons import holm
from finetune.formats import cell
from finetune.lines import Group, Table
from finetune.table import read_table
from pretrain.bench import machine
from pretrain.run_folder import versions
from pretrain.settings import PretrainSettings

LABELS, DRAWS = 8, (0, 1, 2)
PROBE = (
    "task=hippocampus", "part=validation", "protocol=probe_ridge", "trainer=cpu",
    "trainer.threads=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=recipes(small=True), metavar="NAME")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    pilot, work = chosen.work.resolve(), chosen.work.resolve() / "probed"
    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(lambda name: release(pilot, work, name), chosen.names))
    releases = ",".join(str(work / "releases" / name) for name in chosen.names)
    voxelith("finetune", "-m", *PROBE, f"corpus={pilot / 'hippocampus'}", f"ckpt={releases}",
             f"labels={LABELS}", f"seed={','.join(map(str, DRAWS))}", f"runs={work / 'runs'}",
             f"jobs={chosen.jobs}")  # fmt: skip
    table = read_table([work / "runs"])
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / "probe_rows.json", {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "rows": [dataclasses.asdict(group.main) | {"checkpoint": group.checkpoint}
                 for group in table.groups],
    })  # fmt: skip
    text = markdown(table)
    write_text(chosen.output / "probe_rows.md", text)
    print(text)


def release(pilot: Path, work: Path, name: str) -> None:
    """The encoder that a recipe makes of the pilot's scans, once."""
    folder = work / "releases" / name
    if folder.exists():
        return
    voxelith("pretrain", f"experiment={name}", f"corpus={pilot / 'unlabelled'}", f"run={name}",
             f"runs={work / 'pretrained'}", "trainer.threads=1", "preview_every=0")  # fmt: skip
    voxelith("export", str(work / "pretrained" / stages(name)[-1].run), str(folder))


def stages(name: str) -> list[PretrainSettings]:
    """What a recipe trains, one after the other; the last one is the result."""
    words = ["corpus=c", f"run={name}", f"experiment={name}"]
    return list(stages_for("pretrain", words).values())


def markdown(table: Table) -> str:
    """What docs/results/probe_rows.md shows."""
    basis = table.groups[0].main.difference
    assert basis is not None
    rows = []
    groups = sorted(table.groups, key=gain, reverse=True)
    single = [math.nan if one.main.difference is None else one.main.difference.p for one in groups]
    for group, p, adjusted in zip(groups, single, holm(single), strict=True):
        line = group.main
        name = group.checkpoint.split()[0].partition(".")[0]
        found = stages(name)
        values = [
            name,
            found[0].backbone["_target_"].rpartition(".")[2],
            " + ".join(f"{one.steps} x {one.batch_size}" for one in found),
            cell(line.pretrained),
            cell(line.scratch),
            cell(line.difference, sign=True),
            f"{p:.2g}",
            f"{adjusted:.2g}",
        ]
        rows.append(f"| {' | '.join(values)} |")
    return (
        "\n".join(
            [
                "# Small recipes, probed: frozen features against those of a random encoder",
                "",
                "Made by `python benchmarks/probe_rows.py`; what is compared stands at the head of "
                "that file, raw values in [probe_rows.json](probe_rows.json). Ridge probe, Dice in "
                f"points over the validation part of MSD Task04 ({basis.cases} cases of "
                f"{basis.units} subjects), {LABELS} labels, {basis.draws} draws, 95 % intervals "
                "over subjects and draws, each row by itself; the last column is p after Holm over "
                "all rows. One pretraining of each, minutes long: rows for looking, no ranking of "
                "methods. A twin is random in the architecture and preprocessing of its recipe.",
                "",
                "| recipe | encoder | steps x batch | pretrained, frozen | random, frozen "
                "| difference | p | p, Holm |",
                "| --- | --- | --: | --: | --: | --: | --: | --: |",
                *rows,
            ]
        )
        + "\n"
    )


def gain(group: Group) -> float:
    """The difference that a row shows."""
    return group.main.difference.mean if group.main.difference else float("-inf")


if __name__ == "__main__":
    main()
