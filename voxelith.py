"""Voxelith: pretrained 3D encoders for CT and MRI, and what they are worth.

Three lines from a scan to features:

    import voxelith
    encoder = voxelith.load_encoder("release/")
    features = encoder.features("scan.nii.gz")

This module is the public API and the `voxelith` command: a dispatcher, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from data_prep.errors import InputError
    from pretrain.encoder import Encoder

__all__ = ["load_encoder", "main"]

OLD_JIT = r".*torch\.jit.*"
"""What timm and torchvision say as they are imported, and no user can act on."""


def load_encoder(ref: str | Path, *, device: str = "cpu") -> Encoder:
    """Loads a released encoder with its preprocessing; see `pretrain.encoder.load_encoder`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OLD_JIT)
        from pretrain.encoder import load_encoder as load

        return load(ref, device=device)


class Command(NamedTuple):
    """A verb: what it says of itself, how it is called, what it runs, and more for its help."""

    summary: str
    usage: str
    run: Callable[[list[str]], Any]
    more: str = ""


def _configured(name: str, words: list[str]) -> Any:
    from conf.compose import settings_for

    return settings_for(name, words)


def _prep(words: list[str]) -> Any:
    if any(word.startswith("remove=") for word in words):
        from data_prep.generations import remove

        return remove(_configured("remove", words))
    settings = _configured("prep", words)
    from data_prep.build import prep, prep_step

    if settings.append:
        from data_prep.generations import append

        return append(settings, said={word.partition("=")[0] for word in words})
    return prep_step(settings) if settings.step else prep(settings).to_dict()


def _split(words: list[str]) -> Any:
    settings = _configured("split", words)
    from data_prep.folds import split

    return {"corpus": str(settings.corpus), "splits": split(settings)}


def _check(words: list[str]) -> Any:
    (folder,) = _positional("check", words, ["CORPUS|RELEASE"])
    from pretrain.registry import KNOWN

    if folder.startswith("hf://") or (folder in KNOWN and not Path(folder).exists()):
        from pretrain.fetch import resolve

        folder = str(resolve(folder))
    if (Path(folder) / "SHA256SUMS").is_file():
        from finetune.model_file import check_release

        error = check_release(Path(folder))
        print(f"{folder}: whole, and its golden scan gives what it gave, to {error:.1e}, relative")
        return {"release": folder, "problems": [], "golden_error": error}
    from data_prep.check import check
    from data_prep.errors import CorruptionError
    from data_prep.references import without_secrets

    problems = check(folder)
    if problems:
        raise CorruptionError(problems)
    shown = without_secrets(folder)
    print(f"{shown}: whole, every byte is what was written")
    return {"corpus": shown, "problems": []}


def _pretrain(words: list[str]) -> Any:
    from pretrain.preemption import listen

    listen()
    from conf.compose import stages_for

    stages = stages_for("pretrain", words)
    from pretrain.stages import pretrain_stages

    runs = [str(run) for run in pretrain_stages(stages)]
    return {"run": runs[-1]} | ({"stages": runs} if len(runs) > 1 else {})


def _plan(words: list[str]) -> Any:
    from conf.compose import stages_for

    stages = stages_for("plan", words)
    from pretrain.plan import plan

    return plan(stages)


def _bench(words: list[str]) -> Any:
    from data_prep.errors import InputError

    said = [word for word in words if word in ("step", "estimate", "loader")]
    if len(said) != 1:
        raise InputError(
            "bench: say what, step, estimate or loader, and one of them "
            f"({' and '.join(said) or 'none'} given); usage: voxelith {COMMANDS['bench'].usage}"
        )
    settings = _configured("bench", [word for word in words if word not in said])
    if said == ["loader"]:
        from pretrain.bench_loader import bench_loader

        return bench_loader(settings)
    from pretrain.bench import bench_estimate, bench_step

    return bench_step(settings) if said == ["step"] else bench_estimate(settings)


