"""The proof: what encoders that were pretrained here are worth; see docs/results/protocol.md.

    python benchmarks/proof.py round-1 --data DIR --work DIR [--jobs 2]

`--data` has the scans that the protocol names. `--work` holds what is being made; what is finished
there is not done again, and a stage does what it needs of the earlier ones first. Each stage keeps
its rows in docs/results/proof/STAGE.tar.xz, run folders without weights and predictions, which
benchmarks/proof_report.py reads.

With `--only METHOD-SEED ...` the stages test-CELL and explore do these encoders alone and keep
their rows beside those of the others that are kept already: a stage can be done in parts, each on
another machine.

corpora    both labelled corpora with their parts, and the pool that pretraining may see
round-1    on validation subjects: rates of every arm at the primary cell
gate       on validation subjects: scratch with all labels
round-2    on validation subjects: another objective, augmentation, ways to finetune
explore    on validation subjects: rows of the other objectives, finetuned and probed
one-label  on validation subjects: one label; benchmarks/proof_shift.py is what other scans give
heads-rates, heads-longer  on validation subjects: what the gain on heads hangs on
test-CELL  on test subjects: hippocampus-2 (the primary cell), hippocampus-8, -all, heads-2
late-heads-2  on test subjects, after they were looked at: heads with both arms at scratch's rate
test-probe on test subjects: frozen features
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from line import ROOT, heads, hippocampi, prep, voxelith, write_list
from pilot import permute

from data_prep.corpus import Corpus
from data_prep.files import read_note, write_bytes, write_json
from data_prep.volume import read_label
from finetune.evaluate import score_case
from finetune.metrics import Score
from finetune.rows import read_rows, write_rows
from finetune.settings import TaskSettings
from pretrain.bench import machine

PROOF = ROOT / "docs" / "results" / "proof"

TEST, VALIDATION = {"hippocampus": 60, "heads": 24}, {"hippocampus": 12, "heads": 6}
"""Subjects of each part; the others are the pool of labelled training cases and of pretraining."""

OTHERS = (
    ("derived_from_dicom/CHAOS_CT_image_2mm.nii.gz", "CT", "CC BY-SA 4.0"),
    ("derived_from_dicom/CRLM-CT-1004_2mm.nii.gz", "CT", "CC BY 4.0"),
    ("derived_from_dicom/FNNDSC_andrei_abdomen_3mm.nii.gz", "CT", "Apache-2.0"),
    ("derived_from_dicom/datalad_studyforrest_T1_2mm.nii.gz", "MR", "PDDL"),
    ("elastix_lung/3DCT_lung_baseline.mha", "CT", "Apache-2.0"),
    ("mialsrtk_fetal/sub-01_rec-SR_id-1_T2w.nii.gz", "MR", "CC0"),
    ("open_ms_longitudinal/patient20/study2_FLAIR.nii.gz", "MR", "CC BY"),
    ("pyradiomics/breast1_image.nrrd", "MR", "BSD-3-Clause"),
    ("sct_testing_data/t1/t1w.nii.gz", "MR", "MIT"),
    ("sct_testing_data/t2/t2.nii.gz", "MR", "MIT"),
    ("sct_testing_data/t2s/t2s_uncropped.nii.gz", "MR", "MIT"),
    ("tcia_brain_tumor_progression/10/Pre_Scan_T1.nii.gz", "MR", "CC BY 3.0"),
    ("tcia_brain_tumor_progression/11/Pre_Scan_T1.nii.gz", "MR", "CC BY 3.0"),
    ("tcia_soft_tissue_sarcoma/STS_002/MR_T1/image.nii.gz", "MR", "CC BY 3.0"),
    ("tcia_soft_tissue_sarcoma/STS_003/CT/image.nii.gz", "CT", "CC BY 3.0"),
    ("tcia_soft_tissue_sarcoma/STS_003/MR_T1/image.nii.gz", "MR", "CC BY 3.0"),
    ("totalsegmentator_ctfm/TotalSegmentator_0002_0000.nii.gz", "CT", "CC BY 4.0"),
    ("totalsegmentator_ctfm/TotalSegmentator_0003_0000.nii.gz", "CT", "CC BY 4.0"),
    ("totalsegmentator_ctfm/TotalSegmentator_0009_0000.nii.gz", "CT", "CC BY 4.0"),
    ("totalsegmentator_ctfm/s0335.nii.gz", "CT", "CC BY 4.0"),
    ("totalsegmentator_examples/example_ct.nii.gz", "CT", "Apache-2.0"),
    ("volume_rendering_data/stroke/FLAIR.nii.gz", "MR", "MIT"),
    ("volume_rendering_data/stroke/T1.nii.gz", "MR", "MIT"),
)
"""Scans of other places whose licences allow a release that says CC BY-SA 4.0."""
LICENCES = {"hippocampus": "CC BY-SA 4.0", "heads": "CC BY-SA 3.0"}
SOURCES = {"hippocampus": "msd_task04_hippocampus", "heads": "ixi"}

MASKED = ("steps=5000", "warmup=250", "batch_size=4", "augment=light")
CONTRAST = ("batch_size=8", "crop_size=[24,32,24]")
"""Several crops of a scan are compared, so they are smaller and the steps fewer."""
FINE = ("backbone.patch_size=4", "batch_size=4", "warmup=60")
"""A ViT of patches that are fine enough for a hippocampus."""
METHODS = {
    "cnn-mae": ("experiment=cnn_mae_small", *MASKED),
    "volume-fusion": ("experiment=volume_fusion_small", *MASKED),
    "s3d": ("experiment=s3d_small", *MASKED),
    "cnn-mae-spatial": ("experiment=cnn_mae_small", *MASKED[:-1], "augment=spatial"),
    "one-step": ("experiment=cnn_mae_small", "batch_size=4", "steps=1", "warmup=0"),
    "simclr": ("experiment=simclr_small", *CONTRAST, "steps=1200", "warmup=60"),
    "contrast": ("experiment=contrastive_small", *CONTRAST, "steps=1500", "warmup=75",
                 "stages.local.steps=500"),
    "voco": ("experiment=voco_small", "crop_size=[24,24,24]", "batch_size=4", "steps=2000",
             "warmup=100"),
    "mae": ("experiment=mae_small", *FINE, "steps=1400"),
    "simmim": ("experiment=simmim_small", *FINE, "steps=800"),
    "hi-end-mae": ("experiment=hi_end_mae_small", *FINE, "steps=1000"),
    "primus-mae": ("experiment=primus_mae_small", *FINE, "backbone.position_grid=[8,12,8]",
                   "steps=1600"),
    "dino": ("experiment=dino_small", *FINE, "steps=650"),
}  # fmt: skip
"""About 30 core-minutes each; those from simclr on, for looking, about 15."""
EXPLORED = ("simclr", "contrast", "voco", "mae", "simmim", "hi-end-mae", "primus-mae", "dino")
ROUND_1, ROUND_2 = ("cnn-mae", "volume-fusion"), ("s3d", "cnn-mae-spatial")
PRETRAINING = (
    "flip=[false,false,true]", "trainer.threads=1", "trainer.precision=bf16-mixed",
    "preview_every=1000", "save_every=500",
)  # fmt: skip
FINETUNING = (
    "split=official", "protocol=tiny", "augment=nnunet", "batch_size=2",
    "trainer=cpu", "trainer.threads=1", "trainer.precision=bf16-mixed",
)  # fmt: skip
TASKS = {
    "hippocampus": ("task=hippocampus", "crop_size=[32,48,32]"),
    "heads": ("task=ixi_dlmuse", "crop_size=[48,48,48]"),
}
CELLS = {
    "hippocampus-2": ("hippocampus", ("labels=2", "steps=600", "warmup=30"), 12),
    "hippocampus-8": ("hippocampus", ("labels=8", "steps=600", "warmup=30"), 6),
    "hippocampus-all": ("hippocampus", ("labels=all", "steps=1500", "warmup=75"), 3),
    "heads-2": ("heads", ("labels=2", "steps=400", "warmup=20"), 6),
}
"""Data set, labels with the steps for them, and draws; the first is the primary one."""
LOOKS = {"hippocampus": 8, "heads": 4}
"""Points of the curves of test runs; eight looks at six heads would be a third of a run."""
PRIMARY, HEADS = "hippocampus-2", "heads-2"
ONE_LABEL = ("labels=1", "steps=600", "warmup=30")
LONGER = ("labels=2", "steps=1600", "warmup=80")
SEEDS, RATE = (0, 1, 2), "3e-3"
"""Pretraining seeds, and the rate that is best for scratch, for controls and for most else."""
SCRATCHS_BEST = {"hippocampus": RATE, "heads": "1e-2"}
"""The rate that is best for scratch on validation subjects: of round-1, and of heads-rates."""
NOMINATED = {"cnn-mae-spatial": RATE, "volume-fusion": "1e-2"}
"""What the test subjects are spent on, with its best rate."""
RELEASE = "resenc-small-cnn-mae"
"""The first seed of the first nominated encoder, as `voxelith fetch` knows it."""
RATES = "1e-3,3e-3,1e-2"
CHANGES = (
    ("freeze=encoder",),
    ("phases=[{steps: 200, freeze: encoder, warmup: 30}]", "steps=400"),
    ("layer_decay=0.5",),
    ("transfer=network",),
)
"""Ways to finetune that were looked at beside the usual one."""
SEARCHED = ("part=validation", "validations=4")
CONTROLS = ("permuted-0", "one-step-0", "supervised-ixi", "planted")
"""The first two must not help; the third was taught another task with labels; the last was taught
this very task with all labels of the pool, a gain that the benchmark has to see."""
SEARCH_DRAWS, LOOKED_DRAWS = (100, 101, 102, 103), range(110, 116)
"""Draws of labels, decoders and crops that no test uses: to choose by, and to look further."""
MACHINES = "machines.json"
KEPT = ("config.json", "load_report.json", "rows.csv", "run.json", "step_zero.json",
        "validation.csv", MACHINES)  # fmt: skip
"""Of a run folder: what a table reads, no weights and no predictions; and where it was made."""


def place_of(data_set: str, subject: str) -> str:
    """Where a subject stands in the order that parts are drawn by."""
    return hashlib.sha256(f"{data_set} {subject}".encode()).hexdigest()


def part_of(data_set: str, subjects: set[str]) -> dict[str, str]:
    """Which part each subject is of: by the hash of its name, so that no one chose."""
    order = sorted(subjects, key=partial(place_of, data_set))
    test, validation = TEST[data_set], VALIDATION[data_set]
    return {
        subject: "test" if n < test else "validation" if n < test + validation else "train"
        for n, subject in enumerate(order)
    }


def source_of(name: str) -> str:
    """The folder of the data set; scans that were once DICOM lie in one of them all."""
    folder, _, rest = name.partition("/")
    return rest.removesuffix(".nii.gz") if folder == "derived_from_dicom" else folder


def make_corpora(data: Path, work: Path) -> None:
    """Both labelled corpora with their parts, and what pretraining may see."""
    sets = {"hippocampus": hippocampi(data), "heads": heads(data)}
    scans = []
    for name, rows in sets.items():
        parts = part_of(name, {row[2] for row in rows})
        write_list(
            work / f"{name}.csv",
            ["image", "label", "subject", "modality", "licence", "split"],
            [[*row, LICENCES[name], parts[row[2]]] for row in rows],
        )
        # The test subjects' scans are in the list: what keeps them out is the gate.
        scans += [[row[0], row[2], row[3], LICENCES[name], SOURCES[name]] for row in rows]
    scans += [
        [data / name, f"other{n:02d}", modality, licence, source_of(name)]
        for n, (name, modality, licence) in enumerate(OTHERS)
    ]
    prep(work / "hippocampus", "classes={1: anterior, 2: posterior}", "shard_mib=4")
    prep(work / "heads", "shard_mib=16", "crop=foreground")
    columns = ["image", "subject", "modality", "licence", "source"]
    write_list(work / "unlabelled.csv", columns, scans)
    splits = ",".join(str(work / name / "splits" / "official.json") for name in sets)
    prep(work / "unlabelled", "labels=false", "shard_mib=16", "duplicates=exact",
         f"exclude=[{splits}]")  # fmt: skip


def pretrain(work: Path, method: str, seed: int) -> None:
    """The release METHOD-SEED of a run of its own."""
    name = f"{method}-{seed}"
    if not (work / name).exists():
        voxelith("pretrain", *METHODS[method], *PRETRAINING, f"corpus={work / 'unlabelled'}",
                 f"seed={seed}", f"run={name}", f"runs={work / 'pretrained'}")  # fmt: skip
        last = f"{name}.local" if method == "contrast" else name
        voxelith("export", str(work / "pretrained" / last), str(work / name))


def pretrain_all(work: Path, methods: Sequence[str], seeds: Sequence[int], jobs: int,
                 only: Sequence[str] = ()) -> list[Path]:  # fmt: skip
    """The releases of each method with each seed that was asked for, made side by side."""
    encoders = [(method, seed) for method in methods for seed in seeds]
    if only:
        encoders = [each for each in encoders if f"{each[0]}-{each[1]}" in only]
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(pretrain, work, *each) for each in encoders]:
            done.result()
    return [work / f"{method}-{seed}" for method, seed in encoders]


def search(work: Path, stage: str, methods: Sequence[str], rates: str, jobs: int) -> None:
    """Mean Dice of validation subjects at the primary cell, by method and rate."""
    checkpoints = pretrain_all(work, methods, SEEDS[:1], jobs)
    # The twins of the first round are those of all: nothing in them depends on a method.
    twins = "true" if stage == "round-1" else "false"
    finetune(work, PRIMARY, stage, checkpoints, draws=SEARCH_DRAWS, jobs=jobs,
             words=(*SEARCHED, f"lr={rates}", f"twins={twins}"))  # fmt: skip
    keep(work / stage)


def round_2(work: Path, jobs: int) -> None:
    """Another objective and another augmentation, and other ways to finetune `cnn-mae`."""
    search(work, "round-2", ROUND_2, RATE, jobs)
    _, budget, _ = CELLS[PRIMARY]
    for change in CHANGES:
        keys = [word.split("=")[0] for word in change]
        kept = [word for word in budget if word.split("=")[0] not in keys]
        finetune(work, PRIMARY, "round-2", [work / "cnn-mae-0"], draws=SEARCH_DRAWS, jobs=jobs,
                 words=(*SEARCHED, f"lr={RATE}", "twins=false", *change), budget=kept)  # fmt: skip
    keep(work / "round-2")


def gate(work: Path, jobs: int) -> None:
    """Scratch with all labels, at each rate; benchmarks/nnunet_gate.py is what it is beside."""
    finetune(work, "hippocampus-all", "gate", [work / "cnn-mae-0"], draws=SEARCH_DRAWS[:1],
             jobs=jobs, words=(*SEARCHED, f"lr={RATES}", "init=scratch"))  # fmt: skip
    keep(work / "gate")


def one_label(work: Path, jobs: int) -> None:
    """Still less to learn from, where pretraining should help most."""
    method, rate = next(iter(NOMINATED.items()))
    checkpoints = pretrain_all(work, [method], SEEDS, jobs)
    finetune(work, PRIMARY, "one-label", checkpoints, draws=LOOKED_DRAWS, jobs=jobs,
             words=(*SEARCHED, f"lr={rate}"), budget=ONE_LABEL)  # fmt: skip
    keep(work / "one-label")


def heads_rates(work: Path, jobs: int) -> None:
    """Heads at each rate, for both arms alike, and with the weights shuffled."""
    looked = partial(finetune, work, HEADS, "heads-rates", draws=SEARCH_DRAWS, jobs=jobs)
    encoders = pretrain_all(work, tuple(NOMINATED)[:1], SEEDS[:1], jobs)
    looked(encoders, words=(*SEARCHED, f"lr={RATES}"))
    looked([permuted(work)], words=(*SEARCHED, f"lr={RATE}", "twins=false"))
    keep(work / "heads-rates")


def heads_longer(work: Path, jobs: int) -> None:
    """Heads with four times the steps: whether a gain is more than a head start."""
    encoders = pretrain_all(work, tuple(NOMINATED)[:1], SEEDS[:1], jobs)
    finetune(work, HEADS, "heads-longer", encoders, draws=LOOKED_DRAWS[:3], jobs=jobs,
             words=(*SEARCHED, f"lr={RATE}"), budget=LONGER)  # fmt: skip
    keep(work / "heads-longer")


def explore(work: Path, jobs: int, only: Sequence[str]) -> None:
    """Rows of the other objectives, for looking: finetuned and as frozen features."""
    draws = SEARCH_DRAWS[:3]
    if only:
        bring(work / "explored")
        bring(work / "probed")
    explored = pretrain_all(work, EXPLORED, SEEDS[:1], jobs, only)
    if explored:
        finetune(work, PRIMARY, "explored", explored, draws=draws, jobs=jobs,
                 words=(*SEARCHED, f"lr={RATES.split(',')[0]}"))  # fmt: skip
        keep(work / "explored")
    others = [method for method in (*ROUND_1, *ROUND_2) if method not in NOMINATED]
    probed = [*pretrain_all(work, tuple(NOMINATED), SEEDS, jobs, only),
              *pretrain_all(work, others, SEEDS[:1], jobs, only), *explored]  # fmt: skip
    if probed:
        probe(work, "probed", probed, draws=draws, part="validation", jobs=jobs)


def probe(work: Path, stage: str, checkpoints: Sequence[Path], *, draws: Sequence[int],
          part: str, jobs: int) -> None:  # fmt: skip
    """Frozen features beside those of a random encoder: a ridge probe with 8 labels."""
    sweep(work, "hippocampus", stage, checkpoints, draws=draws, jobs=jobs,
          words=("split=official", "protocol=probe_ridge", "labels=8", "trainer=cpu",
                 "trainer.threads=1", f"part={part}"))  # fmt: skip
    keep(work / stage)


def test_probe(work: Path, jobs: int) -> None:
    """Frozen features on test subjects: the nominated encoders and the controls."""
    nominated = pretrain_all(work, tuple(NOMINATED), SEEDS, jobs)
    draws = range(CELLS["hippocampus-8"][2])
    probe(work, "test-probe", [*nominated, *controls(work)], draws=draws, part="test", jobs=jobs)


def permuted(work: Path) -> Path:
    """The first nominated encoder, its weights shuffled within each tensor."""
    if not (work / "permuted-0").exists():
        pretrain(work, "cnn-mae-spatial", 0)
        permute(work / "cnn-mae-spatial-0", work / "permuted-0")
    return work / "permuted-0"


def controls(work: Path) -> list[Path]:
    """Encoders that must not help, and those that must or may; each once."""
    pretrain(work, "one-step", 0)
    permuted(work)
    scratch = [f"ckpt={work / 'one-step-0'}", "init=scratch", "labels=all", f"lr={RATE}",
               "part=validation", f"runs={work / 'supervised'}"]  # fmt: skip
    taught = {"supervised-ixi": ("heads", 3000), "planted": ("hippocampus", 1500)}
    for name, (data_set, steps) in taught.items():
        if not (work / name).exists():
            words = [*TASKS[data_set], *FINETUNING, f"corpus={work / data_set}", *scratch]
            words += [f"steps={steps}", f"warmup={steps // 20}", f"run={name}"]
            voxelith("finetune", *words)
            voxelith("export", str(work / "supervised" / name), str(work / name))
    return [work / name for name in CONTROLS]


def test(cell: str, work: Path, jobs: int, only: Sequence[str]) -> None:
    """The test subjects of a cell: every pretraining seed meets every draw.

    Where a method's best rate is not scratch's, scratch at its own best is a third arm.
    """
    stage, draws = f"test-{cell}", range(CELLS[cell][2])
    scored = partial(finetune, work, cell, stage, draws=draws, jobs=jobs)
    if only:
        bring(work / stage)
    for method, rate in NOMINATED.items():
        checkpoints = pretrain_all(work, [method], SEEDS, jobs, only)
        if not checkpoints:
            continue
        words = (f"lr={rate}", "part=test", f"validations={LOOKS[CELLS[cell][0]]}")
        scored(checkpoints, words=words)
        if rate != (best := SCRATCHS_BEST[CELLS[cell][0]]):
            own = ("init=scratch", "recipe_of=own", f"own={{lr: {best}}}",
                   f"search={{lr: [{RATES}], draws: {len(SEARCH_DRAWS)}}}")  # fmt: skip
            scored(checkpoints[:1], words=(*words, *own))
        elif cell == PRIMARY:
            scored(controls(work), words=words)
        keep(work / stage)
    if CELLS[cell][0] == "hippocampus":
        at_two_mm(work / stage)
        keep(work / f"{stage}-2mm")


def late_heads(work: Path, jobs: int) -> None:
    """Test subjects of heads once more, both arms at the rate that turned out best for both.

    It was decided on after test subjects were looked at, and stands beside what was nominated.
    """
    data_set, _, draws = CELLS[HEADS]
    words = (f"lr={SCRATCHS_BEST[data_set]}", "part=test", f"validations={LOOKS[data_set]}")
    encoders = pretrain_all(work, tuple(NOMINATED)[:1], SEEDS, jobs)
    finetune(work, HEADS, f"late-{HEADS}", encoders, draws=range(draws), jobs=jobs, words=words)
    keep(work / f"late-{HEADS}")


def finetune(work: Path, cell: str, stage: str, checkpoints: Sequence[Path], *,
             draws: Sequence[int], jobs: int, words: Sequence[str],
             budget: Sequence[str] = ()) -> None:  # fmt: skip
    """A sweep of a cell."""
    data_set, usual, _ = CELLS[cell]
    sweep(work, data_set, stage, checkpoints, draws=draws, jobs=jobs,
          words=(*FINETUNING, *(budget or usual), *words))  # fmt: skip


def sweep(work: Path, data_set: str, stage: str, checkpoints: Sequence[Path], *,
          draws: Sequence[int], jobs: int, words: Sequence[str]) -> None:  # fmt: skip
    """Each checkpoint with each draw on a data set."""
    voxelith("finetune", "-m", *TASKS[data_set], f"corpus={work / data_set}",
             f"ckpt={','.join(map(str, checkpoints))}", f"seed={','.join(map(str, draws))}",
             f"runs={work / stage}", f"jobs={jobs}", *words)  # fmt: skip


def at_two_mm(runs: Path) -> None:
    """The rows of runs with surface Dice at 2 mm for 1, from their predictions: RUNS-2mm."""
    for file in sorted(runs.glob("*/rows.csv")):
        config = json.loads((file.parent / "config.json").read_text())
        corpus = Corpus.open(Path(config["corpus"]))
        task = TaskSettings.model_validate(config["task"])
        wide = [one.model_copy(update={"tolerance_mm": 2.0}) for one in task.classes]
        task = task.model_copy(update={"classes": wide})
        found: dict[str, list[Score]] = {}
        rows = []
        for row in read_rows(file):
            if row.case not in found:
                i = corpus.position(row.case)
                labels = read_label(
                    file.parent / "predictions" / f"{row.case}.nii.gz", corpus.volume(i)
                )
                found[row.case] = score_case(corpus, i, task, labels)
            nsd = found[row.case][row.class_value - 1].nsd
            rows.append(dataclasses.replace(row, nsd=nsd, nsd_tolerance_mm=2.0))
        output = runs.with_name(f"{runs.name}-2mm") / file.parent.name
        output.mkdir(parents=True, exist_ok=True)
        write_rows(rows, output / "rows.csv")


def bring(runs: Path) -> None:
    """The rows of a stage that are kept already, where its runs are not here."""
    if (PROOF / f"{runs.name}.tar.xz").exists():
        with tarfile.open(PROOF / f"{runs.name}.tar.xz") as tar:
            for member in tar.getmembers():
                if not (runs.parent / member.name).exists():
                    tar.extract(member, runs.parent, filter="data")


def keep(runs: Path) -> None:
    """What a table needs of the runs of a stage, as one archive of the project."""
    note = runs / MACHINES
    machines, here = read_note(note).get("machines", []), machine(torch.device("cpu"))
    if here not in machines:
        write_json(note, {"machines": [*machines, here]})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for folder in (runs, *(rows.parent for rows in sorted(runs.glob("*/rows.csv")))):
            for path in (folder / name for name in KEPT):
                if path.exists():
                    info = tarfile.TarInfo(str(path.relative_to(runs.parent)))
                    info.size = path.stat().st_size
                    tar.addfile(info, io.BytesIO(path.read_bytes()))
    PROOF.mkdir(exist_ok=True)
    write_bytes(PROOF / f"{runs.name}.tar.xz", lzma.compress(packed.getvalue(), preset=9))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages: dict[str, Callable[[Path, int, Sequence[str]], None]] = {
        "corpora": lambda work, jobs, only: None,
        "round-1": lambda work, jobs, only: search(work, "round-1", ROUND_1, RATES, jobs),
        "gate": lambda work, jobs, only: gate(work, jobs),
        "round-2": lambda work, jobs, only: round_2(work, jobs),
        "explore": explore,
        "one-label": lambda work, jobs, only: one_label(work, jobs),
        "heads-rates": lambda work, jobs, only: heads_rates(work, jobs),
        "heads-longer": lambda work, jobs, only: heads_longer(work, jobs),
        **{f"test-{cell}": partial(test, cell) for cell in CELLS},
        "test-probe": lambda work, jobs, only: test_probe(work, jobs),
        f"late-{HEADS}": lambda work, jobs, only: late_heads(work, jobs),
    }
    parser.add_argument("stage", choices=tuple(stages))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=(), metavar="METHOD-SEED")
    asked = parser.parse_args()
    encoders = {f"{method}-{seed}" for method in METHODS for seed in SEEDS}
    if wrong := sorted(set(asked.only) - encoders):
        parser.error(f"--only {' '.join(wrong)}: there are {', '.join(sorted(encoders))}")
    if asked.only and asked.stage not in ("explore", *(f"test-{cell}" for cell in CELLS)):
        parser.error(f"--only: {asked.stage} is done as a whole")
    if not asked.data.is_dir():
        parser.error(f"--data {asked.data}: is not there; give the folder with the scans")
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_corpora(asked.data.resolve(), work)
    stages[asked.stage](work, asked.jobs, asked.only)


if __name__ == "__main__":
    main()
