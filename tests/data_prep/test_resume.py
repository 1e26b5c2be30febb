"""Prep in parts, killed, and several at once: the corpus is the one that a quiet prep writes."""

from __future__ import annotations

import csv
import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from phantoms import save, save_text, scan

from data_prep.build import prep, prep_step
from data_prep.check import check
from data_prep.corpus import Corpus
from data_prep.errors import FailedError, InputError
from data_prep.fingerprint import fingerprint
from data_prep.naming import keyed_hash
from data_prep.request import check_request
from data_prep.settings import PrepSettings
from data_prep.steps import workers
from voxelith import main

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("VOXELITH_DATA_DIR", ROOT / "../shared/data"))


def settings(source: Path, output: Path, **options: Any) -> PrepSettings:
    usual = {"processes": 1, "shard_mib": 0.01, "keys": "names"}
    return PrepSettings(input=source, output=output, **usual | options)


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def whole(output: Path) -> dict[str, dict[str, bytes]]:
    """The corpus and what is kept beside it."""
    return {"corpus": tree(output), "private": tree(output.with_name(f"{output.name}.private"))}


def notes(output: Path) -> dict[Path, int]:
    """When each case and each shard was done."""
    root = output.parent / f".{output.name}.prep"
    found = [*root.glob("*/scanned/[0-9]*"), *root.glob("*/written/[0-9]*")]
    return {path: path.stat().st_mtime_ns for path in found}


def in_parts(source: Path, output: Path, parts: int, seed: int = 0, **options: Any) -> list[str]:
    said: list[str] = []

    def step(name: str, part: str | None = None) -> None:
        prep_step(settings(source, output, step=name, part=part, **options), said.append)

    for name, after in (("scan", "plan"), ("write", "publish")):
        for part in random.Random(f"{seed}{name}").sample(range(parts), parts):
            step(name, f"{part + 1}/{parts}")
        step(after)
    return said


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """Labelled scans; some of the files are of no use."""
    rng = np.random.default_rng(seed)
    root = tmp_path / "in"
    for i in range(6):
        save(root / "images" / f"p{i}.nii.gz", scan(rng))
        label = rng.integers(0, 3, (12, 10, 14)).astype(np.uint8)
        save(root / "labels" / f"p{i}.nii.gz", label)
    shutil.copy(root / "images" / "p1.nii.gz", root / "images" / "p7.nii.gz")
    shutil.copy(root / "labels" / "p1.nii.gz", root / "labels" / "p7.nii.gz")
    save_text(root / "images" / "letter.nii.gz")
    save_text(root / "labels" / "letter.nii.gz")
    return root


def until(done: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.005)


