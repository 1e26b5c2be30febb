"""Words planted in headers and names are in nothing that prep writes or says; faces go."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_series import write_series
from phantoms import everything, ras_affine, ras_array, save
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataelem import DataElement
from seeds import SEED

from data_prep.build import prep, prep_step
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.settings import PrepResult, PrepSettings
from voxelith import main

ROOT = Path(__file__).parents[2]
WORDS = ("PN", "LO", "SH", "ST", "LT", "UT", "UC", "AE", "CS", "AS")
NUMBERS = {"DA": "19{:06}", "DT": "19{:06}010203", "TM": "010203.{:06}", "IS": "177{:06}",
           "DS": "0.177{:06}"}  # fmt: skip
# What prep reads: it tells series apart, or says what the pixels are.
READ = {"SpecificCharacterSet"}.union(
    re.findall(r"\w+", (ROOT / "data_prep" / "dicom.py").read_text())
)


class Words:
    """Words that occur nowhere else, each in a field of its own."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.planted: list[str] = []

    def next(self) -> str:
        word = "".join(self._rng.choice(list("bcdfghjkmnpqrstvwxz"), 12))
        self.planted.append(word)
        return word

    def number(self, form: str) -> str:
        self.planted.append(form.format(int(self._rng.integers(100_000, 999_999))))
        return self.planted[-1]


def scan(number: int) -> np.ndarray:
    return ras_array() + np.random.default_rng(number).integers(0, 90, ras_array().shape) - 1024


def nifti(folder: Path, words: Words) -> None:
    image = nib.Nifti1Image(scan(0).astype(np.int16), ras_affine())
    for name, size in (
        ("descrip", 80), ("aux_file", 24), ("intent_name", 16), ("db_name", 18), ("data_type", 10),
    ):  # fmt: skip
        word = words.next()[: size - 1]
        words.planted[-1] = word
        image.header[name] = word.encode()
    for code in ("comment", "dicom", "afni"):
        text = words.next().encode()
        if code == "dicom":
            made = pydicom.Dataset()
            made.PatientName = text.decode()
            image.header.extensions.append(nib.nifti1.Nifti1DicomExtension(2, made))
        else:
            image.header.extensions.append(nib.nifti1.Nifti1Extension(code, text))
    nib.save(image, folder / f"{words.next()}.nii.gz")


def itk(folder: Path, words: Words, suffix: str) -> None:
    image = SimpleITK.GetImageFromArray(scan(len(suffix) + ord(suffix[1])).astype(np.int16))
    for name in ("Comment", "PatientName", "ContentDate", "space_directions_note"):
        image.SetMetaData(name, words.next())
    path = folder / f"{words.next()}{suffix}"
    SimpleITK.WriteImage(image, str(path))
    if suffix == ".nrrd":
        head, body = path.read_bytes().split(b"\n\n", 1)
        more = f"\n# {words.next()}\ncontent: {words.next()}\n{words.next()}:={words.next()}"
        path.write_bytes(head + more.encode() + b"\n\n" + body)


def dicom(folder: Path, words: Words) -> int:
    files = write_series(folder / words.next(), scan(9), ras_affine())
    fields, patient = 0, words.next()
    for path in files:
        made = pydicom.dcmread(path)
        for keyword in sorted(keyword_dict):
            kind = dictionary_VR(keyword)
            tag = pydicom.datadict.tag_for_keyword(keyword)
            if kind not in (*WORDS, *NUMBERS) or keyword in READ or keyword in made or not tag:
                continue
            if tag >> 16 in (0, 2, 4, 0x28) or "Retired" in keyword:
                continue
            if path is files[0] or fields < 40:  # a few in each slice, all in the first
                word = words.number(NUMBERS[kind]) if kind in NUMBERS else words.next()
                value = {"PN": f"{word}^Erika", "CS": word.upper()}.get(kind, word)
                made.add(DataElement(tag, kind, value, validation_mode=pydicom.config.IGNORE))
                fields += 1
        made.PatientID = patient
        block = made.private_block(0x0011, words.next(), create=True)
        block.add_new(0x01, "LO", words.next())
        made.save_as(path)
    return fields


