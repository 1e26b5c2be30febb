"""What other systems' loaders let pass: each defect of theirs is refused or reported here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import SEED
from small_runs import BACKBONES, add_few_split, make_release, settings

from data_prep.build import prep
from data_prep.corpus import Corpus
from data_prep.errors import InputError
from data_prep.files import file_digest
from data_prep.settings import PrepSettings
from data_prep.splits import split_from, write_split
from finetune.train import build_model, make_plan
from pretrain.release import FILES, load_release


@pytest.fixture(scope="module")
def corpus(labelled_corpus: Path) -> Path:
    add_few_split(labelled_corpus)
    return labelled_corpus


def resign(path: Path) -> None:
    lines = [f"{file_digest(path / name)}  {name}\n" for name in FILES]
    (path / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_tensor_is_reported_once_and_the_stem_is_loaded(
    kind: str, corpus: Path, tmp_path: Path
) -> None:
    """Also where the stem lives inside the first stage (plain U-Net), under its own full key."""
    release = make_release(tmp_path / "release", kind)
    model, report = build_model(make_plan(settings(release, corpus, tmp_path)))
    stored = load_file(release.path / "model.safetensors")
    assert sorted(report.copied) == sorted(f"encoder.{name}" for name in stored)
    listed = [*report.copied, *report.new, *report.adapted, *report.skipped]
    assert sorted(listed) == sorted(model.state_dict()) and report.covered == 1.0
    state = model.encoder.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    first = next(n for n, v in stored.items() if v.ndim == 5 and v.shape[1] == 1)
    assert first.endswith(".weight")  # what reads the image
    # No tensor is left at zero without a word: only biases and batch statistics begin there.
    assert not [n for n, v in stored.items() if v.ndim > 1 and not v.any()]


@pytest.mark.parametrize("change", ["prefix", "missing", "more", "shape"])
def test_a_load_that_does_not_fit_stops_and_names_what_differs(
    change: str, corpus: Path, tmp_path: Path
) -> None:
    """`strict=False` without a report: a failed load looks like pretraining that does not help."""
    release = make_release(tmp_path / "release", "unet")
    file = release.path / "model.safetensors"
    stored = load_file(file)
    name = sorted(n for n, v in stored.items() if v.ndim == 5)[0]
    changed = {
        "prefix": {f"module.{n}": v for n, v in stored.items()},
        "missing": {n: v for n, v in stored.items() if n != name},
        "more": {**stored, "mask_token": torch.zeros(3)},
        "shape": {**stored, name: stored[name].repeat(1, 2, 1, 1, 1)},  # another channel count
    }[change]
    save_file(changed, file)
    resign(release.path)
    said = {
        "prefix": "is missing", "missing": f"{name} is missing",
        "more": "mask_token is not part of it", "shape": f"{name} has shape",
    }[change]  # fmt: skip
    with pytest.raises(InputError, match=said):
        build_model(make_plan(settings(load_release(release.path), corpus, tmp_path)))


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_than_the_checkpoint_takes_are_refused(
    channels: int, corpus: Path, tmp_path: Path
) -> None:
    """Fewer here than in pretraining; never a silent slice or repeat."""
    path = make_release(tmp_path / "release", "resenc").path
    config = json.loads((path / "config.json").read_text())
    config["backbone"]["args"]["in_channels"] = channels
    (path / "config.json").write_text(json.dumps(config))
    resign(path)
    with pytest.raises(InputError, match=f"takes {channels} channels.*give scans of {channels}"):
        make_plan(settings(load_release(path), corpus, tmp_path))


@pytest.fixture
def twice(samples: Path, tmp_path: Path) -> Path:
    """Labelled hippocampi of two channels, the second of which is the first once more."""
    root = tmp_path / "Dataset001_Twice"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    scans = sorted((samples / "hippocampus" / "images").glob("*.nii.gz"))
    labelled = [s for s in scans if (samples / "hippocampus" / "labels" / s.name).exists()][:6]
    for scan in labelled:
        name = scan.name.removesuffix(".nii.gz").replace("_", "-")
        for channel in range(2):
            shutil.copy(scan, root / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        label = samples / "hippocampus" / "labels" / scan.name
        shutil.copy(label, root / "labelsTr" / f"{name}.nii.gz")
    about = {
        "channel_names": {"0": "T1", "1": "T1 again"}, "numTraining": len(labelled),
        "labels": {"background": 0, "anterior": 1, "posterior": 2}, "file_ending": ".nii.gz",
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(about))
    output = tmp_path / "twice"
    prep(PrepSettings(input=root, output=output, keys="names", processes=1))
    corpus = Corpus.open(output)
    parts = ["train", "train", "test", "test", "", ""][: len(corpus)]
    write_split(split_from("duo", corpus.keys, corpus.subjects, parts), output / "splits")
    return output


@pytest.mark.parametrize("kind", ["resenc", "vit"])
def test_one_channel_is_shared_out_over_those_of_the_scans(
    kind: str, twice: Path, tmp_path: Path
) -> None:
    """Reported by name; the twin has as many channels, and the features are those of one."""
    release = make_release(tmp_path / "release", kind)
    chosen = settings(release, twice, tmp_path, split="duo", labels=2)
    plan = make_plan(chosen)
    model, report = build_model(plan)
    (stem,) = report.adapted
    assert report.adapted[stem] == "1 to 2 channels: 1/2 each" and report.covered == 1.0
    listed = [*report.copied, *report.new, *report.adapted, *report.skipped]
    assert sorted(listed) == sorted(model.state_dict())
    one = release.build_encoder()
    release.load(one)
    image = torch.randn(1, 1, *release.crop_size, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        found = model.encoder.eval()(image.expand(-1, 2, -1, -1, -1))
        for mine, theirs in zip(found, one.eval()(image), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    twin = make_plan(chosen.model_copy(update={"init": "scratch"}))
    assert build_model(twin)[0].encoder.in_channels == 2 and twin.recipe == plan.recipe


def test_rates_that_differ_between_arms_are_declared(corpus: Path, tmp_path: Path) -> None:
    """Scratch at another rate than its twin has another arm and another recipe, in every record."""
    release = make_release(tmp_path / "release", "resenc")
    given = settings(
        release, corpus, tmp_path, own={"lr": 1e-2}, search={"lr": [3e-3, 1e-2], "draws": 1},
        init="scratch",
    )  # fmt: skip
    twin, own = make_plan(given), make_plan(given.model_copy(update={"recipe_of": "own"}))
    assert twin.settings.lr == 3e-3 and own.settings.lr == 1e-2
    assert twin.recipe == own.recipe and twin.trained != own.trained
    assert twin.identity != own.identity
    assert json.dumps(own.trained)  # plain data, written to run.json
