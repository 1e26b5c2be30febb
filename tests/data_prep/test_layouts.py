from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from phantoms import ras_array, save, scan

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.layouts.case import Layout, modality_from_name, subject_from_name
from data_prep.layouts.find import READERS, find_cases
from data_prep.layouts.piles import from_pile
from data_prep.scans import scan_files
from data_prep.settings import PrepSettings


def test_images_beside_labels_are_paired(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.nii.gz", ras_array())
    for name in ("a", "z"):
        save(tmp_path / "labels" / f"{name}.nii.gz", ras_array())
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "images" / "notes.docx").write_text("?")
    (tmp_path / ".hidden.nii").write_text("?")
    layout = find_cases(tmp_path)
    assert [case.name for case in layout.cases] == ["images/a.nii.gz", "images/b.nii.gz"]
    assert layout.cases[0].label == tmp_path / "labels" / "a.nii.gz"
    assert layout.cases[1].label is None
    assert layout.ignored == ["README.md"]
    assert [(row.name, row.code) for row in layout.left_out] == [
        ("images/notes.docx", "not_an_image"),
        ("labels/z.nii.gz", "label_without_image"),
    ]


def test_decathlon_task_is_recognised(tmp_path: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        save(tmp_path / folder / "x_1.nii.gz", ras_array())
    save(tmp_path / "imagesTs" / "x_2.nii.gz", ras_array())
    save(tmp_path / "extra.nii.gz", ras_array())
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "Anterior"},
                "training": [{"image": "./imagesTr/x_1.nii.gz", "label": "./labelsTr/x_1.nii.gz"}],
                "test": ["./imagesTs/x_2.nii.gz"],
            }
        )
    )
    layout = find_cases(tmp_path)
    assert "Decathlon" in layout.description
    assert [(c.name, c.modality, c.label is not None) for c in layout.cases] == [
        ("imagesTr/x_1.nii.gz", "MR", True),
        ("imagesTs/x_2.nii.gz", "MR", False),
    ]
    assert layout.classes == {0: "background", 1: "Anterior"}
    assert [(row.name, row.code) for row in layout.left_out] == [("extra.nii.gz", "not_listed")]
    assert layout.ignored == ["dataset.json"]


def test_a_case_that_is_listed_twice_counts_once(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}.nii.gz", scan(rng))
    save(tmp_path / "in" / "l.nii.gz", (scan(rng) > 450).astype(np.uint8))
    rows = [{"image": f"{name}.nii.gz", "label": "l.nii.gz"} for name in "aba"]
    path = tmp_path / "in" / "dataset.json"
    path.write_text(json.dumps({"modality": {"0": "MRI"}, "training": rows}))
    settings = PrepSettings(input=tmp_path / "in", output=tmp_path / "c", processes=1)
    result = prep(settings, say=lambda line: None)
    assert result.files == {
        "images": 2, "labels": 1, "masks": 0, "left_out": 0, "ignored": 1, "total": 4,
    }  # fmt: skip
    assert not any("books" in note for note in result.notes)
    rows[2]["label"] = "b.nii.gz"
    path.write_text(json.dumps({"modality": {"0": "MRI"}, "training": rows}))
    with pytest.raises(InputError, match=r"a\.nii\.gz is listed twice"):
        find_cases(tmp_path / "in")


def test_books_that_do_not_add_up_are_told(tmp_path: Path, seed: int) -> None:
    """Files are counted as they are found, apart from what becomes of them."""
    rng = np.random.default_rng(seed)
    save(tmp_path / "in" / "a.nii.gz", scan(rng))
    (tmp_path / "in" / "notes.txt").write_text("x")
    reader = READERS["pairs"]

    def forgetful(root: Path, files: list[Path]) -> Layout | None:
        return from_pile(root, [path for path in files if path.name != "notes.txt"])

    try:
        READERS["pairs"] = forgetful
        settings = PrepSettings(input=tmp_path / "in", output=tmp_path / "c", processes=1)
        lines: list[str] = []
        prep(settings, say=lines.append)
    finally:
        READERS["pairs"] = reader
    (told,) = [line for line in lines if line.startswith("the books do not add up")]
    assert "of 2 files 1 are in no row, and 1 are counted where 1 are named" in told


def test_decathlon_paths_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(
        json.dumps({"training": [{"image": "../../etc/x.nii.gz", "label": "l.nii.gz"}]})
    )
    with pytest.raises(InputError, match="outside"):
        find_cases(tmp_path)