def test_words_of_headers_and_names_are_in_nothing(tmp_path: Path, seed: int) -> None:
    words = Words(seed)
    source = tmp_path / "in"
    source.mkdir()
    nifti(source, words)
    for suffix in (".nrrd", ".mha"):
        itk(source, words, suffix)
    assert dicom(source, words) > 1500
    (source / f"{words.next()}.nii.gz").write_bytes(b"no scan")
    names = [p.name for p in source.rglob("*")]
    command = [sys.executable, "-m", "voxelith", "prep", f"input={source}", "processes=1"]
    done = subprocess.run(
        [*command, f"output={tmp_path / 'c'}"], cwd=ROOT, capture_output=True, check=True
    )
    said = (done.stdout + done.stderr).lower()
    checked = subprocess.run(
        [sys.executable, "-m", "voxelith", "check", str(tmp_path / "c")],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    said += (checked.stdout + checked.stderr).lower()
    page = tmp_path / "c" / "report.html"  # looked through with the corpus
    assert main(["report", str(tmp_path / "c"), f"output={page}"]) == 0
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == 4 and b"not_an_image" in said
    found = everything(tmp_path / "c")
    private = everything(tmp_path / "c.private")
    for word in words.planted:
        assert word.encode() not in found, word
        assert word.encode() not in said, word
        # There are the names of files, and nothing else.
        in_a_name = any(word in str(p.relative_to(source)) for p in source.rglob("*"))
        assert (word.encode() in private) <= in_a_name, word
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "c.private").iterdir())
    with (tmp_path / "c.private" / "quarantine.csv").open() as file:
        assert [row["code"] for row in csv.DictReader(file)] == ["not_an_image"]
    assert len(names) == len(set(names))


def bids_named_freely(folder: Path) -> Path:
    for n in range(2):
        save(
            folder / f"sub-{n}" / "anat" / f"sub-{n}_MeierAnna-19610203.nii.gz",
            scan(n).astype(np.int16),
        )
    return folder


def bids_with_labels_named_freely(folder: Path) -> Path:
    for path in sorted(bids_named_freely(folder).rglob("*.nii.gz")):
        label = (ras_array() > 500).astype(np.uint8)
        save(path.with_name(path.name.replace("MeierAnna-19610203", "dseg")), label)
    return folder


def collection_told_freely(folder: Path) -> Path:
    save(folder / "a.nii.gz", scan(0).astype(np.int16))
    image = {"image_path": "a.nii.gz", "modality": "T1w of MeierAnna-19610203"}
    subjects = {"1": {"sessions": {"1": {"images": [image]}}}}
    data = {"datasets": {"ds": {"subjects": subjects}}}
    (folder / "pretrain_data.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    "make", [bids_named_freely, bids_with_labels_named_freely, collection_told_freely]
)
def test_what_is_no_name_of_a_sequence_is_not_taken_for_one(
    make: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "in")
    assert main(["prep", f"input={source}", f"output={tmp_path / 'c'}", "processes=1"]) == 0
    assert Corpus.open(tmp_path / "c").groups("sequence")[0] == "unknown"
    found = everything(tmp_path / "c") + "".join(capfd.readouterr()).lower().encode()
    assert b"meieranna" not in found and b"19610203" not in found


def listed(folder: Path, *rows: str) -> Path:
    for name in ("a", "b", "Mustermann"):
        save(folder / f"{name}.nii.gz", scan(ord(name[0])).astype(np.int16))
    (folder / "Mustermann.csv").write_text("\n".join(rows))
    return folder / "Mustermann.csv"


def sound_list(folder: Path) -> Path:
    return listed(folder, "image,subject", "a.nii.gz,x", "Mustermann.nii.gz,y")


def list_with_mistakes(folder: Path) -> Path:
    rows = ("Mustermann.nii.gz,train", "Mustermann.nii.gz,", "a.nii.gz,Mustermann")
    return listed(folder, "image,split", *rows)


def list_without_header(folder: Path) -> Path:
    return listed(folder, "Mustermann.nii.gz,x")


def torn_split(folder: Path) -> Path:
    rows = ("a.nii.gz,Mustermann,train", "b.nii.gz,Mustermann,test")
    return listed(folder, "image,subject,split", *rows)