def _replay(words: list[str]) -> Any:
    from data_prep.errors import InputError

    options = {"step": "", "corpus": ""}
    runs = _runs("replay", words, options)
    problems = []
    if len(runs) > 1:
        problems.append(f"replay: takes one run, {len(runs)} given: {' '.join(map(str, runs))}")
    if not (options["step"] or "1").isdecimal():
        problems.append(f"step={options['step']}: must be the number of a step, counted from 1")
    if problems:
        raise InputError(problems)
    from pretrain.replay import replay

    step = int(options["step"]) if options["step"] else None
    return replay(runs[0], step, options["corpus"] or None)


def _export(words: list[str]) -> Any:
    from conf.compose import take_option
    from data_prep.errors import InputError

    rest, pushes = take_option(words, "--push")
    told = _told(rest[2:])
    named = [word for k, word in enumerate(rest) if k < 2 or "=" not in word]
    ref, output = _positional("export", named, ["RUN|FILE|NAME", "OUT"])
    from pretrain.hub import destination, push

    targets = [destination(ref) for ref in pushes]  # what is wrong with them is told before
    from finetune.export import export

    form = told.pop("form", "release")
    if targets and form not in ("release", "full"):
        raise InputError(f"--push with form={form}: releases are pushed; leave one of them out")
    made = export(ref, Path(output), form, told)
    if form not in ("release", "full"):
        print(f"{output}: written and checked, form={form}")
        return made
    print(f"{output}: verified, golden scan included, digest {made['digest'][:12]}")
    pushed = [push(Path(output), target) for target in targets]
    for ref in pushed:
        print(f"Pushed: {ref}#sha256={made['digest']}")
    return made | ({"pushed": pushed} if pushed else {})


def _fetch(words: list[str]) -> Any:
    from data_prep.errors import InputError

    if words == ["--list"]:
        from pretrain.cache import cache_folder, cached
        from pretrain.registry import as_text, known

        facts = {"known": known(), "cache": str(cache_folder()), "kept": cached()}
        _show(as_text(facts))
        return facts
    options = {"offline": "false", "again": "false"}
    flags = [word for word in words if word.partition("=")[0] in options]
    options |= dict(word.split("=", 1) for word in flags if "=" in word)
    (ref,) = _positional("fetch", [w for w in words if w not in flags], ["REFERENCE"])
    if not all("=" in word for word in flags) or not set(options.values()) <= {"true", "false"}:
        raise InputError(f"{' '.join(flags)}: offline and again are true or false")
    from pretrain.fetch import fetch

    found = fetch(ref, offline=options["offline"] == "true", again=options["again"] == "true")
    state = "was here" if found.cached else "fetched and verified"
    print(f"{found.path}: {found.kind}, {state}, sha256 {found.digest}")
    return found.to_dict()


def _inspect(words: list[str]) -> Any:
    told = _told(words[1:])
    rest = [word for k, word in enumerate(words) if not (k and "=" in word)]
    (ref,) = _positional("inspect", rest, ["RUN|RELEASE|FILE"])
    from finetune.describe import as_text, describe
    from pretrain.fetch import resolve

    facts = describe(resolve(ref), told)
    _show(as_text(facts))
    return facts


def _told(words: list[str]) -> dict[str, Any]:
    """Facts by name, `key=value`; values are written as in YAML."""
    import yaml  # type: ignore[import-untyped]

    from data_prep.errors import InputError

    told: dict[str, Any] = {}
    problems = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            problems.append(f"{word}: cannot be read; a list is [1,2,3], a rule {{rule: zscore}}")
            continue
        if key in told:
            problems.append(f"{word}: {key} stands there twice")
        told[key] = parsed
    if problems:
        raise InputError(problems)
    return told


def _finetune(words: list[str]) -> Any:
    if "-m" in words:
        return _sweep([word for word in words if word != "-m"])
    from pretrain.preemption import listen

    listen()
    settings = _configured("finetune", words)
    from finetune.train import finetune

    run = finetune(settings)
    print(f"Next: voxelith table {shlex.quote(str(run.parent))} output=table/")
    return {"run": str(run)}


