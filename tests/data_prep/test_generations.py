"""Subjects are withdrawn and scans added: bytes of all others stay, and a kill leaves a corpus."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantoms import save, scan

import data_prep.generations
from data_prep.build import prep, prep_step
from data_prep.check import check
from data_prep.corpus import FINGERPRINTS_FILE, Corpus, books, read_parquet
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from data_prep.generations import append, remove
from data_prep.preprocess import as_physical, resample
from data_prep.settings import PrepSettings, RemoveSettings
from data_prep.shards import ShardWriter
from data_prep.volume import read_nifti
from data_prep.work import replaced
from data_prep.write import write_parquet
from voxelith import main

SAMPLES = Path(__file__).parents[2] / "samples"


def run(source: Path, output: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    given = {"processes": 1, "shard_mib": 0.012, **options}
    settings = PrepSettings(input=source, output=output, **given)
    (append if settings.append else prep)(settings, lines.append)
    return lines


def content(corpus: Corpus) -> dict[str, bytes]:
    """The voxels of every sample, by key."""
    return {key: corpus.read(i, "image").tobytes() for i, key in enumerate(corpus.keys)}


def scans(folder: Path, seed: int, count: int, labelled: bool = False) -> Path:
    rng = np.random.default_rng(seed)
    rows = ["image,subject,label" if labelled else "image,subject"]
    for i in range(count):
        save(folder / f"s{i}.nii.gz", scan(rng))
        row = f"s{i}.nii.gz,patient {i // 2}"
        if labelled:
            save(folder / f"l{i}.nii.gz", (scan(rng) > 450).astype(np.uint8))
            row += f",l{i}.nii.gz"
        rows.append(row)
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


@pytest.fixture
def output(tmp_path: Path, seed: int) -> Path:
    """Ten scans of five subjects in several shards."""
    run(scans(tmp_path / "in", seed, 10), tmp_path / "c")
    assert len(Corpus.open(tmp_path / "c").info["shards"]) > 3
    return tmp_path / "c"


def keymap(output: Path) -> list[dict[str, str]]:
    with (output.with_name(output.name + ".private") / "keymap.csv").open() as file:
        return list(csv.DictReader(file))


def quarantine(output: Path) -> list[str]:
    """Names of what was left out."""
    with (output.with_name(output.name + ".private") / "quarantine.csv").open() as file:
        return [row["input"] for row in csv.DictReader(file)]


def test_a_subject_goes_and_only_its_shards_are_written_again(output: Path) -> None:
    before = Corpus.open(output)
    shards = {i: (output / s["name"]).stat().st_ino for i, s in enumerate(before.info["shards"])}
    (subject,) = {row["subject"] for row in keymap(output) if row["input_subject"] == "patient 2"}
    gone = [i for i, s in enumerate(before.subjects) if s == subject]
    touched = {int(before.shards[i]) for i in gone}
    expected = {k: v for i, (k, v) in enumerate(content(before).items()) if i not in gone}

    def payload(i: int) -> bytes:
        shard = (output / before.info["shards"][int(before.shards[i])]["name"]).read_bytes()
        start = int(before.column("image_offset")[i])
        return shard[start : start + int(before.column("image_size")[i])]

    old = [payload(i) for i in gone]
    said: list[str] = []
    found = remove(RemoveSettings(output=output, remove="patient 2"), said.append)
    after = Corpus.open(output)
    assert content(after) == expected and subject not in after.subjects
    assert check(output) == []
    kept = {(output / s["name"]).stat().st_ino for s in after.info["shards"]}
    assert set(shards.values()) - kept == {shards[number] for number in touched}
    emptied = len(before.info["shards"]) - len(after.info["shards"])
    assert found["shards_rewritten"] == len(touched) - emptied
    assert after.info["generations"][1:] == [{"number": 2, "added": 0, "removed": len(gone)}]
    assert after.info["counts"]["samples"] == 8 and after.info["counts"]["subjects"] == 4
    # Nothing of it is left: no name, and in no file that lies there now.
    assert subject not in {row["subject"] for row in keymap(output)}
    left = b"".join(path.read_bytes() for path in output.rglob("*.tar"))
    assert all(old) and not any(one in left for one in old)
    assert "8 are left" in said[-1]


def test_shards_are_written_again_sample_by_sample(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard may hold more than the memory does."""
    size, samples = 2**20, 24
    members = {"json": b"{}", "image.b2nd": bytes(range(256)) * (size // 256)}
    with (tmp_path / "old.tar").open("wb") as file:
        writer = ShardWriter(file)
        for number in range(samples):
            writer.add(f"s{number:02d}", members)
        writer.close()
    wanted = {f"s{number:02d}" for number in range(samples) if number % 3}
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    tracemalloc.start()
    places = data_prep.generations._rewritten(old, file_digest(old), new, wanted)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * size
    assert places.keys() == wanted
    data = new.read_bytes()
    for place in places.values():
        assert data[place["image.b2nd"] :][:size] == members["image.b2nd"]

    read = Path.read_bytes

    def small(path: Path) -> bytes:
        assert path.suffix != ".tar", f"{path} was read as a whole"
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", small)
    # Of a shard that holds others too: which one a scan lies in hangs on the corpus's salt.
    shards = Corpus.open(output).shards.tolist()
    key = next(
        k for k, s in zip(Corpus.open(output).keys, shards, strict=True) if shards.count(s) > 1
    )
    assert remove(RemoveSettings(output=output, remove=key))["shards_rewritten"] == 1


def test_names_can_be_keys_subjects_and_files(output: Path, tmp_path: Path) -> None:
    rows = keymap(output)
    (tmp_path / "gone.txt").write_text(f"{rows[0]['key']}\n\n{rows[5]['input']}\n")
    remove(RemoveSettings(output=output, remove=(str(tmp_path / "gone.txt"), rows[3]["key"])))
    left = Corpus.open(output).keys
    assert len(left) == 7 and not {rows[n]["key"] for n in (0, 3, 5)} & set(left)


def test_unknown_names_and_all_of_them_change_nothing(output: Path) -> None:
    before = Corpus.open(output)
    with pytest.raises(InputError) as caught:
        remove(RemoveSettings(output=output, remove=("patient 9", "nobody")))
    assert len(caught.value.problems) == 2 and "remove=patient 9: is no key" in str(caught.value)
    with pytest.raises(InputError, match="nothing would be left"):
        remove(RemoveSettings(output=output, remove=tuple(f"patient {n}" for n in range(5))))
    assert Corpus.open(output).index_hash == before.index_hash


def test_a_damaged_shard_is_told_and_left(output: Path) -> None:
    corpus = Corpus.open(output)
    path = output / corpus.info["shards"][int(corpus.shards[0])]["name"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=path.name):
        remove(RemoveSettings(output=output, remove=corpus.keys[0]))
    assert Corpus.open(output).index_hash == corpus.index_hash


def test_an_addition_is_a_generation_and_nothing_else_changes(
    output: Path, tmp_path: Path, seed: int
) -> None:
    before = Corpus.open(output)
    inodes = [(output / s["name"]).stat().st_ino for s in before.info["shards"]]
    # Named as those of before: two scans of the first input lie here too, by other names.
    more = scans(tmp_path / "more", seed + 1, 4)
    for number in (0, 1):
        shutil.copy(
            tmp_path / "in" / f"s{number}.nii.gz", tmp_path / "more" / f"again{number}.nii.gz"
        )
    with more.open("a") as file:
        file.write("\nagain0.nii.gz,x\nagain1.nii.gz,y\n")
    lines = run(more, output, append=True)
    after = Corpus.open(output)
    assert check(output) == [] and len(after) == 14 and after.keys[:10] == before.keys
    assert {k: v for k, v in content(after).items() if k in before.keys} == content(before)
    assert [(output / s["name"]).stat().st_ino for s in after.info["shards"]][
        : len(inodes)
    ] == inodes
    # A subject is one in both inputs.
    assert len(set(after.subjects)) == 5
    assert after.info["counts"]["rejected"] == {"excluded": 2}
    assert after.info["generations"][1]["added"] == 4
    assert "4 volumes added as generation 2, 14 in all" in lines[-1]
    assert len(keymap(output)) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.private", "in", "more"]


@pytest.mark.parametrize("keys", ["hmac", "names"])
def test_another_scan_of_the_same_name_comes_in(keys: str, tmp_path: Path) -> None:
    """As every nnU-Net data set has a case_00001: names say nothing of who it is."""
    heads = ("IXI013-HH-1212_T1.nii.gz", "IXI014-HH-1236_T1.nii.gz", "IXI033-HH-1259_T1.nii.gz")
    for folder, head in zip(("one", "two", "three"), heads, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "case_00001.nii.gz").symlink_to(SAMPLES / "ixi" / head)
    (tmp_path / "salt").write_text("of both of them, not of either")
    given: dict[str, Any] = {"keys": keys}
    given |= {"salt": tmp_path / "salt"} if keys == "hmac" else {}
    run(tmp_path / "one", tmp_path / "test", **given)
    run(tmp_path / "two", tmp_path / "c", exclude=tmp_path / "test", **given)
    assert Corpus.open(tmp_path / "c").keys == Corpus.open(tmp_path / "test").keys
    run(tmp_path / "three", tmp_path / "c", append=True, **given)
    corpus = Corpus.open(tmp_path / "c")
    assert len(set(corpus.keys)) == len(corpus) == 2 and check(corpus.path) == []
    assert {row["key"] for row in keymap(corpus.path)} == set(corpus.keys)
    with pytest.raises(InputError, match="3 excluded" if keys == "hmac" else "named by exclude="):
        run(_all_of(tmp_path, heads), tmp_path / "c", append=True, **given)


def test_what_was_excluded_once_comes_in_by_no_addition(
    output: Path, tmp_path: Path, seed: int
) -> None:
    """Test scans stay out of a corpus for life, whoever adds to it and whatever they type."""
    test = scans(tmp_path / "test", seed + 1, 4)
    run(test, tmp_path / "held")
    run(scans(tmp_path / "in", seed, 10), tmp_path / "b", exclude=tmp_path / "held")
    other = scans(tmp_path / "other", seed + 2, 2)
    run(other, tmp_path / "also-held")
    more = scans(tmp_path / "more", seed + 3, 4)
    run(more, tmp_path / "b", append=True, exclude=tmp_path / "also-held")
    for folder in ("test", "other"):
        lines = [f"{tmp_path / folder / f's{n}.nii.gz'},x{n}" for n in range(2)]
        fresh = scans(tmp_path / f"with-{folder}", seed + (4 if folder == "test" else 5), 2)
        fresh.write_text("\n".join([fresh.read_text(), *lines]))
        before = len(Corpus.open(tmp_path / "b"))
        said = run(fresh, tmp_path / "b", append=True)
        assert any("what exclude= kept out of it stays out" in line for line in said)
        assert len(Corpus.open(tmp_path / "b")) == before + 2
    assert (tmp_path / "b.private" / "excluded.txt").stat().st_mode & 0o077 == 0
    # Written anew without it, it is another corpus.
    run(tmp_path / "in" / "list.csv", tmp_path / "b", overwrite=True)
    assert not (tmp_path / "b.private" / "excluded.txt").exists()


@pytest.mark.parametrize("append", [True, False])
def test_a_name_that_was_withdrawn_may_be_that_of_another_scan(
    append: bool, tmp_path: Path
) -> None:
    heads = ("IXI013-HH-1212_T1.nii.gz", "IXI014-HH-1236_T1.nii.gz", "IXI033-HH-1259_T1.nii.gz")
    for folder, names in (("one", heads[:2]), ("two", heads[2:])):
        (tmp_path / folder).mkdir()
        for number, head in enumerate(names):
            (tmp_path / folder / f"case_{number}.nii.gz").symlink_to(SAMPLES / "ixi" / head)
    run(tmp_path / "one", tmp_path / "c", keys="names")
    remove(RemoveSettings(output=tmp_path / "c", remove="case_0"))
    run(tmp_path / "two", tmp_path / "c", keys="names", append=append, overwrite=not append)
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == 1 + append and "case_0" not in corpus.keys
    (tmp_path / "one" / "case_1.nii.gz").unlink()
    with pytest.raises(InputError, match="no usable scan"):  # of who was withdrawn
        run(tmp_path / "one", tmp_path / "c", keys="names", append=True)


def _all_of(folder: Path, heads: Sequence[str]) -> Path:
    (folder / "all").mkdir()
    for head in heads:
        (folder / "all" / head).symlink_to(SAMPLES / "ixi" / head)
    return folder / "all"


def test_what_was_withdrawn_does_not_come_back(output: Path, tmp_path: Path) -> None:
    remove(RemoveSettings(output=output, remove="patient 1"))
    with pytest.raises(InputError, match="no usable scan"):
        run(tmp_path / "in" / "list.csv", output, append=True)
    assert len(Corpus.open(output)) == 8 and check(output) == []


@pytest.mark.parametrize("begun", [False, True])
def test_what_was_withdrawn_does_not_come_back_by_writing_it_again(
    begun: bool, output: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in" / "list.csv"
    again = PrepSettings(
        input=source, output=output, processes=1, shard_mib=0.012, overwrite=True, step="scan"
    )
    if begun:  # with who is withdrawn before it goes on
        prep_step(again)
        prep_step(again.model_copy(update={"step": "plan"}))
    remove(RemoveSettings(output=output, remove="patient 1"))
    lines = run(source, output, overwrite=True)
    withdrawn = tmp_path / "c.private" / "withdrawn.txt"
    assert f"what was withdrawn stays out: {withdrawn}" in lines
    corpus = Corpus.open(output)
    assert len(corpus) == 8 and corpus.info["counts"]["rejected"] == {"excluded": 2}
    assert "already is this corpus (8 samples)" in run(source, output)[-1]


def test_a_corpus_that_has_who_was_withdrawn_is_not_what_is_asked_for(
    output: Path, tmp_path: Path
) -> None:
    """As where it was written again by a prep that did not look."""
    (tmp_path / "c.private" / "withdrawn.txt").write_text(f"{Corpus.open(output).keys[0]}\n")
    with pytest.raises(InputError, match="has 1 samples that were withdrawn"):
        run(tmp_path / "in" / "list.csv", output)
    run(tmp_path / "in" / "list.csv", output, overwrite=True)
    assert len(Corpus.open(output)) == 9


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of two heads, copies of both, and files that are no scans."""
    folder = tmp_path_factory.mktemp("copies")
    heads = ["IXI013-HH-1212", "IXI014-HH-1236"]
    for number, head in enumerate(heads):
        whole = read_nifti(SAMPLES / "ixi" / f"{head}_T1.nii.gz")
        nib.save(nib.Nifti1Image(whole.array[0], whole.affine), folder / f"head{number}.nii.gz")
        for step in (2.5, 2.6):
            small = resample(as_physical(whole), (step,) * 3)
            image = nib.Nifti1Image(np.rint(small.array[0]).astype(np.int16), small.affine)
            nib.save(image, folder / f"small{number}{step}.nii.gz")
        (folder / f"broken{number}.nii.gz").write_bytes(b"no scan")
    (folder / "list.csv").write_text(
        "image,subject\nhead0.nii.gz,Anna\nhead1.nii.gz,Bert\nsmall02.5.nii.gz,Cora\n"
        "small02.6.nii.gz,Anna\nsmall12.5.nii.gz,Anna\nsmall12.6.nii.gz,Cora\n"
        "broken0.nii.gz,Anna\nbroken1.nii.gz,Dora\n"
    )
    return folder / "list.csv"


@pytest.mark.parametrize("keys", ["hmac", "names"])
def test_nothing_of_who_is_withdrawn_is_left(keys: str, copies: Path, tmp_path: Path) -> None:
    output, private = tmp_path / "c", tmp_path / "c.private"
    run(copies, output, keys=keys, shard_mib=1)
    assert len(quarantine(output)) == 6 and len(list((private / "duplicates").iterdir())) == 4
    (private / "duplicates.png").write_bytes(b"of before, with all of them")
    (private / "report.html").write_bytes(b"head0.nii.gz")
    (anna,) = [row for row in keymap(output) if row["input"] == "head0.nii.gz"]
    said: list[str] = []
    remove(RemoveSettings(output=output, remove=anna["key"]), said.append)
    assert quarantine(output) == ["broken1.nii.gz", "small12.6.nii.gz"]
    assert "4 rows of the quarantine are gone" in said[-1]
    (picture,) = (private / "duplicates").iterdir()
    (bert,) = keymap(output)
    assert picture.name.split(".")[1] == bert["key"]
    for path in (p for p in private.rglob("*") if p.is_file() and p.name != "withdrawn.txt"):
        assert anna["key"] not in path.name and anna["key"].encode() not in path.read_bytes()
        assert b"Anna" not in path.read_bytes() and b"head0" not in path.read_bytes()
    # Who is known by what was left out alone, by name of subject or file.
    before = Corpus.open(output).index_hash
    remove(RemoveSettings(output=output, remove=("Dora", "small12.6.nii.gz")), said.append)
    assert quarantine(output) == [] and Corpus.open(output).index_hash == before
    with pytest.raises(InputError, match="remove=Dora: is no key"):
        remove(RemoveSettings(output=output, remove="Dora"))


def test_copies_that_an_addition_has_are_drawn_and_stay_out_when_withdrawn(
    copies: Path, tmp_path: Path, seed: int
) -> None:
    output, pictures = tmp_path / "c", tmp_path / "c.private" / "duplicates"
    rows = ["image,subject", "head0.nii.gz,Anna", "head1.nii.gz,Bert"]
    first = copies.with_name("first.csv")
    first.write_text("\n".join(rows))
    run(first, output, shard_mib=1)
    assert not pictures.exists()
    new = np.random.default_rng(seed).integers(0, 900, (12, 10, 14)).astype(np.int16)
    save(copies.parent / "new.nii.gz", new)
    second = copies.with_name("second.csv")
    second.write_text("image,subject\nsmall02.5.nii.gz,Cora\nhead1.nii.gz,Bert\nnew.nii.gz,Emil\n")
    lines = run(second, output, append=True)
    by_name = {row["input"]: row["key"] for row in keymap(output)}
    # What is equal needs no picture.
    (picture,) = pictures.iterdir()
    assert picture.name.startswith(f"2-00.{by_name['head0.nii.gz']}.")
    assert picture.stat().st_mode & 0o077 == 0
    assert not any("too small" in line and "exclude=" in line for line in lines)
    remove(RemoveSettings(output=output, remove="Anna"))
    assert not list(pictures.iterdir()) and quarantine(output) == ["head1.nii.gz"]
    save(copies.parent / "new.nii.gz", np.roll(new, 3, axis=0) // 2)
    second.write_text("image\nsmall02.6.nii.gz\nnew.nii.gz\n")
    lines = run(second, output, append=True)
    assert quarantine(output) == ["head1.nii.gz", "small02.6.nii.gz"]
    assert any("exclude=c: 1 of its scans are too small" in line for line in lines)


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_stays_and_what_it_leads_to_changes(
    relative: bool, tmp_path: Path, seed: int
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").mkdir()
    link, output = tmp_path / "home" / "c", tmp_path / "disk" / "c"
    link.symlink_to("../disk/c" if relative else output)  # which is not there yet
    run(scans(tmp_path / "in", seed, 10), link)
    remove(RemoveSettings(output=link, remove="patient 1"))
    run(scans(tmp_path / "more", seed + 1, 4), link, append=True)
    assert len(Corpus.open(output)) == len(keymap(output)) == 12 and check(link) == []
    assert link.is_symlink() and list((tmp_path / "home").iterdir()) == [link]
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"c", "c.private"}
    private = tmp_path / "disk" / "c.private"
    private.rename(tmp_path / "home" / "c.private")
    with pytest.raises(ValueError, match=f"its private folder lies beside the link.* {private}"):
        RemoveSettings(output=link, remove="patient 2")


def test_the_same_prep_knows_the_changed_corpus(output: Path, tmp_path: Path) -> None:
    remove(RemoveSettings(output=output, remove="patient 1"))
    lines = run(tmp_path / "in" / "list.csv", output)
    assert "already is this corpus (8 samples)" in lines[-1]


def test_labels_and_splits_go_along(tmp_path: Path, seed: int) -> None:
    output = tmp_path / "c"
    run(scans(tmp_path / "in", seed, 10, True), output, keys="names")
    before = Corpus.open(output).split("default")
    home = {subject: p for p, group in before["groups"].items() for subject in group}
    more = scans(tmp_path / "more", seed + 1, 6, True)
    text = more.read_text().replace("patient 1", "patient 8").replace("patient 2", "patient 9")
    for number in range(6):
        for kind in "sl":
            old = tmp_path / "more" / f"{kind}{number}.nii.gz"
            old.rename(old.with_name(f"new-{kind}{number}.nii.gz"))
    text = text.replace("\ns", "\nnew-s").replace(",l", ",new-l")
    text = text.replace("subject,new-label", "subject,label")
    more.write_text(text)
    run(more, output, keys="names", append=True)
    corpus = Corpus.open(output)
    after = corpus.split("default")
    found = {subject: p for p, group in after["groups"].items() for subject in group}
    assert {s: p for s, p in found.items() if s in home} == home
    assert set(found) - set(home) == {"patient-8", "patient-9"} and check(output) == []
    assert corpus.info["counts"]["cases_by_class"] == {"class_1": 16}
    remove(RemoveSettings(output=output, remove="patient 0"))
    left = Corpus.open(output)
    assert "patient-0" not in str(left.split("default")) and check(output) == []
    assert left.info["counts"]["cases_by_class"] == {"class_1": 12}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keys": "names"}, "keys=names"),
        ({"spacing": 3}, r"spacing=\[3.0,3.0,3.0\]: .*spacing=null"),
        ({"labels": True}, "labels=true"),
        ({"crop": "foreground"}, "crop=foreground: .*crop=none"),
        ({"sheared": "resample"}, "sheared="),
        ({"minimum_slices": 1}, "minimum_slices=1: .*minimum_slices=4"),
        ({"deface": "os.path:join"}, "deface=os.path:join"),
        ({"overlap": "last"}, "overlap="),
        ({"empty_labels": "keep"}, "empty_labels="),
        ({"duplicates": "exact"}, "duplicates="),
    ],
)
def test_an_addition_of_another_kind_is_refused(
    options: dict[str, Any], match: str, output: Path, tmp_path: Path, seed: int
) -> None:
    more = scans(tmp_path / "more", seed + 1, 4)
    with pytest.raises(InputError, match=match):
        run(more, output, append=True, **options)
    assert not list(tmp_path.glob(".*"))


def test_an_addition_goes_to_a_corpus_of_before_options_were_noted(
    output: Path, tmp_path: Path, seed: int
) -> None:
    path = output / "corpus.json"
    info = json.loads(path.read_text())
    noted = ("keys", "labels", "modality", "shard_mib", "spacing")
    info["options"] = {name: info["options"][name] for name in noted}
    for name in ("sha256", "splits"):
        del info[name]
    path.write_text(json.dumps(info))
    run(scans(tmp_path / "more", seed + 1, 4), output, append=True, minimum_slices=1)
    assert len(Corpus.open(output)) == 14


def test_an_addition_without_the_salt_is_refused(output: Path, tmp_path: Path, seed: int) -> None:
    (tmp_path / "c.private" / "salt").rename(tmp_path / "mine")
    more = scans(tmp_path / "more", seed + 1, 4)
    with pytest.raises(InputError, match="salt: missing"):
        run(more, output, append=True)
    run(more, output, append=True, salt=tmp_path / "mine")
    assert len(set(Corpus.open(output).subjects)) == 5


def test_a_label_value_has_one_meaning(tmp_path: Path, seed: int) -> None:
    output = tmp_path / "c"
    more = scans(tmp_path / "more", seed + 1, 4, True)
    run(scans(tmp_path / "in", seed, 6, True), output, classes={1: "liver"})
    with pytest.raises(InputError, match=r"classes=\{1: spleen\}"):
        run(more, output, append=True, classes={1: "spleen"})
    with pytest.raises(InputError, match=r"2: liver\}: .*has other names or values"):
        run(more, output, append=True, classes={1: "spleen", 2: "liver"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.private", "in", "more"]
    run(more, output, append=True, classes={1: "liver", 2: "spleen"})
    info = Corpus.open(output).info
    assert [row["name"] for row in info["classes"]] == ["background", "liver", "spleen"]
    assert info["counts"]["cases_by_class"] == {"liver": 10, "spleen": 0}


def test_what_an_addition_says_stays_where_it_says(output: Path, tmp_path: Path, seed: int) -> None:
    more = scans(tmp_path / "more", seed + 1, 4)
    (tmp_path / "more" / "s3.nii.gz").write_bytes(b"no scan")
    lines = run(more, output, append=True)
    (listed,) = {word for line in lines for word in line.split() if word.endswith(".csv")}
    assert "s3.nii.gz,not_an_image" in Path(listed).read_text()
    assert not any(".more" in line for line in lines)
    for path in (tmp_path / "more").glob("*.gz"):
        path.write_bytes(b"no scan")
    with pytest.raises(InputError, match="no usable scan") as caught:
        run(more, output, append=True)
    refused = Path(str(caught.value).split()[-1])
    assert refused.parent == tmp_path / "c.private" and len(refused.read_text().split("\n")) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.private", "in", "more"]


@pytest.mark.parametrize("what", ["remove", "append"])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_leaves_one_corpus_and_the_same_command_ends_it(
    what: str, moment: str, output: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = scans(tmp_path / "more", seed + 1, 4)
    place = data_prep.generations.take_place

    class Killed(BaseException):
        pass

    def killed(corpus: Path, target: Path) -> None:
        if moment == "between":
            target.rename(replaced(target))
        elif moment == "after":
            place(corpus, target)
        raise Killed

    def change() -> None:
        if what == "remove":
            remove(RemoveSettings(output=output, remove="patient 1"))
        else:
            run(more, output, append=True)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("data_prep.generations.take_place", killed)
        change()
    change()
    corpus = Corpus.open(output)
    assert len(corpus) == (8 if what == "remove" else 14) and check(output) == []
    assert len(corpus.info["generations"]) == 2
    assert len(keymap(output)) == len(corpus)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_kill_while_tidying_up_swallows_no_other_input(
    moment: str, output: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, other = (scans(tmp_path / n, seed + k, 4) for k, n in enumerate(("more", "other"), 1))
    beside = tmp_path / ".c.more"

    class Killed(BaseException):
        pass

    def killed(folder: Path) -> None:
        held = [one.readlink() for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
        assert not any(beside in one.parents for one in held)
        if moment == "within":
            (folder / "corpus.json").unlink()
        elif moment == "after":
            folder.rename(folder.with_suffix(".done"))
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("data_prep.generations._discard", killed)
        run(more, output, append=True)
    assert len(Corpus.open(output)) == 14
    # The same command ends it, and what another one brings comes in.
    assert "4 volumes added as generation 2, 14 in all" in run(more, output, append=True)[-1]
    assert not list(tmp_path.glob(".*"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("data_prep.generations._discard", killed)
        run(other, output, append=True)
    new = scans(tmp_path / "new", seed + 3, 2)
    assert "2 volumes added as generation 4, 20 in all" in run(new, output, append=True)[-1]
    assert check(output) == [] and len(keymap(output)) == 20 and not list(tmp_path.glob(".*"))


def test_an_addition_that_was_prepared_and_not_put_together_is_of_its_input(
    output: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, other = (scans(tmp_path / n, seed + k, 4) for k, n in enumerate(("more", "other"), 1))

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    for _ in range(2):  # the second start finds what the first has prepared
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("data_prep.generations._join", killed)
            run(more, output, append=True)
    run(other, output, append=True)
    corpus = Corpus.open(output)
    assert len(corpus) == 14 and not list(tmp_path.glob(".*"))
    (added,) = [row["input"] for row in keymap(output) if row["key"] == corpus.keys[10]]
    kept = np.asarray(nib.load(tmp_path / "other" / added).dataobj)
    assert sorted(corpus.read(10, "image").ravel()) == sorted(kept.ravel())


def test_unfinished_preps_that_may_hold_what_is_withdrawn_are_named(
    output: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("data_prep.generations._join", killed)
        run(scans(tmp_path / "more", seed + 1, 4), output, append=True)
    words = {"processes": 1, "overwrite": True, "step": "scan"}
    prep_step(PrepSettings(input=tmp_path / "in", output=output, **words))
    said: list[str] = []
    found = remove(RemoveSettings(output=output, remove="patient 2"), said.append)
    left = [path for path in tmp_path.glob(".*") if path.is_dir() and path.name != ".c.prep"]
    left += (tmp_path / ".c.prep").glob("*/")
    assert len(left) == 3 and sorted(found["unfinished"]) == sorted(map(str, left))
    assert all(
        any(f"may hold what was withdrawn: {path} " in line for line in said) for path in left
    )
    for path in left:
        shutil.rmtree(path)
    assert remove(RemoveSettings(output=output, remove="patient 3"))["unfinished"] == []


def test_an_addition_is_made_as_its_corpus_was_and_need_not_be_told(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "corpus"
    given = ["keys=names", "spacing=[1.5,1.5,1.5]", "crop=foreground", "minimum_slices=3"]
    first, more = (scans(tmp_path / n, seed + k, 2) for k, n in enumerate(("in", "more")))
    for file in sorted(more.parent.glob("s*.nii.gz")):
        file.rename(file.with_name(f"new-{file.name}"))
    more = more.parent  # under other names, which are the keys
    (more / "list.csv").unlink()
    assert main(["prep", f"input={first}", f"output={output}", *given]) == 0
    add = ["prep", f"input={more}", f"output={output}", "append=true"]
    assert main([*add, "keys=hmac"]) == 2  # what is typed counts, and is refused
    assert f"keys=hmac: {output} was made with keys=names" in capsys.readouterr().err
    assert main(add) == 0
    corpus = Corpus.open(output)
    assert corpus.keys == ["s0", "s1", "new-s0", "new-s1"]  # names, as there
    assert {corpus.volume(i).spacing for i in range(4)} == {(1.5, 1.5, 1.5)}


def test_code_that_a_corpus_names_is_not_run(
    output: Path,
    tmp_path: Path,
    seed: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever made the corpus may be anyone: what defaces is said by whoever adds to it."""
    (tmp_path / "trap.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('sprung').touch()\n"
        "def front(image, affine):\n    return image < 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    info = json.loads((output / "corpus.json").read_text())
    info["options"]["deface"] = "trap:front"
    (output / "corpus.json").write_bytes(books(info))
    more = scans(tmp_path / "more", seed + 1, 2)
    assert main(["prep", f"input={more}", f"output={output}", "append=true", "processes=1"]) == 2
    assert f"deface=null: {output} was made with deface=trap:front" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_options_that_do_not_go_together_are_named(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "corpus"
    first, more = (scans(tmp_path / n, seed + k, 2) for k, n in enumerate(("in", "more")))
    assert main(["prep", f"input={first}", f"output={output}", "spacing=2"]) == 0
    words = [f"input={more}", f"output={output}", "append=true", "labels=true"]
    assert main(["prep", *words]) == 2
    told = capsys.readouterr().err
    assert f"{output}: was made with " in told and "never resampled" in told


def test_the_command_line_removes_and_adds(
    output: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prep", f"output={output}", "remove=patient 3"]) == 0
    more = scans(tmp_path / "more", seed + 1, 2)
    assert (
        main(["prep", f"input={more}", f"output={output}", "append=true", "shard_mib=0.012"]) == 0
    )
    assert len(Corpus.open(output)) == 10
    assert main(["prep", f"output={output}", "remove=nobody"]) == 2
    assert main(["prep", f"input={more}", f"output={output}", "append=true", "step=scan"]) == 2
    assert "append: excludes step" in capsys.readouterr().err


def test_what_is_added_to_a_corpus_of_all_but_equal_scans_is_too(tmp_path: Path) -> None:
    """A follow-up is like the scan before it, and was asked for."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ct = SAMPLES / "totalsegmentator" / "s0335.nii.gz"
    shutil.copy(ct, tmp_path / "a" / "before.nii.gz")
    image = nib.load(ct)
    values = np.asanyarray(image.dataobj).copy()
    values[:4] += 7  # of the same person, not the same scan
    nib.save(nib.Nifti1Image(values, image.affine, image.header), tmp_path / "b" / "after.nii.gz")
    shutil.copy(ct, tmp_path / "b" / "again.nii.gz")
    for kept, options in ((1, {}), (2, {"duplicates": "exact"})):
        output = tmp_path / f"c{kept}"
        run(tmp_path / "a", output, keys="names", labels=False, **options)
        with contextlib.suppress(InputError):  # nothing of it may come in
            run(tmp_path / "b", output, append=True, keys="names", labels=False, **options)
        assert len(Corpus.open(output)) == kept


def test_a_corpus_of_before_there_were_sketches_can_be_added_to(
    output: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(output, old)
    shutil.copytree(output.with_name("c.private"), tmp_path / "old.private")
    file = old / FINGERPRINTS_FILE
    digest = write_parquet(file, read_parquet(file.read_bytes()).drop_columns(["sketch"]))
    info = json.loads((old / "corpus.json").read_text())
    info["fingerprints"]["sha256"] = digest
    (old / "corpus.json").write_bytes(books(info))
    before = len(Corpus.open(old))
    (tmp_path / "more").mkdir()
    run(scans(tmp_path / "more", 99, 2), old, append=True)
    assert len(Corpus.open(old)) == before + 2
    assert len(Corpus.open(old).sketches()) == before + 2
