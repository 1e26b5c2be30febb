"""A finetuned network leaves its run as a release, and labels whoever's scans alike from both."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import SEED
from small_runs import add_split, write_encoder

import voxelith
from data_prep.corpus import Corpus
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from data_prep.preprocess import Preprocess
from data_prep.volume import read_nifti
from finetune.describe import as_text, describe
from finetune.evaluate import comparable, evaluate
from finetune.export import UNKNOWN
from finetune.export import export_run as export
from finetune.model_file import check_golden_network, load_network, write_network
from finetune.predict import predict
from finetune.rows import read_rows
from finetune.segmentation import Segmentation
from finetune.segmenter import Segmenter
from finetune.settings import EvaluateSettings, FinetuneSettings, PredictSettings, TaskSettings
from finetune.train import build_model, finetune, make_plan
from pretrain.arguments import build_backbone
from pretrain.backbones.slice_vit import SliceViT
from pretrain.manifest import DECODER, FILES
from pretrain.release import Release, load_release

ROOT = Path(__file__).parents[2]
TASK: dict[str, Any] = {
    "name": "hippocampus",
    "classes": [
        {"name": "anterior", "values": [1], "tolerance_mm": 1.0},
        {"name": "posterior", "values": [2], "tolerance_mm": 1.0},
    ],
    "flip": [False, False, True],
}
BACKBONE: dict[str, Any] = {
    "name": "resenc.ResEncUNetEncoder",
    "args": {"in_channels": 1, "features": [4, 8], "strides": [1, 2], "blocks": [1, 1]},
}


def encoder_release(output: Path, prints: list[str], licence: dict[str, int]) -> Path:
    data = {"samples": 7, "source": {"x": 7}, "licence": licence, "modality": {"MR": 7}}
    return write_encoder(output, BACKBONE, prints=prints, data=data)


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Corpus:
    add_split(labelled_corpus, "duo", 4, 2)
    return Corpus.open(labelled_corpus)


@pytest.fixture(scope="module")
def start(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    seen = corpus.fingerprints()[corpus.split("duo")["parts"]["test"][0]]
    folder = tmp_path_factory.mktemp("start") / "tiny-mae"
    return encoder_release(folder, [seen], {"CC BY-NC-SA 4.0": 7})


def settings(corpus: Corpus, ckpt: Path, runs: Path, **changes: Any) -> FinetuneSettings:
    chosen = {
        "task": TASK, "corpus": corpus.path, "ckpt": ckpt, "labels": 2, "split": "duo",
        "runs": runs, "run": "r", "steps": 2, "batch_size": 2, "lr": 1e-2, "warmup": 0,
        "crop_size": [16, 24, 16], "overlap": 0.25, "tta": True,
        "trainer": {"accelerator": "cpu", "precision": "32-true", "workers": 0},
    }  # fmt: skip
    return FinetuneSettings.model_validate(chosen | changes)


@pytest.fixture(scope="module")
def run(corpus: Corpus, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(settings(corpus, start, tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return export(run, tmp_path_factory.mktemp("releases") / "mine")


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release.path, tmp_path / "copy"))


def asked(ckpt: Path, source: Path, output: Path, **changes: Any) -> PredictSettings:
    return PredictSettings(ckpt=ckpt, input=source, output=output, device="cpu", **changes)


def resign(path: Path) -> None:
    lines = [f"{file_digest(path / name)}  {name}\n" for name in (*FILES, DECODER)]
    (path / "SHA256SUMS").write_text("".join(lines))


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    resign(path)


# Predicting.


def test_run_and_release_give_what_was_scored(
    run: Path, release: Release, samples: Path, tmp_path: Path
) -> None:
    key = read_rows(run / "rows.csv")[0].case
    source = samples / "hippocampus/images" / f"{key}.nii.gz"
    (tmp_path / "in/deep").mkdir(parents=True)
    shutil.copy(source, tmp_path / "in/deep/scan.nii.gz")
    (tmp_path / "in/broken.nii.gz").write_bytes(b"no image")
    expected = nib.load(run / "predictions" / f"{key}.nii.gz").get_fdata()
    assert len(np.unique(expected)) > 1
    for ckpt in (run, release.path):
        output = tmp_path / "out" / ckpt.name
        done = predict(asked(ckpt, tmp_path / "in", output))
        assert [path.name for path in done.written] == ["scan.nii.gz"]
        assert list(done.left_out) == ["broken.nii.gz"]
        found = nib.load(output / "deep/scan.nii.gz")
        assert np.array_equal(found.get_fdata(), expected)
        assert np.array_equal(found.affine, nib.load(source).affine)


def test_scans_that_were_left_out_are_named_and_are_wrong_input(
    run: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many others were done; those are kept, and a program gets its result."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    words = ["predict", f"ckpt={run}", f"input={source}", f"output={output}", "device=cpu"]
    shutil.copy(samples / "hippocampus/images/hippocampus_019.nii.gz", source)
    assert voxelith.main(words) == 0
    assert capsys.readouterr().err.count("error") == 0
    for name in ("a.nii.gz", "z.nii"):
        (source / name).write_bytes(b"no image")
    assert voxelith.main([*words, "--json"]) == 2
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["written"] == 1 and list(result["left_out"]) == ["a.nii.gz", "z.nii"]
    assert nib.load(output / "hippocampus_019.nii.gz").get_fdata().ndim == 3
    last = said.err.strip().splitlines()[-3:]
    assert last[0] == "error: 2 problems"
    assert f"{source / 'a.nii.gz'}: not_an_image" in last[1] and "z.nii" in last[2]
    (source / "z.nii").unlink()
    assert voxelith.main(words) == 2
    assert f"error: {source / 'a.nii.gz'}: not_an_image" in capsys.readouterr().err


def test_tta_batch_and_precision_are_those_asked_for(
    run: Path, samples: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(samples / "hippocampus/images/hippocampus_019.nii.gz", source)

    def found(name: str, **changes: Any) -> np.ndarray:
        (path,) = predict(asked(run, source, tmp_path / name, **changes)).written
        return np.asarray(nib.load(path).dataobj)

    scored = found("scored")
    assert np.array_equal(scored, found("tta", tta=True))  # what the run was scored with
    assert np.array_equal(scored, found("batch", window_batch=5))
    plain, half = found("plain", tta=False), found("half", precision="bf16-mixed")
    assert 0 < (plain != scored).mean() < 0.5  # of a network that has hardly learnt
    assert 0 < (half != scored).mean() < 0.2


def test_layers_run_in_half_precision_where_asked(run: Path) -> None:
    segmenter = load_network(run, "cpu")
    seen = []
    segmenter.model.encoder.register_forward_hook(lambda m, i, out: seen.append(out[0].dtype))
    volume = read_nifti(run / f"predictions/{read_rows(run / 'rows.csv')[0].case}.nii.gz")
    for precision, dtype in (
        ("32-true", torch.float32), ("auto", torch.float32), ("bf16-mixed", torch.bfloat16),
    ):  # fmt: skip
        seen.clear()

        scores = replace(segmenter, precision=precision).scores(volume)
        assert set(seen) == {dtype} and scores.dtype == torch.float32


def test_an_output_that_is_there_is_left_or_replaced(
    run: Path, samples: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    for name in ("hippocampus_019", "hippocampus_023"):
        scan = next((samples / "hippocampus/images").glob(f"{name}*"), None)
        scan = scan or sorted((samples / "hippocampus/images").glob("*.nii.gz"))[0]
        shutil.copy(scan, source / f"{name}.nii.gz")
    (output / "hippocampus_019.nii.gz").write_bytes(b"mine")
    done = predict(asked(run, source, output, resume=True))
    assert [path.name for path in done.there] == ["hippocampus_019.nii.gz"]
    assert [path.name for path in done.written] == ["hippocampus_023.nii.gz"]
    assert (output / "hippocampus_019.nii.gz").read_bytes() == b"mine"
    assert len(predict(asked(run, source, output)).written) == 2
    assert nib.load(output / "hippocampus_019.nii.gz").get_fdata().ndim == 3


def test_predict_refuses_what_it_cannot_do(run: Path, start: Path, tmp_path: Path) -> None:
    out = tmp_path.parent / "out-of-it"
    with pytest.raises(InputError, match="no such folder"):
        predict(asked(run, tmp_path / "none", out))
    with pytest.raises(InputError, match="holds no"):
        predict(asked(run, tmp_path, out))
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="lies in the input folder"):
        predict(asked(run, tmp_path, tmp_path / "out"))
    with pytest.raises(InputError, match="is the release of an encoder"):
        predict(asked(start, tmp_path, out))
    with pytest.raises(InputError, match="neither a finished finetune run"):
        predict(asked(tmp_path, tmp_path, out))


def phantom(axcodes: str, tilt: float, codes: tuple[int, int]) -> nib.Nifti1Image:
    """The same asymmetric body, stored in these axes: bright in one corner, a bar, a gradient."""
    shape = (26, 31, 21)  # along R, A, S
    grid = np.indices(shape) / np.array(shape)[:, None, None, None]
    values = 300 * grid[0] + 120 * grid[1] - 200 * grid[2]
    values[18:24, 3:9, 2:7] += 900
    values[3:22, 24:27, 14:17] += 500
    turn = np.array(
        [[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1.0]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.25, 0.75, 2.5])
    affine[:3, 3] = [-12.5, 33.25, 7.75]
    image = nib.Nifti1Image(np.rint(values).astype(np.int16), affine)
    start = nib.io_orientation(image.affine)
    wanted = nib.orientations.axcodes2ornt(tuple(axcodes))
    image = image.as_reoriented(nib.orientations.ornt_transform(start, wanted))
    affine = image.affine
    image.set_qform(affine, code=codes[0])
    image.set_sform(affine, code=codes[1])
    return image


def body_segmenter(channels: int, folder: Path) -> Segmenter:
    """A network whose classes all occur: its outputs are evened out on the phantom."""
    torch.manual_seed(SEED + 3)
    args = {**BACKBONE["args"], "in_channels": channels}
    encoder = build_backbone(BACKBONE["name"], args, "test")
    task = TaskSettings.model_validate(TASK)
    model = Segmentation(encoder=encoder, task=task).eval()
    segmenter = Segmenter(model, Preprocess.default(), task, (32, 32, 32), 0.5, ("MR",))
    nib.save(phantom("RAS", 0, (1, 1)), folder / "even.nii.gz")
    volume = read_nifti(folder / "even.nii.gz", "MR")

    if channels > 1:
        volume = replace(
            volume,
            array=np.repeat(volume.array, channels, 0),
            modality=("MR",) * channels,
            names=("MR",) * channels,
            slope=volume.slope * channels,
            intercept=volume.intercept * channels,
        )
    middle = segmenter.scores(volume).flatten(1).median(1).values
    with torch.no_grad():
        model.decoder.head.bias -= middle
    run = folder / "body"
    run.mkdir()
    write_network(segmenter, {"name": BACKBONE["name"], "args": args}, "auto", run)
    return segmenter


def test_labels_lie_on_the_very_grid_of_the_scan(tmp_path: Path) -> None:
    """Headers as the scan's, and the same place in the body whatever the axes it is stored in."""
    body_segmenter(1, tmp_path)
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    kinds = [
        ("RAS", 0.0, (1, 1)), ("LPS", 0.0, (0, 2)), ("PIR", 0.0, (1, 0)), ("ASL", 0.0, (2, 1)),
        ("SPL", 0.3, (1, 1)), ("RAS", 0.3, (1, 1)), ("LIP", 0.3, (0, 1)), ("IRA", 0.3, (1, 0)),
    ]  # fmt: skip
    for axcodes, tilt, codes in kinds:
        image = phantom(axcodes, tilt, codes)
        nib.save(image, source / f"{axcodes}-{tilt}.nii.gz")
    predict(asked(tmp_path / "body", source, output))
    first: dict[float, np.ndarray] = {}
    for axcodes, tilt, codes in kinds:
        name = f"{axcodes}-{tilt}.nii.gz"
        scan, found = nib.load(source / name), nib.load(output / name)
        assert "".join(nib.aff2axcodes(found.affine)) == axcodes
        assert found.shape == scan.shape and found.get_data_dtype() == np.uint8
        assert (int(found.header["qform_code"]), int(found.header["sform_code"])) == codes
        if codes[1]:
            assert np.array_equal(found.get_sform(), scan.get_sform())
        np.testing.assert_allclose(found.affine, scan.affine, atol=1e-5)
        np.testing.assert_allclose(found.get_qform(), scan.get_qform(), atol=1e-5)
        assert found.header.get_zooms() == scan.header.get_zooms()
        turned = np.asarray(nib.as_closest_canonical(found).dataobj)
        expected = first.setdefault(tilt, turned)
        assert np.array_equal(turned, expected)
        assert (np.bincount(turned.ravel(), minlength=3) > 0.05 * turned.size).all()
        flips = [turned[::-1], turned[:, ::-1], turned[:, :, ::-1]]
        assert all((other != turned).mean() > 0.1 for other in flips)