def _sweep(words: list[str]) -> Any:
    from data_prep.errors import InputError

    rest, options = [], {"jobs": "", "twins": "true"}
    queue = iter(words)
    for word in queue:
        if word == "--config-dir":
            word = f"{word}={next(queue, '')}"
        key, equals, value = word.partition("=")
        if equals and key in options:
            options[key] = value
        elif word != "--dry-run":
            rest.append(word)
    if not re.fullmatch("|[1-9][0-9]*", options["jobs"]) or options["twins"] not in (
        "true",
        "false",
    ):
        raise InputError(
            f"jobs={options['jobs']} twins={options['twins']}: jobs is a number of runs at a time, "
            "twins is true or false"
        )
    from finetune.sweep import sweep

    found = sweep(
        rest,
        jobs=int(options["jobs"] or 0) or None,
        twins=options["twins"] == "true",
        dry_run="--dry-run" in words,
    )
    if "--dry-run" not in words:
        print("Next: voxelith table RUNS output=table/, where RUNS is the folder of the runs")
    return found


def _launch(words: list[str]) -> Any:
    from data_prep.errors import InputError
    from slurm import launch as launcher

    if not words:
        raise InputError(f"launch: says nothing; usage: voxelith {COMMANDS['launch'].usage}")
    asked, dry_run = words[0], "--dry-run" in words
    rest = [word for word in words[1:] if word != "--dry-run"]
    if asked in ("status", "logs", "cancel"):
        return _launched(asked, Path(_positional(f"launch {asked}", rest, ["RUN"])[0]))
    if asked == "init":
        return _launch_init(rest)
    if asked == "doctor":
        from slurm.doctor import doctor

        return doctor(rest, dry_run=dry_run)
    if asked == "chain":
        return _launch_chain(rest, dry_run)
    if asked == "prep":
        from slurm.prep import launch_prep

        return launch_prep(rest, dry_run=dry_run)
    if asked == "examine":  # what the job of doctor does
        from slurm.examine import examine

        return examine(rest)
    if asked == "element":  # what an element of a chain's sweep does
        from slurm.chain import element

        return element(int(rest[0]), rest[1:])
    if asked == "finetune" and "-m" in rest:
        return launcher.launch_sweep([word for word in rest if word != "-m"], dry_run=dry_run)
    return launcher.launch(asked, rest, dry_run=dry_run)


def _launched(asked: str, run: Path) -> Any:
    from slurm import chain
    from slurm import launch as launcher
    from slurm.prep import jobs_of_prep

    launcher = jobs_of_prep(run) or launcher
    if asked == "status":
        from finetune.describe import as_text

        facts = chain.status(run) if chain.is_chain(run) else launcher.status(run)
        _show(as_text(facts))
        return facts
    if asked == "logs":
        text = chain.logs(run) if chain.is_chain(run) else launcher.logs(run)
        _show(text)
        return {"run": str(run), "log": text}
    jobs = chain.cancel(run) if chain.is_chain(run) else [launcher.cancel(run)]
    print(f"job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}: cancelled")
    return {"run": str(run)}


def _launch_chain(words: list[str], dry_run: bool) -> Any:
    from slurm.chain import chain

    outputs = [word.removeprefix("output=") for word in words if word.startswith("output=")]
    rest = [word for word in words if not word.startswith("output=")]
    (file,) = _positional("launch", rest, ["chain FILE.yaml"])
    return chain(Path(file), Path(outputs[-1]) if outputs else None, dry_run=dry_run)


def _launch_init(words: list[str]) -> Any:
    from data_prep.errors import InputError, near

    options = {"output": "", "name": "mine", "partition": ""}
    problems = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in options:
            problems.append(f"{word}: no such option; {near(key, options)}")
        options[key] = value
    if not options["output"]:
        problems.append("output: missing; give output=DIR, a folder for --config-dir")
    if problems:
        raise InputError(problems)
    from slurm.discover import init

    return init(Path(options["output"]), options["name"], options["partition"] or None)