def test_a_pile_skips_what_looks_like_a_label(tmp_path: Path) -> None:
    save(tmp_path / "sub-07" / "anat" / "scan_T1w.nii.gz", ras_array())
    save(tmp_path / "sub-07" / "anat" / "scan_seg.nii.gz", ras_array())
    save(tmp_path / "labelsTr" / "a.nii", ras_array())
    (tmp_path / "photo.png").write_bytes(b"?")
    layout = find_cases(tmp_path)
    assert [(c.subject, c.modality) for c in layout.cases] == [("07", "MR")]
    assert sorted((row.code, row.name) for row in layout.left_out) == [
        ("looks_like_a_label", "labelsTr/a.nii"),
        ("looks_like_a_label", "sub-07/anat/scan_seg.nii.gz"),
        ("not_an_image", "photo.png"),
    ]


def test_csv_gives_everything(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "\ufeffimage,label,subject,modality,sequence,source,licence,split\r\n"
        '"a,1.nii.gz",l.nii.gz,p1,mri,T1w,here,CC0,val\r\n'
        "\r\n"
        "ct/b.nii.gz,,p2,,,,,\r\n",
        encoding="utf-8",
    )
    one, two = find_cases(tmp_path / "list.csv").cases
    assert (one.name, one.images) == ("a,1.nii.gz", (tmp_path / "a,1.nii.gz",))
    assert (one.modality, one.sequence, one.split) == ("MR", "T1w", "validation")
    assert (two.label, two.modality, two.split) == (None, "CT", "")


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("CT_MRI/clinic/p1.nii.gz", None), ("CT/CT_MRI/p1.nii.gz", "CT"), ("PET_CT/x.nii.gz", None),
        ("mr/p1.nii.gz", "MR"), ("CT/p1_T1w.nii.gz", "MR"), ("a/ct_of_mr_unit.nii.gz", "MR"),
    ],
)  # fmt: skip
def test_a_folder_of_several_modalities_says_none(name: str, modality: str | None) -> None:
    assert modality_from_name(name) == modality


def test_a_bids_set_may_lie_among_derivatives(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = tmp_path / "derivatives" / "prep"
    for n in (1, 2):
        save(root / f"sub-{n}" / "anat" / f"sub-{n}_T1w.nii.gz", scan(rng))
        label = (scan(rng) > 450).astype(np.uint8)
        save(root / f"sub-{n}" / "anat" / f"sub-{n}_dseg.nii.gz", label)
    layout = find_cases(root)
    assert len(layout.cases) == 2 and all(case.label for case in layout.cases)


def test_csv_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "image,split\na.nii,exam\na.nii,train\n,test\nb.nii,test,more\n"
    )
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path / "list.csv")
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("line 2: split 'exam'", "line 3: a.nii is listed", "line 4: the image", "line 5"):
        assert part in text


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: None, "no such"),
        (lambda p: p.mkdir(), "empty"),
        (lambda p: p.write_text("x"), "folder of scans or a .csv"),
    ],
)
def test_missing_and_empty_inputs(make: object, match: str, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path / "in")
    with pytest.raises(InputError, match=match):
        find_cases(tmp_path / "in")


def test_csv_with_unknown_columns(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("img,lable\na,b\n")
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path / "x.csv")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("CT/abc.nii.gz", "CT"),
        ("study_ct/T1.nii.gz", "MR"),
        ("x/chest-CT_0001.nii", "CT"),
        ("PET/image.nii.gz", "PET"),
        ("factory/object.nii", None),
        ("IXI013-HH-1212_T1.nii.gz", "MR"),
    ],
)
def test_modality_words(name: str, modality: str | None) -> None:
    assert modality_from_name(name) == modality


