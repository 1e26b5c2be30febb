"""The page of a corpus: all of its books, pictures inside, and no name where names are replaced."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.preprocess import as_physical, resample
from data_prep.settings import PrepSettings
from data_prep.volume import read_nifti
from voxelith import main

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads, a CT, a copy, a letter and a flat scan."""
    place = tmp_path_factory.mktemp("in")
    for name in ("ixi/IXI013-HH-1212_T1.nii.gz", "ixi/IXI014-HH-1236_T1.nii.gz"):
        (place / Path(name).name).symlink_to(SAMPLES / name)
    (place / "chest.nii.gz").symlink_to(SAMPLES / "fnndsc" / "FNNDSC_andrei_abdomen_3mm.nii.gz")
    copy = resample(as_physical(read_nifti(place / "IXI013-HH-1212_T1.nii.gz")), (2.5, 2.5, 2.5))
    nib.save(nib.Nifti1Image(copy.array[0], copy.affine), place / "zcopy.nii.gz")
    (place / "letter.nii.gz").write_bytes(b"Dear patient")
    nib.save(nib.Nifti1Image(np.full((9, 9, 9), 3, np.int16), np.eye(4)), place / "flat.nii.gz")
    return place


@pytest.mark.parametrize("keys", ["names", "hmac"])
def test_the_page_has_the_books_of_a_corpus(keys: str, folder: Path, tmp_path: Path) -> None:
    corpus_path, page = tmp_path / "c", tmp_path / "page.html"
    settings = PrepSettings(input=folder, output=corpus_path, keys=keys, processes=1)
    prep(settings, say=lambda line: None)
    assert main(["report", str(corpus_path), f"output={page}"]) == 0
    text = page.read_text()
    corpus = Corpus.open(corpus_path)
    assert len(corpus) == 3 and corpus.index_hash[:16] in text
    counts = corpus.info["counts"]
    assert counts["rejected"] == {"constant": 1, "near_duplicate": 1, "not_an_image": 1}
    for code, number in counts["rejected"].items():
        assert f'<td>{code}</td><td class="n">{number}</td>' in text
    for number in counts["files"].values():
        assert f'<td class="n">{number}</td>' in text
    # The copy beside its original, slices, sizes, intensities; nothing from a network.
    pictures = re.findall(r'<img src="data:image/(png|svg\+xml);base64,([^"]+)"', text)
    assert [kind for kind, _ in pictures] == ["png", "png", "svg+xml", "svg+xml"]
    assert not re.search(r"(?:src|href)=.(?!data:)", text)
    assert ("letter.nii.gz" in text) == (keys == "names")
    assert ("of quarantine.csv" in text) == (keys == "hmac")
    # Its owner's page has names, and only the owner reads it.
    mine = corpus_path.with_name("c.private") / "report.html"
    assert main(["report", str(corpus_path), f"output={mine}"]) == 0
    assert "letter.nii.gz: " in mine.read_text() and mine.stat().st_mode & 0o077 == 0
    drawn = [base64.b64decode(data).decode() for kind, data in pictures if "svg" in kind]
    # Shape, spacing and extent along each axis; volumes, and intensities of CT and MR.
    assert [svg.count('id="axes_') for svg in drawn] == [9, 3]
    # Without the private folder there are counts alone.
    shutil.rmtree(mine.parent)
    assert main(["report", str(corpus_path), f"output={page}"]) == 0
    assert "not_an_image" in page.read_text() and "letter.nii.gz" not in page.read_text()
    assert str(folder) not in text