def _evaluate(words: list[str]) -> Any:
    settings = _configured("evaluate", words)
    from finetune.evaluate import evaluate

    path = evaluate(settings)
    print(f"{path}: one row per case and class. Next: voxelith table {path} output=table/")
    return {"rows": str(path)}


def _runs(command: str, words: list[str], options: dict[str, str]) -> list[Path]:
    """Run folders; `key=value` words go to the options that the command has."""
    from data_prep.errors import InputError, near

    runs, given, problems = [], set(), []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in options:
            if key in given:
                problems.append(f"{word}: {key}={options[key]} was given before; give one")
            given.add(key)
            options[key] = value
        elif word.startswith("-") or (equals and key.isidentifier() and not Path(word).exists()):
            problems.append(f"{word}: no such option or folder; {near(key, options)}")
        else:
            runs.append(Path(word))
    if not runs:
        usage = f"usage: voxelith {COMMANDS[command].usage}"
        problems.append(f"{command}: no run given, a folder such as runs/NAME; {usage}")
    if problems:
        raise InputError(problems)
    return runs


def _table(words: list[str]) -> Any:
    options = {"output": "table", "anchor": "", "search": ""}
    runs = _runs("table", words, options)
    from finetune.formats import make_table, markdown

    search = Path(options["search"]) if options["search"] else None
    table = make_table(runs, Path(options["output"]), options["anchor"], search)
    _show(f"{markdown(table)}\n{options['output']}: table.md, .html, .tex, .csv and .json")
    return table.to_dict()


def _report(words: list[str]) -> Any:
    options = {"output": "report.html", "pretrain": ""}
    runs = _runs("report", words, options)
    from data_prep.files import make_folder
    from finetune.report import make_report
    from finetune.table import read_table
    from finetune.training import sort_runs

    output = Path(options["output"])
    make_folder(output.parent, "output")
    if len(runs) == 1 and (runs[0] / "corpus.json").is_file():
        from finetune.corpus_report import corpus_report

        path = corpus_report(runs[0], output)
        print(f"Open {path}")
        return {"report": str(path)}
    before = [Path(options["pretrain"])] if options["pretrain"] else []
    trainings, finished = sort_runs([*before, *runs])
    path = make_report(trainings, finished, read_table(finished) if finished else None, output)
    print(f"Open {path}")
    return {"report": str(path)}


def _demo(words: list[str]) -> Any:
    settings = _configured("demo", words)
    from finetune.demo import demo

    return demo(settings)


def _features(words: list[str]) -> Any:
    settings = _configured("features", words)
    from pretrain.features import features

    found = features(settings)
    return _done(settings, found.written, found.there, found.left_out)


def _predict(words: list[str]) -> Any:
    settings = _configured("predict", words)
    from finetune.predict import predict

    found = predict(settings)
    return _done(settings, found.written, found.there, found.left_out)


def _done(
    settings: Any, written: Sequence[Any], there: Sequence[Any], left_out: dict[str, str]
) -> dict[str, Any]:
    """Says what became of a folder of scans; what was left out makes the command fail."""
    from data_prep.errors import LeftOutError

    already = f", {len(there)} there already" if settings.resume else ""
    print(f"{settings.output}: {len(written)} written{already}, {len(left_out)} left out")
    result = {
        "output": str(settings.output),
        "written": len(written),
        "there": len(there),
        "left_out": left_out,
    }
    if left_out:
        folder = settings.input.parent if settings.input.is_file() else settings.input
        problems = [f"{folder / name}: {why}" for name, why in left_out.items()]
        raise LeftOutError(problems, result)
    return result


