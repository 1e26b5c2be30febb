"""`voxelith demo`: from raw scans to a table of what pretraining was worth, in minutes.

Each step is the command that a user would type, printed before it runs. The budget is far too
small to say anything about pretraining, and the report says so.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from conf.compose import settings_for
from data_prep.build import prep
from data_prep.progress import bar
from finetune.formats import make_table, markdown
from finetune.report import make_report
from finetune.settings import DemoSettings
from finetune.train import finetune
from pretrain.export import export
from pretrain.release import load_release
from pretrain.train import pretrain

NOTICE = "demo budget: shows that the line works, no evidence about pretraining"
CROP = "crop_size=[32,48,32]"


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Runs prep, pretrain, export, finetune (both arms), table and report on `samples/`.

    Returns:
        Paths of what was made, and the verdict.
    """
    output = settings.output
    runs, release = output / "runs", output / "release"
    cores = len(os.sched_getaffinity(0))
    with resources.as_file(resources.files("samples")) as samples:
        for name in ("pretrain", "hippocampus"):
            words = [f"input={samples / name}.csv", f"output={output / 'corpora' / name}"]
            with _step("prep", [*words, "keys=names", "shard_mib=1"]) as said:
                prep(settings_for("prep", said))
    words = [
        f"corpus={output / 'corpora' / 'pretrain'}",
        "run=demo",
        f"runs={runs}",
        "backbone=resenc_small",
        "objective=cnn_mae",
        "objective.block=8",
        "objective.mask_ratio=0.6",
        "trainer=cpu",
        f"trainer.threads={cores}",
        CROP,
        "batch_size=2",
        f"steps={settings.pretrain_steps}",
        "lr=1e-3",
        f"warmup={max(1, settings.pretrain_steps // 10)}",
        "log_every=10",
        f"preview_every={max(1, settings.pretrain_steps // 3)}",
    ]
    with _step("pretrain", words) as said:
        pretrained = pretrain(settings_for("pretrain", said))
    with _step("export", [str(pretrained), str(release)]):
        if not (release / "SHA256SUMS").exists():
            export(pretrained, release)
        load_release(release)
    jobs = [
        _finetune_words(settings, release, init, seed)
        for seed in range(settings.seeds)
        for init in ("pretrained", "scratch")
    ]
    with _step("finetune", jobs[0], f"... and {len(jobs) - 1} more: both arms, each seed"):
        finetuned = _side_by_side(jobs, output / "logs", min(cores, len(jobs)))
    with _step("table", [*map(str, finetuned), f"output={output / 'table'}"]):
        table = make_table(finetuned, output / "table")
        print(markdown(table))
    report = make_report([pretrained], finetuned, table, output / "report.html", NOTICE)
    print(f"{NOTICE}\n\nOpen {report}")
    return {
        "report": str(report),
        "table": str(output / "table"),
        "release": str(release),
        "verdict": table.verdict,
        "notice": NOTICE,
    }


def _finetune_words(settings: DemoSettings, release: Path, init: str, seed: int) -> list[str]:
    output = settings.output
    return [
        "task=hippocampus",
        f"corpus={output / 'corpora' / 'hippocampus'}",
        f"ckpt={release}",
        f"init={init}",
        f"labels={settings.labels}",
        f"seed={seed}",
        f"runs={output / 'runs'}",
        f"run=hippocampus-{init}-{seed}",
        "trainer=cpu",
        "trainer.threads=1",
        CROP,
        "batch_size=2",
        f"steps={settings.finetune_steps}",
        f"warmup={max(1, settings.finetune_steps // 10)}",
        "log_every=5",
    ]


@contextlib.contextmanager
def _step(command: str, words: list[str], more: str = "") -> Iterator[list[str]]:
    """Says what is typed, and how long it took."""
    print(
        f"\n$ voxelith {command} {shlex.join(words)}" + (f"\n  {more}" if more else ""), flush=True
    )
    began = time.perf_counter()
    yield words
    print(f"  {command}: {time.perf_counter() - began:.0f} s", flush=True)


def _side_by_side(jobs: list[list[str]], logs: Path, processes: int) -> list[Path]:
    """Runs finetunings of one thread each beside one another; their own output goes to files.

    Small networks gain little from a second thread, and much from a second process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done: dict[int, Path] = {}
    # A fresh process knows nothing of the command's own filter; see `voxelith.main`.
    quiet = partial(warnings.filterwarnings, "ignore", message=r".*torch\.jit.*")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=quiet) as pool:
        futures = {
            pool.submit(_finetune, words, logs / f"{i}.log"): i for i, words in enumerate(jobs)
        }
        with bar(total=len(jobs), desc="finetune", unit="run") as progress:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                progress.update()
    return [done[i] for i in range(len(jobs))]


def _finetune(words: list[str], log: Path) -> Path:
    with (
        log.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        return finetune(settings_for("finetune", words))
