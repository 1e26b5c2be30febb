from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantoms import save, scan
from seeds import SEED

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.folds import make_folds, read_folds, split, splits_of_folds
from data_prep.settings import PrepSettings, SplitSettings

FOLDS = 5
SUBJECTS = [f"s{i // 2:02d}" for i in range(80)]
KEYS = [f"k{i:03d}" for i in range(80)]


def labels(seed: int = 0) -> list[dict[int, float]]:
    """40 subjects of two cases: all have class 1 of any size, ten have class 2, five class 3."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(3, 1, 40)
    return [
        {1: size[i // 2]} | ({2: 1.0} if i // 2 % 4 == 0 else {}) | ({3: 1.0} if i < 10 else {})
        for i in range(80)
    ]


def validators(splits: list[dict[str, Any]]) -> list[list[str]]:
    return [split["parts"]["validation"] for split in splits]


def test_folds_partition_the_cases_by_subject(seed: int) -> None:
    splits = make_folds(KEYS, SUBJECTS, labels(seed), FOLDS, seed)
    assert [split["name"] for split in splits] == [f"fold-{n}" for n in range(FOLDS)]
    assert sorted(key for part in validators(splits) for key in part) == KEYS
    of = dict(zip(KEYS, SUBJECTS, strict=True))
    for split_ in splits:
        parts = split_["parts"]
        assert sorted(parts["train"] + parts["validation"]) == KEYS
        assert not {of[k] for k in parts["train"]} & {of[k] for k in parts["validation"]}


def test_folds_share_rare_classes_and_label_volume(seed: int) -> None:
    content = labels(seed)
    splits = make_folds(KEYS, SUBJECTS, content, FOLDS, seed)
    where = {k: n for n, part in enumerate(validators(splits)) for k in part}
    for value, each in ((1, 16), (2, 4), (3, 2)):
        having = Counter(where[k] for k, c in zip(KEYS, content, strict=True) if value in c)
        assert having == dict.fromkeys(range(FOLDS), each)


def test_folds_share_label_volume(seed: int) -> None:
    """Where all subjects have the same classes, each block of five largest fills all folds."""
    size = np.random.default_rng(seed).lognormal(3, 1, 40)
    content: list[dict[int, float]] = [{1: size[i // 2]} for i in range(80)]
    splits = make_folds(KEYS, SUBJECTS, content, FOLDS, seed)
    where = {k: n for n, part in enumerate(validators(splits)) for k in part}
    largest = np.argsort(-size)
    for block in largest.reshape(-1, FOLDS):
        assert len({where[KEYS[2 * s]] for s in block}) == FOLDS


def test_folds_depend_on_the_set_and_the_seed_alone(seed: int) -> None:
    content = labels(seed)
    one = make_folds(KEYS, SUBJECTS, content, FOLDS, seed)
    order = np.random.default_rng(seed).permutation(80)
    other = make_folds(
        [KEYS[i] for i in order],
        [SUBJECTS[i] for i in order],
        [content[i] for i in order],
        FOLDS,
        seed,
    )
    assert one == other
    assert make_folds(KEYS, SUBJECTS, content, FOLDS, seed + 1) != one


def test_subjects_that_are_kept_stay_when_others_come(seed: int) -> None:
    content = labels(seed)
    old = make_folds(KEYS[:60], SUBJECTS[:60], content[:60], FOLDS, seed)
    of = dict(zip(KEYS, SUBJECTS, strict=True))
    keep = {of[k]: n for n, part in enumerate(validators(old)) for k in part}
    new = make_folds(KEYS, SUBJECTS, content, FOLDS, seed, keep=keep)
    for before, after in zip(validators(old), validators(new), strict=True):
        assert set(before) <= set(after)
        assert len(after) == 16


def test_an_official_test_part_is_in_no_fold(seed: int) -> None:
    splits = make_folds(KEYS, SUBJECTS, labels(seed), 3, seed, test=KEYS[:8])
    for split_ in splits:
        assert split_["parts"]["test"] == KEYS[:8]
    assert sorted(key for part in validators(splits) for key in part) == KEYS[8:]
    assert [len(part) for part in validators(splits)] == [24, 24, 24]


def test_more_folds_than_subjects_are_refused() -> None:
    with pytest.raises(InputError, match="there are 2 subjects"):
        make_folds(KEYS[:4], SUBJECTS[:4], labels()[:4], 3)


def test_given_folds_are_taken_as_they_are() -> None:
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "a"], "val": ["b"]}]
    key_of = {"a": "k1", "b": "k2", "c": "k3"}
    # b became no sample: it is left out, and nothing else moves.
    one, two = splits_of_folds(folds, key_of, ["k1", "k3"], ["s1", "s3"])
    assert (one["parts"]["train"], one["parts"]["validation"]) == (["k1"], ["k3"])
    assert (two["parts"]["train"], two["parts"]["validation"]) == (["k1", "k3"], [])


def test_given_folds_that_cannot_be_believed_are_refused() -> None:
    folds = [{"train": ["a", "b"], "val": ["b", "z"]}, {"train": ["a"], "val": ["c"]}]
    key_of = {name: name for name in "abc"}
    with pytest.raises(InputError) as caught:
        splits_of_folds(folds, key_of, ["a", "b", "c"], ["patient1", "patient2", "patient1"])
    text = "\n".join(caught.value.problems)
    assert "fold 0: 1 cases are not in the input (z)" in text
    assert "fold 0: b train and validate both" in text
    assert "fold-1" in text and "patient1" in text


@pytest.fixture
def nnunet(tmp_path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    root = tmp_path / "D"
    cases = [f"p{n}_f{frame}" for n in range(4) for frame in range(2)]
    for case in cases:
        save(root / "imagesTr" / f"{case}_0000.nii.gz", scan(rng))
        save(root / "labelsTr" / f"{case}.nii.gz", rng.integers(0, 3, (12, 10, 14), np.uint8))
    described = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1, "b": 2}}
    (root / "dataset.json").write_text(json.dumps(described))
    folds = [
        {"train": cases[2:], "val": cases[:2]},
        {"train": cases[:6], "val": cases[6:]},
    ]
    (root / "splits_final.json").write_text(json.dumps(folds))
    return root


def test_an_unlabelled_namesake_takes_no_part_in_folds(nnunet: Path, tmp_path: Path) -> None:
    """nnU-Net numbers the cases of imagesTs anew."""
    (nnunet / "imagesTs").mkdir()
    scan = nnunet / "imagesTr" / "p0_f0_0000.nii.gz"
    save(nnunet / "imagesTs" / scan.name, np.asarray(nib.load(scan).dataobj)[::-1])
    assert {"fold-0", "fold-1"} <= set(make(nnunet, tmp_path / "c").splits)


def make(source: Path, output: Path, **options: Any) -> Corpus:
    prep(PrepSettings(input=source, output=output, processes=1, **options), say=lambda line: None)
    return Corpus.open(output)


@pytest.mark.parametrize("keys", ["names", "hmac"])
def test_nnunets_folds_come_in_and_go_out(nnunet: Path, tmp_path: Path, keys: str) -> None:
    corpus = make(nnunet, tmp_path / "c", keys=keys, subjects="^p[0-9]")
    assert corpus.splits == ["default", "fold-0", "fold-1"]
    split(SplitSettings(corpus=tmp_path / "c", write=tmp_path / "out.json"), say=lambda line: None)
    given, written = (read_folds(p) for p in (nnunet / "splits_final.json", tmp_path / "out.json"))
    assert written == given
    # The same folds again are no change; others are refused, for runs may rest on these.
    again = SplitSettings(corpus=tmp_path / "c", read=tmp_path / "out.json")
    assert split(again, say=lambda line: None) == ["fold-0", "fold-1"]
    with pytest.raises(InputError, match="fold-0, fold-1 would change"):
        split(SplitSettings(corpus=tmp_path / "c", folds=2), say=lambda line: None)


def test_prep_refuses_folds_that_tear_a_subject(nnunet: Path, tmp_path: Path) -> None:
    folds = read_folds(nnunet / "splits_final.json")
    folds[0]["train"].append(folds[0]["val"].pop())
    (nnunet / "splits_final.json").write_text(json.dumps(folds))
    with pytest.raises(InputError, match=r"fold-0: 1 subjects are in more than one part \(p0\)"):
        make(nnunet, tmp_path / "c", keys="names", subjects="^p[0-9]")
    # It is seen before any scan is read, together with whatever else is wrong.
    with pytest.raises(InputError) as caught:
        make(nnunet, tmp_path / "c", subjects="^p[0-9]", classes={1: "a", 2: "a"})
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "c").exists()


def test_drawn_folds_are_frozen_and_kept(nnunet: Path, tmp_path: Path) -> None:
    (nnunet / "splits_final.json").unlink()
    options = {"keys": "names", "subjects": "^p[0-9]"}
    corpus = make(nnunet, tmp_path / "c", **options)
    drawn = SplitSettings(corpus=tmp_path / "c", folds=2)
    assert split(drawn, say=lambda line: None) == ["fold-0", "fold-1"]
    first = [corpus.split(f"fold-{n}")["parts"]["validation"] for n in range(2)]
    assert [len(part) for part in first] == [4, 4]
    rng = np.random.default_rng(SEED + 5)
    for case in ("p0a_f0", "p9_f0"):
        save(nnunet / "imagesTr" / f"{case}_0000.nii.gz", scan(rng))
        save(nnunet / "labelsTr" / f"{case}.nii.gz", rng.integers(0, 3, (12, 10, 14), np.uint8))
    corpus = make(nnunet, tmp_path / "d", **options)
    split(SplitSettings(corpus=tmp_path / "d", folds=2, keep=tmp_path / "c"), say=lambda line: None)
    for n in range(2):
        assert set(first[n]) <= set(corpus.split(f"fold-{n}")["parts"]["validation"])


def test_hashed_keys_need_their_map(nnunet: Path, tmp_path: Path) -> None:
    make(nnunet, tmp_path / "c")
    shutil.rmtree(tmp_path / "c.private")
    with pytest.raises(InputError, match="only the key map"):
        split(SplitSettings(corpus=tmp_path / "c", write=tmp_path / "o"), say=lambda line: None)


def test_a_file_that_holds_no_folds(tmp_path: Path) -> None:
    for text in ("{", "[]", '[{"train": ["a"]}]', "3"):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(InputError, match=r"f\.json"):
            read_folds(tmp_path / "f.json")


def test_ids_that_several_cases_share_are_refused(tmp_path: Path) -> None:
    """Folds go by them: all but one of the cases would be in none."""
    rng = np.random.default_rng(SEED)
    rows = ["image,label,subject"]
    for n in range(6):
        save(tmp_path / f"p{n}" / "img.nii.gz", scan(rng))
        save(tmp_path / f"p{n}" / "seg.nii.gz", (scan(rng) > 450).astype(np.uint8))
        rows.append(f"p{n}/img.nii.gz,p{n}/seg.nii.gz,s{n}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    prep(PrepSettings(input=tmp_path / "list.csv", output=tmp_path / "c", processes=1))
    assert len(split(SplitSettings(corpus=tmp_path / "c", folds=2))) == 2
    with pytest.raises(InputError, match="case ids img: each is that of several cases"):
        split(SplitSettings(corpus=tmp_path / "c", write=tmp_path / "folds.json"))
    (tmp_path / "given.json").write_text('[{"train": ["img"], "val": []}]')
    with pytest.raises(InputError, match="case ids img"):
        split(SplitSettings(corpus=tmp_path / "c", read=tmp_path / "given.json"))
    assert not (tmp_path / "folds.json").exists()