def folder_in_a_list(folder: Path) -> Path:
    (folder / "Mustermann").mkdir(parents=True)
    return listed(folder, "image", "Mustermann")


def bids_with_two_images(folder: Path) -> Path:
    for run in ("", "_run-2"):
        save(folder / "sub-Mustermann" / "anat" / f"sub-Mustermann{run}_T1w.nii.gz", ras_array())
    label = (ras_array() > 500).astype(np.uint8)
    save(folder / "sub-Mustermann" / "anat" / "sub-Mustermann_dseg.nii.gz", label)
    return folder


def task_that_leads_out(folder: Path) -> Path:
    save(folder / "a.nii.gz", ras_array())
    rows = [{"image": "../Mustermann.nii.gz", "label": "../Mustermann.nii.gz"}]
    (folder / "dataset.json").write_text(json.dumps({"training": rows}))
    return folder


def folds_of_others(folder: Path) -> Path:
    save(folder / "images" / "a.nii.gz", ras_array())
    save(folder / "labels" / "a.nii.gz", (ras_array() > 500).astype(np.uint8))
    folds = [{"train": ["a", "Mustermann"], "val": ["Mustermann"]}]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (sound_list, None),
        (list_with_mistakes, "the list, line 3: its image is listed in line 2"),
        (list_without_header, "the list: unknown column"),
        (torn_split, "1 subjects are in more than one part"),
        (folder_in_a_list, "the list, line 2: its image is a folder and holds 0 volumes"),
        (bids_with_two_images, "of a session 2 images end in _T1w"),
        (task_that_leads_out, "image 1 or its label lies outside"),
        (folds_of_others, "1 cases are not in the input"),
    ],
)
def test_mistakes_of_an_input_are_told_without_names(
    make: Callable[[Path], Path],
    told: str | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = make(tmp_path / "in")
    words = ["prep", f"output={tmp_path / 'c'}", "processes=1", "--json"]
    code = main([*words, f"input={source}"])
    said = "".join(capfd.readouterr())
    assert "Mustermann" not in said and code == (2 if told else 0)
    assert b"mustermann" not in everything(tmp_path / "c")
    if told is not None:
        assert told in said
        noted = tmp_path / "c.private" / "refused.csv"
        assert str(noted) in said and "Mustermann" in noted.read_text()
        assert noted.stat().st_mode & 0o077 == noted.parent.stat().st_mode & 0o077 == 0
        assert main([*words, f"input={source}", "keys=names"]) == 2
        assert "Mustermann" in capfd.readouterr().err


def test_what_other_words_name_is_told_without_names(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "Mustermann.nii.gz", ras_array())
    (tmp_path / "names.txt").write_text("Mustermann, Max.nii.gz\n")
    words = ["prep", f"input={tmp_path / 'in'}", f"output={tmp_path / 'c'}", "processes=1"]
    for word, told in (
        ("subjects=zzz[0-9]", "is found in none of 1 cases; each would be"),
        (f"exclude={tmp_path / 'names.txt'}", "1 of its lines: expected a key of a corpus"),
    ):
        assert main([*words, word]) == 2
        said = capfd.readouterr().err
        assert told in said and "Mustermann" not in said, said


# Faces.

FACE = """
import numpy as np
def front(values, affine):
    gone = np.zeros(values.shape, bool)
    gone[:, :20] = True  # h grows to posterior
    return gone
def nothing(values, affine):
    return np.zeros(values.shape, bool)
def wrong(values, affine):
    return values > 0.5 * values.max(), affine
def fails(values, affine):
    raise RuntimeError("Erika Musterfrau")
"""


def heads(folder: Path) -> Path:
    rng = np.random.default_rng(SEED + 3)
    folder.mkdir()
    for number in range(2):
        array = rng.integers(1, 900, (50, 60, 55)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([3.5, 3.5, 3.5, 1])), folder / f"{number}.nii.gz")
    return folder