COMMANDS = {
    "demo": Command(
        "the whole line on the sample scans", "demo [output=DIR] [key=value ...]", _demo
    ),
    "prep": Command(
        "raw scans to a corpus",
        "prep input=DIR output=DIR [key=value ...]\n"
        "voxelith prep input=DIR output=DIR step=scan|plan|write|publish [part=3/8] [...]\n"
        "voxelith prep output=CORPUS remove=KEY|SUBJECT|FILE",
        _prep,
        """
Killed at any moment, the same command goes on where it was: what is done is kept beside the output
in .OUTPUT.prep until the corpus is there. The steps divide the work among tasks that share a file
system: each part of scan, then plan, each part of write, then publish; the corpus is the same to
the last byte. `voxelith launch prep` makes SLURM arrays of them.
append=true adds an input to a corpus, remove= withdraws subjects or samples from one.

example: voxelith prep input=scans/ output=corpora/abdomen""",
    ),
    "split": Command(
        "folds for a corpus, drawn or nnU-Net's own",
        "split corpus=DIR [folds=5] [key=value ...]",
        _split,
    ),
    "check": Command(
        "verify every byte of a corpus or a release",
        "check CORPUS|RELEASE",
        _check,
        """
CORPUS is a folder that `voxelith prep` wrote, or its address. Each damaged or missing part is
named, exit code 2. Of a release the golden scan is computed too: whether this machine and these
versions give what was released.

example: voxelith check corpora/abdomen
         voxelith check release/""",
    ),
    "pretrain": Command(
        "a corpus to an encoder",
        "pretrain corpus=DIR run=NAME [experiment=NAME] [objective=mae] [backbone=vit_s] "
        "[trainer=auto] [init=RUN|RELEASE|FILE [backbone=init]] [key=value ...] [--config-dir DIR]",
        _pretrain,
        """
init= is where it begins from: another run, a release, a file of public weights, or what names one.
backbone=init takes the architecture from there too, so that nothing of it has to be known.

Started again with the same words, a run goes on from its newest checkpoint. A recipe with stages
makes a run NAME.STAGE of each, from the weights of the one before; what is typed holds for all,
stages.STAGE.key=value for one.

example: voxelith pretrain corpus=corpora/abdomen run=first experiment=mae_small""",
    ),
    "launch": Command(
        "a run as a job of a cluster, which comes back until it is done",
        "launch pretrain|finetune [-m] [key=value ...] [cluster=slurm] [cluster.nodes=2] "
        "[cluster.KEY=VALUE ...] [--dry-run]\n"
        "voxelith launch prep input=DIR output=DIR [cluster.array=8] [key=value ...] [--dry-run]\n"
        "voxelith launch chain FILE.yaml [output=DIR] [--dry-run]\n"
        "voxelith launch status|logs|cancel RUN|OUTPUT|CHAIN\n"
        "voxelith launch init output=DIR [name=mine] [partition=NAME]\n"
        "voxelith launch doctor [corpus=DIR] [crop_size=[96,96,96]] [output=runs/doctor] "
        "[cluster=slurm] [cluster.KEY=VALUE ...] [--dry-run]",
        _launch,
        """
The words of the command with those of the cluster: of conf/cluster, or of DIR/cluster/NAME.yaml
with --config-dir DIR. A batch script is written, in RUN/launch beside what the job says; --dry-run
prints it. Near its time limit or preempted the job saves what it has and goes on from there later;
crashed, it starts again from its newest checkpoint; cancelled, it does not come back. cluster=local
runs the command here. finetune -m is a sweep: an array of its runs, cluster.array_limit=N at a
time; launched again, it starts what is not finished. init reads partitions, limits, GPUs and what
becomes of preempted jobs from SLURM and writes DIR/cluster/NAME.yaml. doctor submits a job of about
two minutes to that cluster, waits for it and says what works there and what does not: versions,
GPUs, the folder, the corpus, all-reduce, signals, requeueing. chain submits the commands of a file,
each to start when the one before has ended well:

  cluster: cluster.partition=gpu
  stages:
    - pretrain corpus=/data/corpus run=a experiment=mae
    - export runs/a releases/a
    - finetune -m task=NAME corpus=/data/labelled ckpt=releases/a labels=4,16 runs=sweep
    - table sweep output=table

prep is divided into cluster.array parts, on CPUs: an array that scans, a plan, an array that
writes, the publishing; scripts and logs are in OUTPUT.launch.

example: voxelith launch pretrain corpus=/data/corpus run=first experiment=mae cluster.nodes=2""",
    ),
    "plan": Command(
        "hours, memory and disk of a pretraining, from its first steps",
        "plan corpus=DIR [experiment=NAME] [objective=mae] [backbone=vit_s] [trainer=auto] "
        "[key=value ...] [--config-dir DIR]",
        _plan,
        """
The words of a pretraining. About 30 steps of it are made, with as many of its devices as are here,
each with the micro-batch that it will have; nothing of them stays.

example: voxelith plan corpus=/data/corpus experiment=mae trainer=gpu64""",
    ),
    "bench": Command(
        "what a step costs, measured or estimated for a GPU that is not there; what a corpus gives",
        "bench step|estimate|loader [experiment=NAME] [objective=mae] [backbone=vit_s] "
        "[trainer=auto] [key=value ...] [output=FILE] [--config-dir DIR]",
        _bench,
        """
step runs a few steps on this machine; estimate counts operations and memory and runs nothing;
loader reads crops of corpus=DIR with 1, 2, 4 to trainer.workers processes, and with gpu_rate=N says
how many GPUs that take N samples/s are fed.

example: voxelith bench estimate experiment=mae""",
    ),
    "replay": Command(
        "find where a run stopped being finite",
        "replay RUN [step=N] [corpus=DIR]",
        _replay,
        """
RUN is the folder of a pretraining whose corpus is still there, or at corpus=DIR: an address with a
password is given again, since no run keeps that. N is the step to look at, counted from 1, by
default the last that failed. The run is made again from the checkpoint before that step, on this
machine. Printed are the micro-step, the rank and the first module whose output or gradient is not
finite, the loss parts, parameters and gradients that are not, and the samples of that micro-step
with their values; if all is finite, the samples of step N. The same goes to replay.json and
replay.png in RUN/failures/step-N.

example: voxelith replay runs/first step=1200""",
    ),
    "export": Command(
        "a run, or public weights of others, to a release; a release to forms of others",
        "export RUN|RELEASE|FILE|NAME OUT [form=release|full|nnssl|torch|onnx|monai] "
        "[key=value ...] [--push hf://ORG/REPO]",
        _export,
        """
RUN is the folder of a pretraining with a checkpoint or of a finished finetuning, OUT a folder that
is not there yet; the release is called as its run, or name=NAME. form=full has the heads, the
teacher and the optimiser of a pretraining as well. The other forms take a release too: nnssl
(nnU-Net finetunes it), torch (torch.export), onnx, monai (a bundle); each is checked against the
encoder before it appears.

A file of public weights, or a reference or name of `voxelith fetch --list` that stands for one,
becomes a release too. What no weights say is told once, and nothing is guessed:

  modalities=[CT]              what it was trained on: [CT], [MR] or [CT,MR]
  crop_size=[96,96,96]         voxels (D, H, W) of its training
  spacing_mm=[1.5,1.5,1.5]     what its scans were resampled to, (d, h, w), or null: their own
  CT='{rule: window, low: -175, high: 250, onto: [0, 1]}'
  MR='{rule: zscore}'          how values become those of the network: window, percentile, zscore
  axes=RAS                     of its images, SPL by default; weights or images are turned
  name= licence= page= data= note=       for its card
  num_heads=6 ...              arguments of the backbone that no tensor shows

Names of the list know all of it; what is told goes before that. --push uploads the release to the
Hugging Face hub as well, with the login of `hf auth login` or HF_TOKEN; a repository that is not
there is made, private.

example: voxelith export runs/first release/
         voxelith export voco-b voco-b-release/""",
    ),
    "fetch": Command(
        "a checkpoint from elsewhere, verified and cached",
        "fetch NAME|hf://ORG/REPO[@REVISION][/FILE]|https://...|s3://...|PATH [offline=false] "
        "[again=false]\nvoxelith fetch --list",
        _fetch,
        """
Fetched is a release, or a file of weights where the address ends as one (.safetensors, .pth, ...).
A download that broke off goes on. What arrived first is pinned: later the same reference gives the
same bytes, from the cache and without a network, or is refused; `#sha256=HEX` at its end says from
the start what it must be. again=true asks whether it is still the same, offline=true (or
HF_HUB_OFFLINE=1) never asks. The cache is VOXELITH_CACHE, by default ~/.cache/voxelith. --list
shows known names and the cache. ckpt=, init=, inspect and features take references too.

example: voxelith fetch hf://ORG/REPO@COMMIT""",
    ),
    "features": Command(
        "a folder of scans to features",
        "features ckpt=RELEASE input=SCAN|DIR output=OUT.npz|OUT.parquet|DIR [key=value ...]",
        _features,
        """
A .npz has the feature map [E, d, h, w], the affine and spacing of its cells, and their mean as a
vector; a .parquet has a row with the vector of each scan. Scans larger than the crop are seen by
windows.

example: voxelith features ckpt=release/ input=scans/ output=features/""",
    ),
    "inspect": Command(
        "what a run, a release or a file of public weights is",
        "inspect RUN|RELEASE|FILE [argument=value ...]",
        _inspect,
        """
Printed are architecture, preprocessing, training, data with licences, classes or what is answered,
and digest. Of others' weights, told by their tensors, what became of each; what no tensor shows may
be given, such as num_heads=12.

example: voxelith inspect release/""",
    ),
    "finetune": Command(
        "a release to a network that segments or answers for scans, and its scores",
        "finetune task=NAME corpus=DIR ckpt=RELEASE [targets=CSV] [run=NAME] "
        "[init=pretrained|scratch] [labels=16|10%|all] [seed=0] [trainer=auto] [key=value ...] "
        "[--config-dir DIR]\n"
        "voxelith finetune -m task=NAME corpus=DIR ckpt=A,B labels=4,16 seed=0,1,2 runs=DIR "
        "[jobs=N] [twins=false] [--dry-run] [key=value,value ...]\n"
        "voxelith finetune -m experiment=compare_released task=NAME corpus=DIR [ckpt=A,B] "
        "[without=NAME,NAME] [labels=4,16] [seed=0,1,2] [protocol=short|full] [...]",
        _finetune,
    ),
    "predict": Command(
        "segment a folder of scans, or answer for each",
        "predict ckpt=RUN|RELEASE input=DIR output=DIR [tta=true] [key=value ...]",
        _predict,
    ),
    "evaluate": Command(
        "score any predictions",
        "evaluate predictions=DIR corpus=DIR task=NAME output=DIR [part=test] [keymap=FILE] "
        "[key=value ...] [--config-dir DIR]",
        _evaluate,
    ),
    "table": Command(
        "finetuning runs to a table",
        "table RUN [RUN ...] [anchor=summary.json] [search=DIR] [output=table]",
        _table,
        """
RUN is the folder of a finetuning, one that holds several, or a rows.csv. The folder `output` gets
table.md, .html, .tex, .csv and .json, forest.png and, for two numbers of labels or more,
label_curves.png. `anchor` is a summary.json of nnU-Net v2 on the same test cases, for a column of
its own; where runs have several data sets, anchor=NAME:FILE,NAME:FILE. `search` holds the runs on
validation cases in which the arms' rates were chosen: the notes say whether it was a fair choice.

example: voxelith table runs/ output=table/""",
    ),
    "report": Command(
        "runs, or a corpus, to one self-contained page",
        "report RUN|CORPUS [RUN ...] [pretrain=RUN] [output=report.html]",
        _report,
        """
RUN is the folder of any run, or one that holds runs: a pretraining at any time, under way, killed
or done, with its curves, pictures and what became of each start; finetunings that are finished as
`voxelith table` compares them, others with their curves. pretrain=RUN is one of them, shown first.
Of a corpus: slices, what was left out and why, copies, sizes, intensities, licences.

example: voxelith report runs/first
         voxelith report runs/ pretrain=runs/first""",
    ),
}


