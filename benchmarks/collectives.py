"""What ranks say to each other in a step of each small recipe: kinds, calls and bytes.

    python benchmarks/collectives.py [NAME ...] [--output docs/results/collectives]

Each recipe of conf/experiment trains for a few steps on two gloo ranks, by the real loop, with two
micro-batches a step. A profiler counts the collectives of one rank beneath all Python: DDP's
buckets too. What each full recipe's gradients come to follows from its weights alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from line import ROOT, voxelith
from torch.profiler import ProfilerActivity, profile

from conf.compose import recipes, stages_for
from data_prep.files import write_json, write_text
from pretrain.arguments import build
from pretrain.bench import machine
from pretrain.loop import Loop
from pretrain.run_folder import versions
from pretrain.settings import PretrainSettings
from pretrain.stages import pretrain_stages

RANKS, MICRO, STEPS = 2, 2, 8
PLAIN = range(3, 6)
"""Steps that are measured, counted from 1; step 6 has a logged row."""

BYTES = {"float": 4, "double": 8, "int": 4, "long int": 8, "unsigned char": 1, "bool": 1}


def words(name: str, corpus: str = "c") -> list[str]:
    """A small recipe on two ranks, cut short."""
    return [
        f"experiment={name}", f"corpus={corpus}", f"run={name}", f"steps={STEPS}", "warmup=2",
        "batch_size=8", f"accumulate={MICRO}", "log_every=6", "save_every=1000", "preview_every=0",
        "health.every=0", "trainer=cpu", f"trainer.devices={RANKS}", "trainer.threads=1",
    ]  # fmt: skip


class Count(L.Callback):
    """Profiles plain steps and a logged one, and leaves what ranks said in them."""

    def __init__(self, loop: Loop, output: Path) -> None:
        self.loop = loop
        self.output = output
        self.found: dict[str, Any] = {}
        self.profile: profile | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        """Begins before the first micro-batch of the first step."""
        first = self.loop.step + 1
        if self.profile is None and first in (PLAIN.start, PLAIN.stop) and not args[-1] % MICRO:
            self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profile.start()

    def on_train_batch_end(self, *args: Any) -> None:
        """Ends after the last micro-batch of the last step."""
        done = (args[-1] + 1) % MICRO == 0 and self.loop.step in (PLAIN.stop - 1, PLAIN.stop)
        if self.profile is None or not done:
            return
        self.profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
        self.profile = None
        name = "logged" if self.loop.step == PLAIN.stop else "plain"
        self.found[name] = counted(events)
        if name == "logged":
            write_json(self.output / f"{self.loop.run.path.name}.json", self.found)


def counted(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Calls and bytes of each kind of collective; of gradients those that DDP's buckets have."""
    calls: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for event in events:
        said, name = event.get("args", {}), event.get("name", "")
        if name.startswith("gloo:") and said.get("Input type"):
            kind = name.removeprefix("gloo:")
            calls[kind] += 1
            size[kind] += numel(said["Input Dims"][0]) * BYTES[said["Input type"][0]]
        elif name == "c10d::allreduce_" and said["Concrete Inputs"][4] == "True":
            held = numel(said["Input Dims"][0][0])
            if held > 1:  # the agreement of ranks has one number
                calls["gradients"] += 1
                size["gradients"] += 4 * held
    return {"calls": dict(calls), "bytes": dict(size)}


def numel(sides: list[int]) -> int:
    """Values of a tensor."""
    count = 1
    for side in sides:
        count *= side
    return count


def train(name: str, corpus: str, work: Path) -> None:
    """One rank of a recipe: Lightning starts the other with the same words."""
    made = Loop._trainer

    def counting(self: Loop, state: Any) -> L.Trainer:
        trainer = made(self, state)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            trainer.callbacks.append(Count(self, work))
        return trainer

    Loop._trainer = counting  # type: ignore[method-assign]
    pretrain_stages(stages_for("pretrain", [*words(name, corpus), f"runs={work / 'runs'}"]))


def trained(settings: PretrainSettings) -> int:
    """Parameters that have a gradient."""
    with torch.device("meta"):
        encoder = build({**settings.backbone, "in_channels": 1}, "backbone")
        objective = build(settings.objective, "objective", encoder=encoder)
    return sum(p.numel() for p in objective.parameters() if p.requires_grad)