def run(tmp_path: Path, **options: Any) -> tuple[PrepResult, list[str]]:
    lines: list[str] = []
    source = tmp_path / "in"
    settings = PrepSettings(
        input=source if source.exists() else heads(source),
        output=tmp_path / "c",
        keys="names",
        processes=1,
        **options,
    )
    return prep(settings, say=lines.append), lines


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lab_faces.py").write_text(FACE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "lab_faces"


def test_an_input_without_a_scan_is_told_without_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "in" / "Mustermann^Erika.nii.gz"
    save(broken, np.zeros((12, 10, 14), np.int16))
    settings = PrepSettings(input=tmp_path / "in", output=tmp_path / "c", processes=1)
    for content in (None, b"no image"):
        if content:
            broken.write_bytes(content)
        with pytest.raises(InputError) as refused:
            prep(settings)
        said = str(refused.value) + "".join(capsys.readouterr())
        assert "Left out: 1 " in said and "Mustermann" not in said
        private = tmp_path / "c.private"
        assert private.stat().st_mode & 0o777 == 0o700
        row = (private / "refused.csv").read_text().splitlines()[1]
        assert row.startswith(f"{broken.name},{'not_an_image' if content else 'constant'},")
        with pytest.raises(InputError, match=r"Mustermann\^Erika"):
            prep(settings.model_copy(update={"keys": "names"}))
    save(broken, np.arange(1680, dtype=np.int16).reshape(12, 10, 14))
    prep(settings)
    assert not (private / "refused.csv").exists() and (private / "quarantine.csv").exists()


def test_heads_with_their_faces_are_told(tmp_path: Path) -> None:
    _, lines = run(tmp_path)
    assert any(line.startswith("2 volumes may be heads") for line in lines)


def test_a_face_is_the_lowest_value_and_not_valid(tmp_path: Path, module: str) -> None:
    _, lines = run(tmp_path, deface=f"{module}:front")
    assert not any("may be heads" in line for line in lines)
    corpus = Corpus.open(tmp_path / "c")
    for i in range(2):
        image, mask = corpus.read(i, "image")[0], corpus.read(i, "mask")
        assert mask[:, :20].all() and not mask[:, 20:].any()
        assert (image[:, :20] == image.min()).all()
        original = nib.load(tmp_path / "in" / f"{i}.nii.gz").get_fdata()
        kept = corpus.meta(i)["native"]
        assert kept["shape"] == list(original.shape)
        assert (np.sort(image[:, 20:].ravel()) == np.sort(original[:, :-20].ravel())).all()


@pytest.mark.parametrize("name", ["lab_rows:front", "lab_tools:front"])
def test_a_mended_function_is_another_request(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its code is in the module that deface= names, or in one that this takes it from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lab_tools.py").write_text("from lab_rows import front\n")

    def take_away(rows: int) -> None:
        (tmp_path / "lab_rows.py").write_text(
            "def front(image, affine):\n    gone = image < -1e6\n"
            f"    gone[:, :{rows}] = True\n    return gone\n"
        )
        for module in ("lab_rows", "lab_tools"):
            sys.modules.pop(module, None)

    take_away(5)
    settings = PrepSettings(
        input=heads(tmp_path / "in"), output=tmp_path / "c", keys="names", processes=1, deface=name
    )
    prep_step(settings.model_copy(update={"step": "scan", "part": "1/2"}))
    take_away(20)
    prep(settings)
    corpus = Corpus.open(tmp_path / "c")
    assert all(corpus.read(i, "mask")[:, :20].all() for i in range(2))
    assert prep(settings).already_there
    take_away(9)
    with pytest.raises(InputError, match="holds another corpus"):
        prep(settings)


@pytest.mark.parametrize("name", ["nothing", "wrong", "fails"])
def test_a_scan_whose_face_may_still_be_there_stays_out(
    name: str, tmp_path: Path, module: str
) -> None:
    with pytest.raises(InputError, match="deface_failed") as caught:
        run(tmp_path, deface=f"{module}:{name}")
    assert "Erika" not in str(caught.value) and not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["nowhere.at.all:f", "lab_faces:absent", "lab_faces:np"])
def test_a_function_that_is_none_is_found_before_the_work(
    name: str, tmp_path: Path, module: str
) -> None:
    with pytest.raises(InputError, match=f"deface={name}"):
        run(tmp_path, deface=name)
