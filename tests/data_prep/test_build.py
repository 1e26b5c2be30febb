from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantoms import (
    SHAPE_RAS,
    everything,
    ras_affine,
    ras_array,
    save,
    save_text,
    save_truncated,
    scan,
)
from pydantic import ValidationError
from seeds import SEED

from data_prep.build import prep, prep_step
from data_prep.check import check
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.exclusions import read_exclusions
from data_prep.naming import KEY_PATTERN, slug
from data_prep.settings import PrepResult, PrepSettings
from data_prep.volume import read_nifti
from data_prep.write import assign_shards

ROOT = Path(__file__).parents[2]


def run(source: Path, output: Path, **options: Any) -> tuple[PrepResult, list[str]]:
    lines: list[str] = []
    settings = PrepSettings(input=source, output=output, **{"processes": 1, **options})
    result = prep(settings, say=lines.append)
    assert not any("books" in line for line in lines)
    return result, lines


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def quarantine(output: Path) -> dict[str, str]:
    with (output.with_name(output.name + ".private") / "quarantine.csv").open() as file:
        return {row["input"]: row["code"] for row in csv.DictReader(file)}


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """Six good scans."""
    rng = np.random.default_rng(seed)
    for i in range(6):
        save(tmp_path / "in" / f"scan{i}.nii.gz", scan(rng))
    return tmp_path / "in"