def test_channels_of_a_case_are_read_together(tmp_path: Path) -> None:
    segmenter = body_segmenter(2, tmp_path)
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    one, other = phantom("LPS", 0.0, (1, 1)), phantom("LPS", 0.0, (1, 1))
    other = nib.Nifti1Image(np.asarray(other.dataobj)[::-1].copy(), other.affine)
    for name, first, second in (("a", one, other), ("b", other, one)):
        nib.save(first, source / f"sub/{name}_0000.nii.gz")
        nib.save(second, source / f"sub/{name}_0001.nii.gz")
    nib.save(one, source / "alone_0000.nii.gz")
    nib.save(one, source / "plain.nii.gz")
    nib.save(one, source / "odd_0000.nii.gz")
    nib.save(phantom("LPS", 0.3, (1, 1)), source / "odd_0001.nii.gz")
    done = predict(asked(tmp_path / "body", source, output))
    names = [str(path.relative_to(output)) for path in done.written]
    assert names == ["sub/a.nii.gz", "sub/b.nii.gz"]
    assert done.left_out["alone.nii.gz"].startswith("channels: it has 0000, the network takes 0000")
    assert "NAME_0000.nii.gz" in done.left_out["plain.nii.gz"]
    assert done.left_out["odd.nii.gz"].startswith("channel_geometry_mismatch")
    a, b = (np.asarray(nib.load(path).dataobj) for path in done.written)
    assert (a != b).mean() > 0.05  # the order of channels counts
    volume = read_nifti(source / "sub/a_0000.nii.gz", "MR")
    second = read_nifti(source / "sub/a_0001.nii.gz", "MR")

    both = replace(
        volume,
        array=np.concatenate([volume.array, second.array]),
        modality=("MR",) * 2, names=("MR",) * 2, slope=(1.0,) * 2, intercept=(0.0,) * 2,
    )  # fmt: skip
    assert np.array_equal(volume.native.to_native(segmenter.segment(both)), a)