def row(name: str, settings: PretrainSettings, found: dict[str, Any]) -> dict[str, Any]:
    """Of a step on average, and of the logged one what it has more."""
    plain, logged = found["plain"], found["logged"]

    def each(what: str, kind: str) -> float:
        return float(plain[what].get(kind, 0)) / len(PLAIN)

    weights = trained(settings)
    own = {
        kind: {"calls": each("calls", kind), "bytes": each("bytes", kind)}
        for kind in ("gradients", "all_reduce", "broadcast", "all_gather")
    }
    for what in ("calls", "bytes"):  # the rest of them: the losses' and the agreement's
        own["all_reduce"][what] -= own["gradients"][what]
    more = sum(logged["bytes"].get(k, 0) - each("bytes", k) for k in own if k != "gradients")
    return {
        "recipe": name,
        "trained": weights,
        "closed_form_bytes": 4 * weights,
        **own,
        "logged_row_more_bytes": more,
        "raw": found,
    }


def full() -> list[dict[str, Any]]:
    """Of each full recipe, the gradients of a step: 4 bytes a trained parameter."""
    rows = []
    for name in recipes(small=False):
        for run, settings in stages_for(
            "pretrain", ["corpus=c", f"run={name}", f"experiment={name}"]
        ).items():
            count = trained(settings)
            rows.append(
                {"recipe": f"{name}.{run}" if run else name, "trained": count, "bytes": 4 * count}
            )
    return rows


def as_text(facts: dict[str, Any]) -> str:
    """collectives.md."""
    told = facts["machine"]
    lines = [
        "# What ranks say to each other",
        "",
        f"`python benchmarks/collectives.py` on {told['processor']}, {RANKS} gloo ranks, {MICRO} "
        f"micro-batches a step, torch {facts['versions']['torch']}, lightning "
        f"{facts['versions']['lightning']}. Calls and bytes of one step that is not logged, as one "
        f"rank puts them in, the mean of {len(PLAIN)} steps. Gradients must be 4 bytes for each "
        "trained parameter, once a step however many micro-batches it has. Other all-reduces are "
        "those of losses and the one number of the ranks' agreement; broadcasts are running "
        "statistics. A logged row has the sums of all tensors with it.",
        "",
        "| small recipe | trained | gradients: calls | bytes | 4 x trained | other all-reduces |"
        " bytes | gathers | bytes | broadcasts | bytes | logged row, bytes more |",
        "| --- |" + " ---: |" * 11,
    ]
    for one in facts["small"]:
        kinds = [one[k] for k in ("all_reduce", "all_gather", "broadcast")]
        cells = [
            one["recipe"], f"{one['trained']:,}", f"{one['gradients']['calls']:g}",
            f"{one['gradients']['bytes']:,.0f}", f"{one['closed_form_bytes']:,}",
            *(f"{kind[what]:,.6g}" for kind in kinds for what in ("calls", "bytes")),
            f"{one['logged_row_more_bytes']:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Full recipes, from their weights; a ring of W ranks moves 2 (W - 1) / W of these bytes "
        "over each link.",
        "",
        "| recipe | trained | MB a step |",
        "| --- | ---: | ---: |",
        *(f"| {r['recipe']} | {r['trained']:,} | {r['bytes'] / 1e6:,.1f} |" for r in facts["full"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=recipes(small=True), metavar="NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "collectives")
    parser.add_argument("--rank", nargs=2, metavar=("CORPUS", "DIR"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank:
        train(chosen.names[0], chosen.rank[0], Path(chosen.rank[1]))
        return
    chosen.output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "machine": machine(torch.device("cpu")), "versions": versions(), "ranks": RANKS,
        "micro_batches": MICRO, "full": full(), "small": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus = work / "corpus"
        samples = ROOT / "samples" / "pretrain.csv"
        voxelith("prep", f"input={samples}", f"output={corpus}", "shard_mib=1", "keys=names")
        for name in chosen.names:
            command = [sys.executable, "-W", "ignore", __file__, name, "--rank", corpus, work]
            subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
            for settings in stages_for("pretrain", words(name)).values():
                found = json.loads((work / f"{settings.run}.json").read_text())
                facts["small"].append(row(settings.run, settings, found))
                told = {k: v for k, v in facts["small"][-1].items() if k != "raw"}
                print(json.dumps(told), flush=True)
            write_json(chosen.output / "collectives.json", facts)
            write_text(chosen.output / "collectives.md", as_text(facts))


if __name__ == "__main__":
    main()