def _positional(command: str, words: list[str], names: list[str]) -> list[str]:
    from data_prep.errors import InputError

    if len(words) != len(names):
        raise InputError(
            f"{command}: takes {' '.join(names)}, {len(words)} given; "
            f"usage: voxelith {COMMANDS[command].usage}"
        )
    return words


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: voxelith COMMAND [argument ...] [--json] [--help]\n"
        "       voxelith --version\n\n"
        + "\n".join(lines)
        + "\n\nvoxelith COMMAND --help shows what a command takes and its keys; --json prints its "
        "result\nas JSON. Exit code 0: done, 1: failed while running, 2: wrong input."
    )


def _command_help(name: str, words: list[str]) -> str:
    from conf.help import describe

    command = COMMANDS[name]
    usage = f"usage: voxelith {command.usage} [--json]"
    keys = _cluster_keys(words) if name == "launch" else describe(name, words)
    return f"{usage}\n\n{command.summary}\n{command.more}\n\n{keys}".rstrip()


def _cluster_keys(words: list[str]) -> str:
    """The keys of the cluster that the words name."""
    from conf.help import describe_file
    from slurm.settings import CLUSTERS, cluster_of

    cluster, _ = cluster_of(words)
    title = "the cluster (beside these, the keys of the command: voxelith pretrain --help)"
    return describe_file(title, "cluster", CLUSTERS / "slurm.yaml", cluster.model_dump())