def test_results_of_one_name_are_refused_before_any_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body_segmenter(1, tmp_path)
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    for name in ("a.mha", "a.nii.gz", "a.nrrd", "b.nii.gz", "b.nii", "deep/a.nii.gz"):
        (source / name).write_bytes(b"")
    words = [f"ckpt={tmp_path / 'body'}", f"input={source}", f"output={output}", "device=cpu"]
    for more in ([], ["resume=true"]):
        assert voxelith.main(["predict", *words, *more]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith(
            f"error: input={source}: a.mha, a.nii.gz, a.nrrd would all become "
            f"{output / 'a.nii.gz'}; rename all but one"
        )
    assert not output.exists()


def test_a_scan_that_becomes_too_large_is_left_out_and_the_rest_is_done(tmp_path: Path) -> None:
    segmenter = replace(body_segmenter(1, tmp_path), preprocess=Preprocess.default((1.0, 1.0, 1.0)))
    write_network(segmenter, BACKBONE, "auto", tmp_path / "body")
    source = tmp_path / "in"
    source.mkdir()
    nib.save(phantom("RAS", 0, (1, 1)), source / "b.nii.gz")
    values = np.arange(60**3).reshape(60, 60, 60) % 900
    vast = nib.Nifti1Image(values.astype(np.int16), np.diag([100.0, 100.0, 100.0, 1.0]))
    nib.save(vast, source / "a.nii.gz")
    found = predict(asked(tmp_path / "body", source, tmp_path / "out"))
    assert [path.name for path in found.written] == ["b.nii.gz"]
    assert list(found.left_out) == ["a.nii.gz"]
    assert "too_large: (60, 60, 60) voxels become [6000, 6000, 6000]" in found.left_out["a.nii.gz"]


@pytest.mark.parametrize("name", ["predictions", "answers.csv"])
def test_what_other_weights_answered_goes_before_new_weights_come(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is killed between the two would leave answers of the one beside the other."""
    segmenter, folder = body_segmenter(1, tmp_path), tmp_path / "body"
    answered = folder / name
    if name == "predictions":
        answered.mkdir()
        (answered / "a.nii.gz").write_bytes(b"")
    else:
        answered.write_text("")
    write_network(segmenter, BACKBONE, "auto", folder, answered)
    assert answered.exists()
    (folder / "model.safetensors").write_bytes(b"of a start whose last checkpoint was lost")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.model_file.write_bytes", kill)
    with pytest.raises(KeyboardInterrupt):
        write_network(segmenter, BACKBONE, "auto", folder, answered)
    assert not answered.exists()


# The release.


def test_a_release_is_an_encoder_as_well(run: Path, release: Release, samples: Path) -> None:
    assert release.kind == "segmenter" and release.has_decoder and release.transfers == "network"
    stored = load_file(run / "model.safetensors")
    parts = {
        "encoder.": load_file(release.path / "model.safetensors"),
        "decoder.": load_file(release.path / DECODER),
    }
    joined = {prefix + name: v for prefix, part in parts.items() for name, v in part.items()}
    assert joined.keys() == stored.keys()
    assert all(torch.equal(joined[name], stored[name]) for name in stored)
    assert any(name.startswith("decoder.head") for name in joined)
    features = voxelith.load_encoder(release.path).features(
        release.path / "golden_input.nii.gz", modality="MR"
    )
    golden = load_file(release.path / "golden_output.safetensors")
    np.testing.assert_allclose(features.map, golden["map"], rtol=1e-4, atol=1e-5)
    assert golden["scores"].shape[0] == 3
    assert check_golden_network(release.path) <= 1e-5


def test_a_network_of_two_channels_is_exported_too(run: Path, tmp_path: Path) -> None:
    """Its golden scan is both channels; features of a case come from its files."""
    segmenter = body_segmenter(2, tmp_path)
    copy = Path(shutil.copytree(run, tmp_path / "two"))
    write_network(
        segmenter, {**BACKBONE, "args": {**BACKBONE["args"], "in_channels": 2}}, "auto", copy
    )
    release = export(copy, tmp_path / "release")
    assert check_golden_network(release.path) <= 1e-5
    scan = release.path / "golden_input.nii.gz"
    encoder = voxelith.load_encoder(release.path)
    golden = load_file(release.path / "golden_output.safetensors")
    found = encoder.features([scan, str(scan)], modality="MR")
    np.testing.assert_allclose(found.vector, golden["vector"], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="1 channels found, this encoder takes 2"):
        encoder.features(scan, modality="MR")


def test_the_same_run_gives_the_same_release(run: Path, release: Release, tmp_path: Path) -> None:
    assert export(run, tmp_path / "mine").digest == release.digest


def test_all_that_was_seen_is_told(
    run: Path, release: Release, corpus: Corpus, start: Path
) -> None:
    facts = json.loads((run / "run.json").read_text())
    prints = corpus.scan_prints()
    finetuned = set().union(*(prints[key] for key in facts["label_keys"]))
    assert release.fingerprints == finetuned | load_release(start).fingerprints
    config = release.config
    assert config["training"]["began_from"]["digest"] == load_release(start).digest
    assert config["data"]["samples"] == 7 + 2
    assert config["data"]["licence"]["CC BY-NC-SA 4.0"] == 7
    assert sum(config["data"]["licence"].values()) == 9
    rows = read_rows(run / "rows.csv")
    scores = config["training"]["scores"]
    assert (scores["cases"], scores["tainted"]) == (2, 1)
    clean = [r.dsc for r in rows if r.class_name == "anterior" and r.status != "tainted"]
    assert scores["classes"]["anterior"] == {"dice": pytest.approx(clean[0]), "cases": 1}
    card = (release.path / "README.md").read_text()
    assert "**Strictest licence of the training data: CC BY-NC-SA 4.0.**" in card
    assert "| 1 | anterior | 1 |" in card and "Left out: 1 cases" in card
    text = card + (release.path / "config.json").read_text()
    assert str(run.parent) not in text and str(corpus.path) not in text


def test_a_card_gives_the_scores_of_regions_to_regions(
    start: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """Classes are what is written, regions what was scored, whatever their names."""
    regions = [{"name": "anterior", "values": [1, 2], "tolerance_mm": 1.0}]
    run = finetune(settings(corpus, start, tmp_path, task={**TASK, "regions": regions}))
    card = (export(run, tmp_path / "out").path / "README.md").read_text()
    assert "| 1 | anterior | 1 | none | 0 |" in card
    assert re.search(r"\| – \| anterior \| 1, 2 \| [0-9.]+ \| 1 \|", card)


def test_what_pretraining_saw_stays_unknown(corpus: Corpus, tmp_path: Path) -> None:
    """Its own cases do not make a foreign checkpoint one whose data are known."""
    foreign = encoder_release(tmp_path / "foreign", [], {})
    made = finetune(settings(corpus, foreign, tmp_path / "runs", tta=False, overlap=0.0))
    release = export(made, tmp_path / "out")
    assert UNKNOWN in release.fingerprints
    assert comparable(release.fingerprints) is None
    shutil.rmtree(foreign)
    with pytest.raises(InputError, match="no such release"):
        export(made, tmp_path / "again")


def test_licences_of_what_the_checkpoint_began_from_are_told(
    corpus: Corpus, tmp_path: Path
) -> None:
    """Stages share volumes, so the most counts; of public weights nothing was counted."""
    stage = {"samples": 5, "source": {"x": 5}, "licence": {"CC0": 2, "CC BY": 3}}
    public = {"source": {"by.pth": None}, "licence": {"not stated by by.pth": None}}
    ckpt = write_encoder(
        tmp_path / "ckpt",
        BACKBONE,
        data={"samples": 4, "source": {"x": 4}, "licence": {"CC0": 4}, "modality": {"MR": 4}},
        training={"steps": 1, "recipe_hash": "abc", "init": {"data": [stage, public]}},
    )
    made = finetune(settings(corpus, ckpt, tmp_path / "runs", tta=False, overlap=0.0))
    release = export(made, tmp_path / "out")
    data, own = release.config["data"], corpus.meta(0)["licence"]
    expected = Counter({"CC0": 4, "CC BY": 3, "not stated by by.pth": 1}) + Counter({own: 2})
    assert data["licence"] == expected
    assert data["samples"] == 5 + 2
    card = (release.path / "README.md").read_text()
    assert "**Strictest licence of the training data: not stated by by.pth.**" in card


def test_a_segmenter_can_be_finetuned_on(release: Release, corpus: Corpus, tmp_path: Path) -> None:
    one = {**TASK, "classes": TASK["classes"][:1]}
    plan = make_plan(settings(corpus, release.path, tmp_path, task=one))
    model, report = build_model(plan)
    assert plan.transfer == "network"
    assert sorted(report.new) == ["decoder.head.bias", "decoder.head.weight"]
    stored = load_file(release.path / DECODER)
    body = {n: v for n, v in model.decoder.state_dict().items() if not n.startswith("head")}
    assert all(torch.equal(stored[name], value) for name, value in body.items())


def test_an_unfinished_run_or_other_data_is_refused(
    run: Path, corpus: Corpus, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "rows.csv").unlink()
    with pytest.raises(InputError, match="is not finished"):
        export(copy, tmp_path / "out")
    shutil.copy(run / "rows.csv", copy)
    facts = json.loads((copy / "run.json").read_text())
    facts["corpus"]["index_hash"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="is not the corpus that"):
        export(copy, tmp_path / "out")
    facts = json.loads((run / "run.json").read_text())
    facts["release"]["digest"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="is not the release that"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(InputError, match="already exists"):
        export(run, tmp_path / "full")


@pytest.mark.parametrize("name", [*FILES, DECODER])
def test_a_flipped_bit_anywhere_is_refused(copy: Path, name: str, seed: int) -> None:
    file = copy / name
    data = bytearray(file.read_bytes())
    data[int(np.random.default_rng((seed, len(name))).integers(len(data)))] ^= 1 << 3
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"{name}: its bytes are not those"):
        load_network(copy, "cpu")


def nested(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["segmentation"].update(changes)


def task_with(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return nested(task={**TASK, **changes})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "target": (nested(_target_="os.system"), "name nothing to import"),
    "deep target": (task_with(_target_="os.system"), "name nothing to import"),
    "fewer classes": (task_with(classes=TASK["classes"][:1]), "decoder.out_channels is 3"),
    "other outputs": (lambda c: c.update(decoder={"out_channels": 7}), "out_channels is 7"),
    "no classes": (task_with(classes=[]), r"segmentation\.task\.classes"),
    "many classes": (
        task_with(
            classes=[
                {"name": str(i), "values": [i + 1], "tolerance_mm": 1} for i in range(300)
            ]
        ),
        r"segmentation\.task\.classes",
    ),
    "huge value": (
        task_with(classes=[{"name": "a", "values": [10**9], "tolerance_mm": 1}]),
        "must be less",
    ),
    "path as name": (task_with(name="../../etc"), r"segmentation\.task\.name"),
    "unknown key": (nested(command="rm"), r"segmentation\.command"),
    "decoder name": (nested(decoder="os.system"), r"segmentation\.decoder"),
    "other decoder": (nested(decoder="linear"), "does not fit this network"),
    "overlap": (nested(overlap=1.0), r"segmentation\.overlap"),
    "overlap is text": (nested(overlap="all"), r"segmentation\.overlap"),
    "no overlap": (lambda c: c["segmentation"].pop("overlap"), r"segmentation\.overlap"),
    "a list": (lambda c: c.update(segmentation=[]), "segmentation"),
    "gone": (lambda c: c.pop("segmentation"), "needs segmentation and decoder"),
    "encoder": (lambda c: c.update(kind="encoder"), "belongs to kind='segmenter'"),
    "plain encoder": (
        lambda c: (c.update(kind="encoder"), c.pop("segmentation")), "is the release of an encoder",
    ),
    "kind": (lambda c: c.update(kind="diffuser"), "kind"),
    "no decoder": (lambda c: c.update(decoder=None, transfers="encoder"), "needs segmentation"),
    "window": (lambda c: c.update(crop_size=[2048] * 3), "crop_size"),
    "odd window": (lambda c: c.update(crop_size=[15, 24, 16]), "crop_size"),
    "backbone": (lambda c: c["backbone"].update(name="os.system"), "is not one of our backbones"),
    "huge": (
        lambda c: c["backbone"]["args"].update(
            features=[4096] * 8, strides=[1] * 8, blocks=[100] * 8
        ),
        "does not fit this network",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_contents_are_refused_with_a_message(copy: Path, case: str) -> None:
    """Sums that are right do not help."""
    change, said = HOSTILE[case]
    change_config(copy, change)
    with pytest.raises(InputError, match=said) as caught:
        load_network(copy, "cpu")
    assert str(copy) in str(caught.value)


def test_weights_of_another_decoder_are_listed(copy: Path) -> None:
    weights = load_file(copy / DECODER)
    weights["renamed"] = weights.pop("head.weight")
    save_file(weights, copy / DECODER)
    resign(copy)
    with pytest.raises(InputError, match=r"2 tensors differ.*head.weight is missing; renamed is"):
        load_network(copy, "cpu")


@pytest.mark.parametrize("name", ["map", "scores"])
def test_the_golden_check_notices_other_outputs(copy: Path, name: str) -> None:
    golden = load_file(copy / "golden_output.safetensors")
    golden[name] = golden[name] + 1e-3 * golden[name].abs().max()
    save_file(golden, copy / "golden_output.safetensors")
    resign(copy)
    with pytest.raises(CorruptionError, match="the golden scan gives features that differ"):
        check_golden_network(copy)


def test_the_golden_check_notices_another_way_to_look(copy: Path) -> None:
    change_config(copy, nested(tta=False))
    with pytest.raises(CorruptionError, match="the golden scan gives features that differ"):
        check_golden_network(copy)


# What it is.


def test_inspect_tells_what_a_folder_is(run: Path, release: Release, start: Path) -> None:
    encoder, segmenter, finetuned = describe(start), describe(release.path), describe(run)
    kinds = [found["kind"] for found in (encoder, segmenter, finetuned)]
    assert kinds == ["release of an encoder", "release of a segmenter", "finetuning run"]
    assert segmenter["digest"] == release.digest
    assert segmenter["classes"] == finetuned["classes"] == {"anterior": [1], "posterior": [2]}
    assert next(iter(segmenter["licences"])) == "CC BY-NC-SA 4.0"
    model = load_network(run, "cpu").model
    assert segmenter["parameters"]["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert sum(segmenter["parameters"].values()) == finetuned["parameters"]["network"]
    assert segmenter["architecture"] == finetuned["architecture"] == BACKBONE
    for found in (encoder, segmenter, finetuned):
        assert json.loads(json.dumps(found)) == found
        assert "ResEncUNetEncoder" in as_text(found)


def test_inspect_needs_no_torch_and_can_speak_json(release: Release) -> None:
    code = (
        "import sys, voxelith\n"
        f"code = voxelith.main(['inspect', {str(release.path)!r}, '--json'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    facts, last = done.stdout.strip().splitlines()
    assert last == "0 False", done.stderr
    assert json.loads(facts)["digest"] == release.digest


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_what_inspect_says_may_be_cut_off(release: Release, words: list[str]) -> None:
    """`voxelith inspect RELEASE | head`: whoever reads has closed the pipe before it is written."""
    command = [sys.executable, "-m", "voxelith", "inspect", str(release.path), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 0
    said = process.stderr.read().decode()  # of --json what is said on the way
    assert "BrokenPipe" not in said and "error" not in said


def test_inspect_refuses_damage_and_other_folders(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a release"):
        describe(tmp_path)
    (copy / "README.md").write_text("better")
    with pytest.raises(CorruptionError, match="its bytes are not those"):
        describe(copy)


def test_inspect_tells_what_public_weights_are(tmp_path: Path) -> None:
    """By their tensors: what the file does not tell is not made up."""
    torch.manual_seed(SEED)
    vit = SliceViT(in_channels=3, embed_dim=384, depth=1, num_heads=6)
    state = vit.state_dict()
    state["norm.weight"] = torch.ones(384)
    path = tmp_path / "some.safetensors"
    save_file(state, path)
    found = describe(path)
    assert found["architecture"]["name"] == "slice_vit.SliceViT"
    assert found["architecture"]["args"]["num_heads"] == 6
    assert found["parameters"]["encoder"] == sum(tensor.numel() for tensor in state.values())
    assert found["digest"] == file_digest(path) and "does not tell" in found["licences"]
    assert found["tensors"]["copied"] == len(state)
    state["blocks.0.mlp.fc1.weight"].zero_()
    save_file(state, path)
    assert describe(path)["tensors"]["of one value throughout"] == ["blocks.0.mlp.fc1.weight"]
    narrow = SliceViT(in_channels=3, embed_dim=48, depth=1, num_heads=2).state_dict()
    save_file(narrow, path)
    with pytest.raises(InputError, match="give num_heads="):
        describe(path)
    assert describe(path, {"num_heads": 2})["architecture"]["args"]["num_heads"] == 2
    assert voxelith.main(["inspect", str(path), "num_heads=2"]) == 0
    assert voxelith.main(["inspect", str(tmp_path), "num_heads=2"]) == 2
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"some\.safetensors: the weights are of no layout"):
        describe(path)


# Predictions of others.


@pytest.fixture(scope="module")
def hashed(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cases under keys that are hashes."""
    from data_prep.build import prep
    from data_prep.settings import PrepSettings

    folder = tmp_path_factory.mktemp("hashed")
    with (samples / "hippocampus.csv").open() as file:
        rows = [row for row in csv.DictReader(file)]
    rows = [r for r in rows if r["split"] == "train"][:1] + [
        r for r in rows if r["split"] == "test"
    ][:2]
    for row in rows:
        row["image"], row["label"] = str(samples / row["image"]), str(samples / row["label"])
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    prep(PrepSettings(input=folder / "list.csv", output=folder / "corpus", processes=1))
    return folder / "corpus"


def judged(corpus: Path, predictions: Path, output: Path, **changes: Any) -> EvaluateSettings:
    chosen = {"corpus": corpus, "predictions": predictions, "task": TASK, "output": output}
    return EvaluateSettings.model_validate(chosen | changes)


def test_files_with_the_scans_own_names_are_scored(
    hashed: Path, samples: Path, tmp_path: Path
) -> None:
    labels = samples / "hippocampus/labels"
    with pytest.raises(InputError, match=r"2 of 2 cases are missing.*keymap=FILE"):
        evaluate(judged(hashed, labels, tmp_path))
    keymap = hashed.with_name("corpus.private") / "keymap.csv"
    rows = read_rows(evaluate(judged(hashed, labels, tmp_path, keymap=keymap)))
    assert len(rows) == 4 and {row.dsc for row in rows} == {1.0}
    with pytest.raises(InputError, match="has no columns key and input"):
        evaluate(judged(hashed, labels, tmp_path, keymap=samples / "hippocampus.csv"))
    (tmp_path / "other.csv").write_text("key,subject,input\nx,y,z.nii.gz\n")
    with pytest.raises(InputError, match="that of another corpus"):
        evaluate(judged(hashed, labels, tmp_path, keymap=tmp_path / "other.csv"))


def test_names_are_found_as_prep_would_write_them(
    corpus: Corpus, samples: Path, tmp_path: Path
) -> None:
    """Capitals are lost in keys; two files of a case are one too many."""
    keys = corpus.split("duo")["parts"]["test"]
    for key in keys:
        shutil.copy(
            samples / f"hippocampus/labels/{key}.nii.gz", tmp_path / f"{key.upper()}.nii.gz"
        )
    (tmp_path / "summary.json").write_text("{}")
    rows = read_rows(evaluate(judged(corpus.path, tmp_path, tmp_path / "o", split="duo")))
    assert {row.dsc for row in rows} == {1.0}
    shutil.copy(tmp_path / f"{keys[0].upper()}.nii.gz", tmp_path / f"{keys[0]}.nii.gz")
    with pytest.raises(InputError, match=f"are both case {keys[0]}"):
        evaluate(judged(corpus.path, tmp_path, tmp_path / "o", split="duo"))


def test_all_predictions_on_other_grids_are_named(
    corpus: Corpus, samples: Path, tmp_path: Path
) -> None:
    one, other = corpus.split("duo")["parts"]["test"]
    image = nib.load(samples / f"hippocampus/labels/{one}.nii.gz")
    cut = nib.Nifti1Image(np.asarray(image.dataobj)[1:], image.affine)
    nib.save(cut, tmp_path / f"{one}.nii.gz")
    image = nib.load(samples / f"hippocampus/labels/{other}.nii.gz")
    moved = image.affine.copy()
    moved[0, 3] += 3
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), tmp_path / f"{other}.nii.gz")
    with pytest.raises(InputError) as caught:
        evaluate(judged(corpus.path, tmp_path, tmp_path / "o", split="duo"))
    first, second = caught.value.problems
    assert one in first and "voxels (d, h, w)" in first and "not on the network's" in first
    assert other in second and "3.00 mm" in second
    (tmp_path / f"{one}.nii.gz").write_bytes(gzip.compress(b"no image"))
    with pytest.raises(InputError, match=f"{one}.nii.gz: not_an_image"):
        evaluate(judged(corpus.path, tmp_path, tmp_path / "o", split="duo"))


def test_results_are_nifti_whatever_the_scan_is() -> None:
    from finetune.predict import _result_name

    for name in ("a/x.nii.gz", "a/x.nii", "X.NII.GZ"):
        assert _result_name(Path(name)) == Path(name)
    for name in ("a/x.nrrd", "a/x.mha", "a/x.MHD"):
        assert _result_name(Path(name)) == Path("a/x.nii.gz")