def start(source: Path, output: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "voxelith.py", "prep", f"input={source}", f"output={output}",
         "keys=names", "shard_mib=0.01", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@contextmanager
def stopped(source: Path, output: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A prep that is held still in the middle of its scans; it ends well when let go."""
    process = start(source, output, "processes=1", *words)
    try:
        until(lambda: notes(output) or process.poll() is not None)
        process.send_signal(signal.SIGSTOP)
        yield process
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    finally:
        process.kill()


@pytest.mark.parametrize("parts", [1, 3, 8, 13])
def test_bytes_do_not_depend_on_the_number_of_parts(
    folder: Path, tmp_path: Path, seed: int, parts: int
) -> None:
    prep(settings(folder, tmp_path / "one" / "c"), say=lambda _: None)
    said = in_parts(folder, tmp_path / "many" / "c", parts, seed)
    assert whole(tmp_path / "one" / "c") == whole(tmp_path / "many" / "c")
    with (tmp_path / "many" / "c.private" / "quarantine.csv").open() as file:
        codes = sorted(row["code"] for row in csv.DictReader(file))
    assert codes == ["duplicate", "image_left_out", "image_left_out", "not_an_image"]
    assert len(Corpus.open(tmp_path / "many" / "c").info["shards"]) > 2
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"c", "c.private"}
    # Whoever comes late finds it done.
    late = settings(folder, tmp_path / "many" / "c", step="scan", part=f"1/{parts}")
    assert prep_step(late, said.append)["already_there"]


def test_samples_and_real_files_in_parts(samples: Path, tmp_path: Path, seed: int) -> None:
    source = samples / "pretrain.csv"
    for k, parts in enumerate((0, 3, 8)):
        output = tmp_path / str(k) / "c"
        if parts:
            in_parts(source, output, parts, seed, shard_mib=1)
        else:
            prep(settings(source, output, processes=2, shard_mib=1), say=lambda _: None)
        assert whole(output)["corpus"] == whole(tmp_path / "0" / "c")["corpus"]
    assert not check(tmp_path / "2" / "c")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data: {DATA} (VOXELITH_DATA_DIR)")
def test_awkward_files_in_parts(tmp_path: Path, seed: int) -> None:
    for name in ("messy", "sct_testing_data", "tcia_soft_tissue_sarcoma", "templates"):
        shutil.copytree(DATA / name, tmp_path / "in" / name)
    (tmp_path / "salt").write_text("of patients of DICOM, whose names depend on it")
    more = {"shard_mib": 1, "salt": tmp_path / "salt"}
    for k, parts in enumerate((0, 3, 8)):
        output = tmp_path / str(k) / "c"
        if parts:
            in_parts(tmp_path / "in", output, parts, seed, **more)
        else:
            prep(settings(tmp_path / "in", output, processes=2, **more), say=lambda _: None)
        assert whole(output) == whole(tmp_path / "0" / "c")
    assert len(whole(output)["private"]["quarantine.csv"].splitlines()) > 10


def test_all_parts_have_one_salt(folder: Path, tmp_path: Path, seed: int) -> None:
    output = tmp_path / "c"
    in_parts(folder, output, 3, seed, keys="hmac")
    salt = (tmp_path / "c.private" / "salt").read_bytes().strip()
    with (tmp_path / "c.private" / "keymap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["key"] == keyed_hash(salt, "key", row["input"]) for row in rows)
    assert not any(salt in data for data in tree(output).values())


def test_a_salt_that_changed_meanwhile_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "c"
    prep_step(settings(folder, output, keys="hmac", step="scan", part="1/2"), say=lambda _: None)
    (tmp_path / "c.private").mkdir()
    (tmp_path / "c.private" / "salt").write_text("0123456789abcdef0123456789abcdef\n")
    with pytest.raises(InputError, match="is not the salt that this prep began with"):
        prep(settings(folder, output, keys="hmac"), say=lambda _: None)


def test_a_step_says_what_it_misses(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "c"

    def step(name: str, part: str | None = None, **options: Any) -> None:
        prep_step(settings(folder, output, step=name, part=part, **options), say=lambda _: None)

    for name in ("plan", "write", "publish"):
        with pytest.raises(InputError, match=f"step={name}: nothing of this prep has been scanned"):
            step(name)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    step("scan", "2/8")
    with pytest.raises(InputError, match=r"cases 1, 3, 4, 5, 6 and 2 more of 8 have not been sc"):
        step("plan")
    for name in ("write", "publish"):
        with pytest.raises(InputError, match=f"step={name}: there is no plan yet; start step=plan"):
            step(name)
    with pytest.raises(InputError, match="step=plan: nothing of this prep has been scanned"):
        step("plan", minimum_slices=2)
    step("scan")
    step("plan")
    step("write", "2/3")
    with pytest.raises(InputError, match=r"shards 1, 3, .* have not been written: start step=wri"):
        step("publish")
    assert not output.exists()


def test_parts_are_checked() -> None:
    for step, part in (("scan", "4/3"), ("scan", "0/3"), ("write", "half")):
        with pytest.raises(ValueError, match="a part such as 3/8"):
            PrepSettings(input="a", output="b", step=step, part=part)
    for step in ("plan", "publish", None):
        with pytest.raises(ValueError, match="step=scan and step=write have parts"):
            PrepSettings(input="a", output="b", step=step, part="1/2")


def test_killed_at_any_moment_it_goes_on(folder: Path, tmp_path: Path, seed: int) -> None:
    """kill -9 of a prep with two workers, again and again; what was done is never done again."""
    rng = np.random.default_rng(seed)
    for i in range(10, 20):
        save(folder / "images" / f"p{i}.nii.gz", scan(rng, (48, 40, 44)))
        save(folder / "labels" / f"p{i}.nii.gz", rng.integers(0, 3, (48, 40, 44), np.uint8))
    output = tmp_path / "c"
    when, before = random.Random(seed), notes(output)
    prep(settings(folder, tmp_path / "quiet" / "c"), say=lambda _: None)
    for _ in range(2):
        process = start(folder, output, "processes=2")
        more = len(before) + when.randint(1, 6)
        until(lambda n=more, p=process: len(notes(output)) >= n or p.poll() is not None)
        time.sleep(when.random() / 50)
        process.kill()
        process.communicate(timeout=60)  # ends when no worker has the pipe any more
        assert process.returncode == -9 and not output.exists()
        after = notes(output)
        assert len(after) > len(before)
        assert {path: after[path] for path in before} == before
        before = after
    prep_step(settings(folder, output, step="scan"), say=lambda _: None)
    after = notes(output)
    assert {path: after[path] for path in before} == before
    assert sum(path.parent.name == "scanned" for path in after) == 18
    prep(settings(folder, output), say=lambda _: None)
    assert whole(output) == whole(tmp_path / "quiet" / "c")
    assert not (tmp_path / ".c.prep").exists()


def test_payloads_are_replaced_and_never_overwritten(folder: Path, tmp_path: Path) -> None:
    """Whoever reads them meanwhile, beside a task that does the same case, has all of them."""
    step = settings(folder, tmp_path / "c", step="scan")
    prep_step(step, say=lambda _: None)
    root = tmp_path / ".c.prep"
    (file,) = root.glob("*/payloads/000000001")
    with file.open("rb") as reader:
        before = os.fstat(reader.fileno()).st_ino
        (note,) = root.glob("*/scanned/000000001.json")
        note.unlink()
        prep_step(step, say=lambda _: None)
        assert file.stat().st_ino != before
        assert file.read_bytes() == reader.read()


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_between_any_two_files_it_goes_on(
    folder: Path, tmp_path: Path, seed: int, overwrite: bool
) -> None:
    """Each change of publishing, from the index to the last folder removed, and some before it."""
    quiet = tmp_path / "quiet" / "c"
    prep(settings(folder, quiet, keys="names"), say=lambda _: None)
    context = multiprocessing.get_context("fork")
    moments = count_moments(folder, tmp_path / "count" / "c")
    when = random.Random(seed)
    chosen = {*range(moments - 13, moments), *when.sample(range(moments - 13), 2)}
    for k in sorted(chosen):
        output = tmp_path / f"at{k}" / "c"
        if overwrite:
            prep(settings(folder, output, minimum_slices=5), say=lambda _: None)
        child = context.Process(target=end_at, args=(folder, output, k, overwrite))
        child.start()
        child.join()
        assert child.exitcode == 9, k
        result = prep(settings(folder, output, overwrite=overwrite), say=lambda _: None)
        assert result.samples == 6
        assert whole(output) == whole(quiet), k
        assert {path.name for path in output.parent.iterdir()} == {"c", "c.private"}, k


def end_at(source: Path, output: Path, moment: int, overwrite: bool) -> None:
    """Prep that ends as if killed, before a file is put in its place, moved or removed."""
    count = [0]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            if count[0] == moment:
                os._exit(9)
            count[0] += 1
            return change(*args, **kwargs)

        return changed

    for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))
    prep(settings(source, output, overwrite=overwrite), say=lambda _: None)
    (output.parent / "moments").write_text(str(count[0]))


def count_moments(source: Path, output: Path) -> int:
    child = multiprocessing.get_context("fork").Process(
        target=end_at, args=(source, output, -1, False)
    )
    child.start()
    child.join()
    return int((output.parent / "moments").read_text())


def test_a_worker_that_dies_of_no_case_leaves_a_clear_end(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path / "c", "processes=2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def workers() -> list[int]:
        found = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    until(lambda: workers() or process.poll() is not None)
    os.kill(workers()[0], signal.SIGKILL)  # it still imports
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "a worker process died" in said and "What is done is kept in" in said
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.private").exists()
    prep(settings(folder, tmp_path / "c"), say=lambda _: None)
    prep(settings(folder, tmp_path / "quiet" / "c"), say=lambda _: None)
    assert whole(tmp_path / "c") == whole(tmp_path / "quiet" / "c")


@pytest.mark.parametrize("noticed", ["before", "amid", "after"])
def test_a_worker_that_is_started_while_another_dies_is_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    """The pool, which ends the others, does not know of it yet, or lets it not start.

    Amid its start the pool closes pipes that are to be handed over; new ones get their numbers.
    """
    started: list[SpawnProcess] = []
    original, dump = SpawnProcess.start, reduction.dump
    opened = [os.open(os.devnull, os.O_RDONLY)]

    def end_the_first() -> None:
        for first in started:
            first.kill()
            time.sleep(1)  # until the pool has ended those that it knows

    def start(process: SpawnProcess) -> None:
        if noticed == "before":
            end_the_first()
        original(process)
        if noticed == "after":
            end_the_first()
        started.append(process)

    def pack(handed: object, *others: Any) -> None:
        dump(handed, *others)
        if noticed == "amid" and started and isinstance(handed, SpawnProcess):
            # No number is free but one and, soon, that of a pipe: the next pair has these two.
            opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(64))
            end_the_first()
            os.close(opened.pop(0))

    monkeypatch.setattr(SpawnProcess, "start", start)
    monkeypatch.setattr(reduction, "dump", pack)
    chosen = settings(folder, tmp_path / "c", processes=2)
    try:
        with pytest.raises(RuntimeError, match="a worker process died"), workers(chosen, 8) as each:
            list(each(abs, range(8)))
        until(lambda: not multiprocessing.active_children(), 10)
    finally:
        for child in multiprocessing.active_children():
            child.kill()
        for number in opened:
            os.close(number)


MORTAL = """
import os, pathlib, signal
import numpy as np

def front(values, affine):
    marked = values.max() > 5000
    deaths = pathlib.Path(__file__).with_name("deaths")
    if marked and len(deaths.read_bytes()) < int(os.environ["DEATHS"]):
        with deaths.open("ab") as file:
            file.write(b"x")
        os.kill(os.getpid(), signal.SIGKILL)
    return np.arange(values.size).reshape(values.shape) < 9
"""
"""A part of the scan of one case that ends its process, as often as it is told to."""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_case_whose_process_dies_twice_is_a_row(
    processes: int, deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """One that dies once was not the cause; the others go on either way."""
    rng = np.random.default_rng(seed)
    for number in range(5):
        array = scan(rng)
        array[3, 3, 3] = 6000 if number == 2 else 900
        save(tmp_path / "in" / f"p{number}.nii.gz", array)
    (tmp_path / "mortal.py").write_text(MORTAL)
    (tmp_path / "deaths").touch()
    monkeypatch.setenv("DEATHS", str(deaths))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    words = (f"processes={processes}", "deface=mortal:front")
    for _ in range(2 if processes == 1 else 1):  # alone it takes the prep with it
        process = start(tmp_path / "in", tmp_path / "c", *words)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert len((tmp_path / "deaths").read_bytes()) == deaths
    corpus = Corpus.open(tmp_path / "c")
    kept = [f"p{number}" for number in range(5) if number != 2 or deaths == 1]
    assert corpus.keys == kept and check(corpus.path) == []
    assert corpus.info["counts"]["rejected"] == ({} if deaths == 1 else {"crashed": 1})
    assert not (tmp_path / ".c.prep").exists()


def test_what_fails_in_the_middle_of_a_scan_costs_that_scan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of a library that nobody foresaw, and memory that is not there."""
    errors = iter([ZeroDivisionError("by zero"), MemoryError()])

    def fails(*args: Any) -> Any:
        for error in errors:
            raise error
        return fingerprint(*args)

    monkeypatch.setattr("data_prep.scan.fingerprint", fails)
    result = prep(settings(folder, tmp_path / "c"), say=lambda _: None)
    assert result.rejected["crashed"] == 1 and result.rejected["too_large"] == 1
    assert result.samples == 5 and result.files["total"] == 16


def test_two_preps_of_one_output_do_not_fight(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "c"
    with stopped(folder, output) as first:
        who = rf"is being prepared by others, the last to begin was process {first.pid} on"
        for more in ({}, {"minimum_slices": 2}, {"overwrite": True}):
            with pytest.raises(InputError, match=who):
                prep(settings(folder, output, **more), say=lambda _: None)
    assert Corpus.open(output).keys == [f"p{i}" for i in range(6)]


def test_parts_work_side_by_side(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "c"
    monkeypatch.setattr("data_prep.build.PATIENCE_SECONDS", 0.1)
    with stopped(folder, output, "step=scan", "part=1/2"):
        prep_step(settings(folder, output, step="scan", part="2/2"), say=lambda _: None)
        for step in (None, "publish"):
            with pytest.raises(InputError, match="is being prepared by others"):
                prep_step(settings(folder, output, step=step), say=lambda _: None)
    lines: list[str] = []
    prep_step(settings(folder, output, step="scan"), lines.append)
    assert "scan, part 1/1: 8 cases, 8 were there already" in lines


def test_what_other_preps_left_is_named_and_left_alone(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "c"
    prep_step(settings(folder, output, step="scan", minimum_slices=2), say=lambda _: None)
    (left,) = (tmp_path / ".c.prep").glob("*/")
    (tmp_path / ".c.prep-host-12").mkdir()  # as preps of before named theirs
    lines: list[str] = []
    prep(settings(folder, output), lines.append)
    said = sorted(line for line in lines if "of another prep" in line)
    assert [line.split(": ")[1].split(" (rm -r")[0] for line in said] == [
        str(tmp_path / ".c.prep-host-12"), str(left),
    ]  # fmt: skip
    assert list((tmp_path / ".c.prep").glob("*/")) == [left]


def test_a_full_disk_is_a_clear_end_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of files fails as a full disk does, in the middle of a write."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); "
        "from voxelith import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["prep", f"input={folder}", f"output={tmp_path / 'c'}", "processes=1", "keys=names"]
    done = subprocess.run(
        [sys.executable, "-c", limited, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no room left to write to (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert "the same command goes on" in done.stdout
    assert not (tmp_path / "c").exists()
    assert main(words) == 0
    assert check(tmp_path / "c") == []
    quiet = tmp_path / "quiet" / "c"
    assert main([*words[:2], f"output={quiet}", *words[3:]]) == 0
    assert tree(tmp_path / "c") == tree(quiet)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("part", ["images", "labels"])
def test_what_the_system_does_not_let_be_read_is_read_by_the_same_command_later(
    part: str,
    number: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    load = nibabel.load

    def fails(path: Path, *args: Any, **options: Any) -> Any:
        if Path(path) == folder / part / "p2.nii.gz":
            raise OSError(number, os.strerror(number), str(path))
        return load(path, *args, **options)

    salt = tmp_path / "salt"
    salt.write_bytes(b"0123456789abcdef")
    words = ["prep", f"input={folder}", "processes=1", f"salt={salt}"]
    output = tmp_path / "c"
    with monkeypatch.context() as broken:
        broken.setattr("nibabel.load", fails)
        assert main([*words, f"output={output}"]) == 1
    said = "".join(capfd.readouterr())
    assert f"1 cases cannot be read now ({os.strerror(number)}: 1)" in said
    assert "the same command goes on" in said and "Traceback" not in said and "p2" not in said
    refused = tmp_path / "c.private" / "refused.csv"
    assert "images/p2.nii.gz" in refused.read_text() and not output.exists()
    assert len(list((tmp_path / ".c.prep").glob("*/scanned/*.json"))) == 7
    assert main([*words, f"output={output}"]) == 0
    quiet = tmp_path / "quiet" / "c"
    assert main([*words, f"output={quiet}"]) == 0
    assert tree(output) == tree(quiet) and not refused.exists()


def test_parts_that_could_not_read_all_name_it_each_for_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = nibabel.load
    output, private = tmp_path / "c", tmp_path / "c.private"

    def fails(path: Path, *args: Any, **options: Any) -> Any:
        if path.name in ("p2.nii.gz", "p5.nii.gz"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return load(path, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr("nibabel.load", fails)
        for part in ("1/2", "2/2"):
            with pytest.raises(FailedError, match=f"refused-{part[0]}.csv names them"):
                prep_step(settings(folder, output, step="scan", part=part))
    named = [(private / f"refused-{part}.csv").read_text() for part in (1, 2)]
    assert sorted("p2.nii.gz" in text for text in named) == [False, True]
    assert sorted("p5.nii.gz" in text for text in named) == [False, True]
    assert prep(settings(folder, output)).samples == 6
    assert not list(private.glob("refused*"))


def test_no_request_is_made_without_a_file_that_cannot_be_looked_at_now(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be another one, and all that was scanned in vain."""
    chosen = settings(folder, tmp_path / "c")
    layout, _, request = check_request(chosen)
    monkeypatch.setattr("data_prep.request.find_cases", lambda *_: layout)
    look = Path.stat

    def fails(path: Path, **options: Any) -> Any:
        if path.name == "p2.nii.gz":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return look(path, **options)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "stat", fails)
        with pytest.raises(InputError, match=r"cannot be read \(Stale file handle\)"):
            check_request(chosen)
    assert check_request(chosen)[2] == request


def test_a_file_that_no_memory_holds_is_too_large(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = nibabel.load

    def fails(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "p2.nii.gz" and path.parent.name == "images":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return load(path, *args, **options)

    monkeypatch.setattr("nibabel.load", fails)
    assert prep(settings(folder, tmp_path / "c")).samples == 5
    assert "too_large" in (tmp_path / "c.private" / "quarantine.csv").read_text()