def _show(text: str) -> None:
    """Prints what is long; whoever reads it may stop at any line (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_wrong(error: InputError, as_json: bool) -> None:
    from data_prep.errors import CorruptionError, LeftOutError
    from data_prep.references import without_secrets

    if as_json and isinstance(error, LeftOutError):
        print(json.dumps(error.result))
    problems = [without_secrets(problem) for problem in error.problems]
    if len(problems) == 1:
        print(f"error: {problems[0]}", file=sys.stderr)
        return
    # Damage and what is left out are found on the way; all other wrong input before it.
    late = isinstance(error, CorruptionError | LeftOutError)
    end = "" if late else ", nothing was started"
    lines = [f"error: {len(problems)} problems{end}", *problems]
    print("\n  ".join(lines), file=sys.stderr)


def _note_refusal(final: bool = True) -> None:
    """Leaves the file that a batch script asks for, which sees one exit code for all its tasks."""
    if final and (note := os.environ.get("VOXELITH_REFUSED")):
        with contextlib.suppress(OSError):
            Path(note).touch()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0 (done), 1 (failed while running) or 2 (wrong input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and words[1:]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        _show(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"voxelith {version('voxelith')}")
        return 0
    name, words = words[0], words[1:]
    from data_prep.errors import (
        FailedError,
        InputError,
        LostLeaseError,
        NeighbourError,
        UnreachableError,
        near,
    )
    from data_prep.references import without_secrets
    from pretrain.preemption import Preempted, end_of_job

    if name not in COMMANDS:
        print(f"error: {name}: no such command; {near(name, COMMANDS)}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message=OLD_JIT)
    as_json = "--json" in words
    wants_help = "-h" in words or "--help" in words
    words = [word for word in words if word not in ("--json", "-h", "--help")]
    try:
        if wants_help:
            _show(_command_help(name, words))
        elif as_json:
            # The result alone goes to standard output, what is said on the way to standard error.
            with contextlib.redirect_stdout(sys.stderr):
                result = COMMANDS[name].run(words)
            _show(json.dumps(result))
        else:
            COMMANDS[name].run(words)
    except Preempted as preempted:
        return end_of_job(preempted)
    except InputError as error:
        _note_refusal()
        _say_wrong(error, as_json)
        return 2
    except FailedError as error:
        _note_refusal(error.final)
        if as_json:
            print(json.dumps(error.result))
        print(without_secrets(f"error: {error}"), file=sys.stderr)
        return 1
    except (UnreachableError, NeighbourError, LostLeaseError) as error:
        print(without_secrets(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        print(without_secrets(f"error: {name} failed while running: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