def unlabelled_bids(root: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name in (
        "sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-01/ses-b/anat/sub-01_ses-b_run-2_FLAIR",
        "sub-02/anat/sub-02_acq-x_T1w", "sub-02/ct/sub-02_ct",
    ):  # fmt: skip
        save(root / f"{name}.nii.gz", scan(rng) - 1000 * name.endswith("ct"))
    save(root / "sub-02" / "anat" / "sub-02_T1w_mask.nii.gz", scan(rng))
    save(root / "derivatives" / "prep" / "sub-02" / "anat" / "sub-02_T1w.nii.gz", scan(rng))
    (root / "participants.tsv").write_text("participant_id\n")
    return root


def test_bids_without_label_maps_keeps_subjects_and_sequences(tmp_path: Path, seed: int) -> None:
    root = unlabelled_bids(tmp_path / "in", seed)
    settings = PrepSettings(input=root, output=tmp_path / "c", keys="names", processes=1)
    result = prep(settings, say=lambda line: None)
    assert result.layout == "BIDS without label maps"
    assert result.rejected == {"looks_like_a_label": 1, "not_listed": 1}
    assert not any("books" in note for note in result.notes)
    corpus = Corpus.open(tmp_path / "c")
    found = zip(corpus.keys, corpus.subjects, corpus.groups("sequence"), strict=True)
    assert dict(zip(found, corpus.modalities, strict=True)) == {
        ("sub-01_ses-a_t1w", "01", "T1w"): "MR",
        ("sub-01_ses-b_run-2_flair", "01", "FLAIR"): "MR",
        ("sub-02_acq-x_t1w", "02", "T1w"): "MR",
        ("sub-02_ct", "02", "ct"): "CT",
    }


def test_what_only_looks_like_bids_is_a_pile_unless_it_is_forced(tmp_path: Path, seed: int) -> None:
    root = unlabelled_bids(tmp_path / "in", seed)
    (root / "more").mkdir()
    save(root / "more" / "x.nii.gz", ras_array())
    assert find_cases(root).description.startswith("folder of scans")
    forced = find_cases(root, forced="bids")
    assert len(forced.cases) == 4
    assert ("more/x.nii.gz", "not_listed") in {(row.name, row.code) for row in forced.left_out}
    # Suffixes that belong together can be named here too.
    save(root / "sub-02" / "anat" / "sub-02_FLAIR.nii.gz", ras_array())
    two = find_cases(root, channels=["T1w", "FLAIR"], forced="bids")
    assert [case.sequence for case in two.cases] == ["T1w;FLAIR"]
    with pytest.raises(InputError, match="layout=bids"):
        find_cases(root / "more", forced="bids")


def test_volumes_of_a_bids_file_may_be_channels(tmp_path: Path, seed: int) -> None:
    four = np.stack([scan(np.random.default_rng([seed, n])) for n in range(3)], axis=-1)
    save(tmp_path / "sub-1" / "func" / "sub-1_bold.nii.gz", four)
    (case,) = find_cases(tmp_path, volumes="channels").cases
    assert case.channels == ("bold 0", "bold 1", "bold 2")
    assert len(find_cases(tmp_path, volumes="apart").cases) == 3


def test_bids_subject() -> None:
    assert subject_from_name("data/sub-A1/ses-2/anat/sub-A1_T1w.nii.gz") == "A1"
    assert subject_from_name("data/subject/x.nii") == ""


DEEP = "[" * 200_000


@pytest.mark.parametrize("keys", ["hmac", "names"])
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("list.csv", b"image\n" + b"x" * 300 + b".nii.gz\ns.nii.gz\n", None),
        ("list.csv", b"image\n" + b"x/" * 3000 + b"x.nii.gz\ns.nii.gz\n", None),
        ("list.csv", b"image\na\0b.nii.gz\ns.nii.gz\n", None),
        (
            "list.csv",
            b"image,source\ns.nii.gz," + b"x" * 200_000,
            "after line 1: not readable",
        ),
        ("dataset.json", DEEP.encode(), None),
        ("pretrain_data.json", DEEP.encode(), None),
        ("splits_final.json", DEEP.encode(), "nested too deep"),
        ("imagesTr/../dataset.json", DEEP.encode(), "nested too deep"),
        ("dataset.json", b'{"training": [{"image": "\\ud800.nii", "label": "x"}]}', None),
    ],
)
def test_strange_lists_end_in_words(
    name: str, content: bytes, told: str | None, keys: str, tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "in"
    save(folder / "s.nii.gz", scan(np.random.default_rng(seed)))
    if "imagesTr" in name:
        for sub in ("imagesTr", "labelsTr"):
            save(folder / sub / "a_0000.nii.gz", ras_array())
    (folder / name).write_bytes(content)
    source = folder / name if name.endswith(".csv") else folder
    settings = PrepSettings(input=source, output=tmp_path / "c", processes=1, keys=keys)  # type: ignore[arg-type]
    if told is None:
        result = prep(settings, say=lambda line: None)
        left_out = {"missing_file": 1} if name.endswith(".csv") else {}
        assert (result.samples, result.rejected) == (1, left_out)
    else:
        with pytest.raises(InputError, match=told):
            prep(settings, say=lambda line: None)


def test_meta_csv_of_another_encoding_and_with_short_rows(tmp_path: Path) -> None:
    for name in (b"s1", b"M\xfcller"):
        folder = tmp_path / os.fsdecode(name)
        save(folder / "ct.nii.gz", ras_array())
        save(folder / "segmentations" / "liver.nii.gz", (ras_array() > 500).astype(np.uint8))
    meta = b"split;image_id;note\ntest;s1;M\xfcller\nval\n;;\ntrain;M\xfcller;\n"
    (tmp_path / "meta.csv").write_bytes(meta)
    layout = find_cases(tmp_path)
    assert {case.id: case.split for case in layout.cases} == {
        "s1": "test",
        os.fsdecode(b"M\xfcller"): "train",
    }
    assert not layout.left_out
    (tmp_path / "meta.csv").write_text("image_id,note\ns1," + "x" * 200_000)
    with pytest.raises(InputError, match=r"meta\.csv: not readable as CSV"):
        find_cases(tmp_path)


def test_scans_behind_links_are_found_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("far/scan.nii.gz", "in/own.nii.gz", "in/._own.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "far")
    assert scan_files(tmp_path / "in") == [Path("linked/scan.nii.gz"), Path("own.nii.gz")]