@pytest.fixture
def labelled(tmp_path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(6):
        save(tmp_path / "in" / "images" / f"p{i}.nii.gz", scan(rng))
        label = rng.integers(0, 3, (12, 10, 14)).astype(np.uint8)
        save(tmp_path / "in" / "labels" / f"p{i}.nii.gz", label)
    return tmp_path / "in"


@pytest.fixture
def salt(tmp_path: Path) -> Path:
    path = tmp_path / "salt"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    return path


def test_bytes_do_not_depend_on_the_number_of_processes(
    labelled: Path, salt: Path, tmp_path: Path
) -> None:
    options = {"salt": salt, "shard_mib": 0.01}
    run(labelled, tmp_path / "one" / "c", **options)
    run(labelled, tmp_path / "three" / "c", **options, processes=3)
    one, three = tree(tmp_path / "one" / "c"), tree(tmp_path / "three" / "c")
    assert one == three
    assert sum(name.startswith("shards/") for name in one) > 2


@pytest.mark.parametrize("keys", ["hmac", "names"])
def test_names_that_are_no_utf8_are_names(
    keys: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As archives of old systems unpack to."""
    for number, name in enumerate((b"M\xfcller", b"M\xe4ller")):
        (folder / f"scan{number}.nii.gz").rename(folder / os.fsdecode(name + b".nii.gz"))
    save_text(folder / os.fsdecode(b"K\xf6hler.nii.gz"))
    command = [sys.executable, "-m", "voxelith", "prep", f"output={tmp_path / 'c'}"]
    words = [f"input={folder}", "processes=1", f"keys={keys}"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as most locales have it
    subprocess.run([*command, *words], cwd=ROOT, env=strict, check=True)
    shown = capfd.readouterr().out
    assert ("K\N{REPLACEMENT CHARACTER}hler.nii.gz" in shown) == (keys == "names")
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == len(set(corpus.keys)) == 6 and check(tmp_path / "c") == []
    private = tmp_path / "c.private"
    assert b"M\xfcller.nii.gz" in (private / "keymap.csv").read_bytes()
    assert b"K\xf6hler.nii.gz,not_an_image" in (private / "quarantine.csv").read_bytes()
    (tmp_path / "gone.txt").write_bytes(b"M\xfcller.nii.gz\n")
    withdrawn = [*command, f"remove={tmp_path / 'gone.txt'}"]
    subprocess.run(withdrawn, cwd=ROOT, env=strict, check=True)
    assert len(Corpus.open(tmp_path / "c")) == 5
    assert b"M\xfcller" not in (private / "keymap.csv").read_bytes()


def test_every_bad_file_is_left_out_with_its_reason(folder: Path, tmp_path: Path) -> None:
    array = ras_array()
    nan = ras_array("float32")
    nan[0, 0, 0] = np.inf
    sheared = ras_affine()
    sheared[1, 2] = 0.6
    rgb = np.zeros(SHAPE_RAS, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save_text(folder / "letter.nii.gz")
    save_truncated(folder / "cut.nii.gz", np.tile(array, (4, 4, 4)) % 251 * 7)
    save(folder / "nan.nii.gz", nan)
    save(folder / "time.nii.gz", np.stack([array, array], -1))
    save(folder / "shear.nii.gz", array, sheared)
    save(folder / "rgb.nii.gz", rgb)
    save(folder / "zero.nii.gz", np.zeros(SHAPE_RAS, np.int16))
    save(folder / "PET" / "x.nii.gz", array)
    save(folder / "organs.nii.gz", (array % 3).astype(np.uint8))
    save(folder / "x_seg.nii.gz", array)
    shutil.copy(folder / "scan0.nii.gz", folder / "scan9 (copy).nii.gz")
    (folder / "notes.txt").write_text("hello")
    (folder / "film.avi").write_bytes(b"?")

    result, lines = run(folder, tmp_path / "c", keys="names")
    assert quarantine(tmp_path / "c") == {
        "letter.nii.gz": "not_an_image",
        "cut.nii.gz": "truncated",
        "nan.nii.gz": "nan_or_inf",
        "time.nii.gz": "not_3d",
        "shear.nii.gz": "sheared",
        "rgb.nii.gz": "rgb_or_complex",
        "zero.nii.gz": "constant",
        "PET/x.nii.gz": "unsupported_modality",
        "organs.nii.gz": "looks_like_a_label",
        "x_seg.nii.gz": "looks_like_a_label",
        "scan9 (copy).nii.gz": "duplicate",
        "film.avi": "not_an_image",
    }
    assert result.samples == 6
    assert result.files == {
        "images": 6, "labels": 0, "masks": 0, "left_out": 12, "ignored": 1, "total": 19,
    }  # fmt: skip
    assert sum(result.rejected.values()) == 12
    text = "\n".join(lines)
    for code in result.rejected:
        assert code in text
    counts = Corpus.open(tmp_path / "c").info["counts"]
    assert (counts["rejected"], counts["files"]) == (result.rejected, result.files)


def test_labelled_files_add_up_too(labelled: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED + 1)
    save(labelled / "images" / "alone.nii.gz", scan(rng))
    save(labelled / "images" / "shifted.nii.gz", scan(rng))
    affine = ras_affine()
    affine[0, 3] += 4
    save(labelled / "labels" / "shifted.nii.gz", np.ones((12, 10, 14), np.uint8), affine)
    save(labelled / "images" / "odd.nii.gz", scan(rng))
    save(labelled / "labels" / "odd.nii.gz", np.full((12, 10, 14), 9, np.uint8))
    save_text(labelled / "labels" / "orphan.nii.gz")
    save(labelled / "images" / "broken.nii.gz", scan(rng))
    save_text(labelled / "labels" / "broken.nii.gz")
    result, _ = run(labelled, tmp_path / "c", keys="names", classes={1: "a", 2: "b"})
    assert quarantine(tmp_path / "c") == {
        "images/alone.nii.gz": "label_missing",
        "images/shifted.nii.gz": "label_geometry_mismatch",
        "images/odd.nii.gz": "label_values",
        "images/broken.nii.gz": "label_unreadable",
        "labels/shifted.nii.gz": "image_left_out",
        "labels/odd.nii.gz": "image_left_out",
        "labels/broken.nii.gz": "image_left_out",
        "labels/orphan.nii.gz": "label_without_image",
    }
    assert result.files["total"] == 6 + 6 + 8
    corpus = Corpus.open(tmp_path / "c")
    assert [(row["value"], row["name"]) for row in corpus.classes] == [
        (0, "background"), (1, "a"), (2, "b"),
    ]  # fmt: skip
    assert corpus.splits == ["default"]
    parts = corpus.split("default")["parts"]
    assert sorted(key for keys in parts.values() for key in keys) == corpus.keys


def test_labels_false_makes_an_unlabelled_corpus(labelled: Path, tmp_path: Path) -> None:
    result, _ = run(labelled, tmp_path / "c", labels=False)
    assert (result.kind, result.files["ignored"]) == ("unlabelled", 6)
    assert not Corpus.open(tmp_path / "c").has("seg")


def test_no_name_of_a_person_gets_into_the_corpus(tmp_path: Path) -> None:
    name = b"Mustermann"
    rng = np.random.default_rng(SEED)
    for i, word in enumerate(["Mustermann_Max", "other"]):
        image = nib.Nifti1Image(scan(rng), ras_affine())
        image.header["descrip"] = b"Mustermann 1970-01-01"
        image.header["db_name"] = b"Mustermann"
        image.header["aux_file"] = b"Mustermann.txt"
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", name))
        path = tmp_path / "Mustermann" / "images" / f"{word}_{i}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        save(
            tmp_path / "Mustermann" / "labels" / path.name,
            rng.integers(0, 3, (12, 10, 14), np.uint8),
        )
    save_text(tmp_path / "Mustermann" / "images" / "Mustermann_bad.nii.gz")
    result, lines = run(tmp_path / "Mustermann", tmp_path / "c")
    assert result.samples == 2, lines
    kept = everything(tmp_path / "c")
    for word in (name.lower(), str(tmp_path).lower().encode(), b"1970-01-01", b"19700101"):
        assert word not in kept, word


def test_the_private_folder_is_closed_and_outside(folder: Path, tmp_path: Path) -> None:
    result, _ = run(folder, tmp_path / "c")
    private = tmp_path / "c.private"
    assert result.private == private
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    for path in private.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {path.name for path in private.iterdir()} == {
        "salt", "keymap.csv", "quarantine.csv", "request.json",
    }  # fmt: skip
    with (private / "keymap.csv").open() as file:
        rows = list(csv.DictReader(file))
    corpus = Corpus.open(tmp_path / "c")
    assert [row["key"] for row in rows] == corpus.keys
    assert sorted(row["input"] for row in rows) == [f"scan{i}.nii.gz" for i in range(6)]
    for row in rows:
        i = corpus.position(row["key"])
        np.testing.assert_array_equal(
            corpus.read(i), read_nifti(folder / row["input"]).array.astype(np.int16)
        )
    assert not any("salt" in name for name in tree(tmp_path / "c"))


def test_keys_depend_on_the_salt_alone(folder: Path, salt: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a", salt=salt)
    run(folder, tmp_path / "b", salt=salt)
    run(folder, tmp_path / "c")
    one, two, three = (Corpus.open(tmp_path / name) for name in "abc")
    assert one.keys == two.keys
    assert not set(one.keys) & set(three.keys)
    assert all(KEY_PATTERN.fullmatch(key) for key in one.keys)
    # The salt that was made is kept, so the same corpus can be made again.
    run(folder, tmp_path / "c", overwrite=True)
    assert Corpus.open(tmp_path / "c").index_hash == three.index_hash


def test_doing_it_again_does_nothing_and_overwrite_replaces(folder: Path, tmp_path: Path) -> None:
    first, _ = run(folder, tmp_path / "c")
    before = (tmp_path / "c" / "corpus.json").stat().st_mtime_ns
    again, lines = run(folder, tmp_path / "c")
    assert again.already_there
    assert "nothing to do" in lines[-1]
    assert (again.samples, again.index_hash) == (first.samples, first.index_hash)
    assert (tmp_path / "c" / "corpus.json").stat().st_mtime_ns == before
    save(folder / "new.nii.gz", scan(np.random.default_rng(SEED + 77)))
    with pytest.raises(InputError, match="overwrite=true"):
        run(folder, tmp_path / "c")
    assert run(folder, tmp_path / "c", overwrite=True)[0].samples == 7
    assert {path.name for path in tmp_path.iterdir()} == {"in", "c", "c.private"}


def modality_in_a_list(root: Path, edited: bool) -> Path:
    rows = f"image,modality\na.nii.gz,{'MR' if edited else 'CT'}\n"
    (root / "list.csv").write_text(rows)
    return root / "list.csv"


def column_of_a_list(root: Path, edited: bool) -> Path:
    columns = "image,label,mask\n"
    row = "a.nii.gz,,a_seg.nii.gz\n" if edited else "a.nii.gz,a_seg.nii.gz,\n"
    (root / "list.csv").write_text(columns + row)
    return root / "list.csv"


def name_of_a_value(root: Path, edited: bool) -> Path:
    for folder, file in (("imagesTr", "a"), ("labelsTr", "a_seg")):
        name = "a_0000.nii.gz" if folder == "imagesTr" else "a.nii.gz"
        (root / folder).mkdir(exist_ok=True)
        if not (root / folder / name).exists():
            shutil.copy2(root / f"{file}.nii.gz", root / folder / name)
    for file in root.glob("*.nii.gz"):
        file.unlink()
    told = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "spleen" if edited else "liver": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(told))
    return root


@pytest.mark.parametrize("edit", [modality_in_a_list, column_of_a_list, name_of_a_value])
def test_files_that_mean_something_else_are_another_corpus(
    edit: Callable[[Path, bool], Path], tmp_path: Path, seed: int
) -> None:
    """Not a byte or time of a file that is read as a scan has changed, only what is said of it."""
    rng = np.random.default_rng(seed)
    root = tmp_path / "in"
    save(root / "a.nii.gz", scan(rng).astype(np.int16) - 900)
    save(root / "a_seg.nii.gz", (scan(rng) > 0).astype(np.uint8))

    def made() -> tuple[Any, ...]:
        corpus = Corpus.open(tmp_path / "c")
        return corpus.modalities, corpus.meta(0)["payloads"], corpus.classes

    run(edit(root, False), tmp_path / "c", keys="names")
    before = made()
    assert run(edit(root, False), tmp_path / "c", keys="names")[0].already_there
    half = PrepSettings(input=edit(root, False), output=tmp_path / "half", keys="names")
    prep_step(half.model_copy(update={"step": "scan"}))
    source = edit(root, True)
    with pytest.raises(InputError, match=r"another state of the input.*overwrite=true"):
        run(source, tmp_path / "c", keys="names")
    run(source, tmp_path / "c", keys="names", overwrite=True)
    assert made() != before
    # What was scanned of the old meaning is not gone on with.
    _, lines = run(source, tmp_path / "half", keys="names")
    assert any("of another prep of this output, unfinished" in line for line in lines)
    assert Corpus.open(tmp_path / "half").index_hash == Corpus.open(tmp_path / "c").index_hash


def test_what_is_in_the_way_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="left alone"):
            run(folder, tmp_path / "c", overwrite=overwrite)
    assert (tmp_path / "c" / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "c.private").exists()


def test_wrong_requests_are_listed_at_once(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc")
    (tmp_path / "classes.yaml").write_text("one: two")
    with pytest.raises(InputError) as caught:
        run(
            labelled,
            labelled / "c",
            salt=tmp_path / "short",
            exclude=tmp_path / "none",
            classes=tmp_path / "classes.yaml",
            spacing=(1, 1, 1),
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for part in ("inside the input", "short", "none", "classes.yaml", "never resampled"):
        assert part in text
    assert not (labelled / "c").exists()


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError) as caught:
        PrepSettings(input="a", output="b", labels=True, spacing=(1, 1, 1))
    assert "never resampled" in str(caught.value)
    given = PrepSettings(input="a", output="b", classes="{1: anterior, 2: posterior}")
    assert given.classes == {1: "anterior", 2: "posterior"}
    with pytest.raises(ValidationError, match="mapping"):
        PrepSettings(input="a", output="b", classes="{1: [")
    with pytest.raises(ValidationError):
        PrepSettings(input="a", output="b", sped=3)  # type: ignore[call-arg]


def test_a_place_that_cannot_be_written_is_wrong_input(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        run(folder, tmp_path / "file" / "c")


@pytest.mark.parametrize("kind", ["missing", "empty", "unusable"])
def test_without_a_usable_scan_nothing_is_written_but_why(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    if kind != "missing":
        source.mkdir()
    if kind == "unusable":
        save_text(source / "a.nii.gz")
    said = {
        "missing": "no such file or folder",
        "empty": "the folder is empty",
        "unusable": "no usable scan",
    }
    with pytest.raises(InputError, match=said[kind]):
        run(source, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob(".c*"))
    noted = [path.name for path in tmp_path.glob("c.private/*")]
    assert noted == (["refused.csv"] if kind == "unusable" else [])


def test_a_crash_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("data_prep.publish.write_index", full)
        run(folder, tmp_path / "c")
    # What is done is kept, closed to others, and taken up by the same prep.
    assert {path.name for path in tmp_path.iterdir()} == {"in", ".c.prep"}
    assert stat.S_IMODE((tmp_path / ".c.prep").stat().st_mode) == 0o700
    run(folder, tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "c", "c.private"}


def test_excluded_keys_and_fingerprints_stay_out(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "all", keys="names")
    prints = Corpus.open(tmp_path / "all").fingerprints()
    (tmp_path / "out.txt").write_text(f"# withdrawn\nscan1\n{prints['scan4']}\n")
    run(folder, tmp_path / "c", keys="names", exclude=tmp_path / "out.txt")
    assert Corpus.open(tmp_path / "c").keys == ["scan0", "scan2", "scan3", "scan5"]
    assert quarantine(tmp_path / "c") == {"scan1.nii.gz": "excluded", "scan4.nii.gz": "excluded"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keymap.csv", "input,case,key\nscan1.nii.gz,scan1,scan1\n"),
        ("other.json", '{"values": ["scan1"]}'),
        ("list.txt", "scan1.nii.gz\n"),
    ],
)
def test_what_is_no_list_keeps_nothing_out_and_is_refused(
    folder: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: .*expected a key of a corpus"):
        run(folder, tmp_path / "c", keys="names", exclude=tmp_path / name)
    assert not (tmp_path / "c").exists()


def test_a_release_is_known_by_its_file_of_fingerprints_too(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "all", keys="names")
    prints = Corpus.open(tmp_path / "all").fingerprints()
    told = {"format": 1, "values": [prints["scan1"], prints["scan4"]]}
    (tmp_path / "fingerprints.json").write_text(json.dumps(told))
    run(folder, tmp_path / "c", keys="names", exclude=tmp_path / "fingerprints.json")
    assert Corpus.open(tmp_path / "c").keys == ["scan0", "scan2", "scan3", "scan5"]


def test_a_split_is_known_from_within_its_folder(
    labelled: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(labelled, tmp_path / "labelled", keys="names")
    held = Corpus.open(tmp_path / "labelled").split("default")["parts"]
    monkeypatch.chdir(tmp_path / "labelled" / "splits")
    found = read_exclusions([Path("default.json")])
    prints = Corpus.open(tmp_path / "labelled").scan_prints()
    out = {one for part in ("test", "validation") for key in held[part] for one in prints[key]}
    assert out and found.names == out
    assert not found.names & {one for key in held["train"] for one in prints[key]}


def test_a_pattern_that_finds_no_subject_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"subjects=pat\(\\d\+\): is found in none of 6 cases"):
        run(folder, tmp_path / "c", subjects=r"pat(\d+)")
    run(folder, tmp_path / "c", subjects=r"scan[0-3]")
    assert len(set(Corpus.open(tmp_path / "c").subjects)) == 6


def test_official_split_comes_from_the_list(labelled: Path, tmp_path: Path) -> None:
    rows = ["image,label,subject,split"]
    parts = ["train", "train", "val", "val", "test", ""]
    for i, part in enumerate(parts):
        rows.append(f"images/p{i}.nii.gz,labels/p{i}.nii.gz,s{i // 2},{part}")
    rows.append("images/gone.nii.gz,labels/gone.nii.gz,s9,test")
    (labelled / "list.csv").write_text("\n".join(rows))
    run(labelled / "list.csv", tmp_path / "c", keys="names")
    split = Corpus.open(tmp_path / "c").split("official")
    assert split["parts"] == {"train": ["p0", "p1"], "validation": ["p2", "p3"], "test": ["p4"]}
    assert quarantine(tmp_path / "c")["images/gone.nii.gz"] == "missing_file"
    (labelled / "list.csv").write_text("\n".join(rows).replace("s0,train", "s1,train"))
    with pytest.raises(InputError, match="more than one part"):
        run(labelled / "list.csv", tmp_path / "d", keys="names")


def test_unlabelled_scans_can_be_resampled(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "native", keys="names")
    run(folder, tmp_path / "c", keys="names", spacing=(1.5, 1.5, 1.5))
    native, corpus = Corpus.open(tmp_path / "native"), Corpus.open(tmp_path / "c")
    np.testing.assert_allclose(corpus.spacings, 1.5)
    assert corpus.shapes[0].tolist() == [1, 28, 5, 12]
    # Statistics and fingerprints are of the native scans in both.
    assert corpus.fingerprints() == native.fingerprints()
    one, other = (c.meta(0)["channels"][0]["statistics"] for c in (corpus, native))
    assert one == other


def test_names_become_keys_without_collisions(tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    for name in (
        "a/Scan 1.nii.gz",
        "b/Scan 1.nii.gz",
        "b/scan-1.nii",
        "Ä=ö.nii",
        "x" * 90 + ".nii",
    ):
        save(tmp_path / "in" / name, scan(rng))
    run(tmp_path / "in", tmp_path / "c", keys="names")
    keys = Corpus.open(tmp_path / "c").keys
    assert len(keys) == 5
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    assert "a-scan-1" in keys


def test_absolute_paths_of_a_list_do_not_become_keys(tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    paths = [save(tmp_path / "secret" / day / "scan.nii.gz", scan(rng)) for day in ("a", "b")]
    (tmp_path / "list.csv").write_text("image\n" + "\n".join(map(str, paths)) + "\n")
    run(tmp_path / "list.csv", tmp_path / "c", keys="names")
    assert Corpus.open(tmp_path / "c").keys == ["a-scan", "b-scan"]


def test_slug() -> None:
    assert slug("Sub 01/T1.w") == "sub-01-t1-w"
    others = ["ü", "é", "Мария", "Ольга", "张伟", "王芳"]
    assert len({*map(slug, others)}) == len(others)
    assert all(KEY_PATTERN.fullmatch(slug(name)) for name in others)
    assert len(slug("y" * 200)) <= 64


def test_shards_close_before_they_pass_their_size() -> None:
    assert assign_shards([5, 5, 1, 20, 3], 10) == [[0, 1], [2], [3], [4]]
    assert assign_shards([], 10) == []


def test_corpus_json_says_what_it_is(labelled: Path, tmp_path: Path) -> None:
    run(labelled, tmp_path / "c", name="demo")
    info = json.loads((tmp_path / "c" / "corpus.json").read_text())
    assert (info["format"], info["name"], info["kind"]) == (1, "demo", "labelled")
    assert info["generations"] == [{"number": 1, "added": 6, "removed": 0}]
    assert {"blosc2", "numpy", "nibabel", "voxelith"} <= set(info["versions"])
    assert sum(shard["samples"] for shard in info["shards"]) == 6
    # No clock in it: the whole tree is a function of input and options.
    assert not any(word in json.dumps(info) for word in ("date", "time", str(tmp_path)))


@pytest.mark.slow
def test_a_large_scan_stays_within_memory(tmp_path: Path) -> None:
    import subprocess
    import sys

    rng = np.random.default_rng(SEED)
    base = rng.integers(-1000, 1500, (64, 64, 300)).astype(np.int16)
    array = np.tile(base, (8, 8, 1))
    save(tmp_path / "in" / "images" / "ct.nii", array)
    save(tmp_path / "in" / "labels" / "ct.nii", (array % 117).astype(np.uint8))
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from data_prep.build import prep\n"
        "from data_prep.settings import PrepSettings\n"
        "prep(PrepSettings(input=sys.argv[1], output=sys.argv[2], processes=1))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "in"), str(tmp_path / "c")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout.splitlines()[-1]) < 2500  # MiB; the scan itself is 150
    corpus = Corpus.open(tmp_path / "c")
    box = ((100, 200, 300), (96, 96, 96))
    expected = read_nifti(tmp_path / "in" / "images" / "ct.nii").array
    np.testing.assert_array_equal(
        corpus.read(0, "image", *box), expected[:, 100:196, 200:296, 300:396]
    )
