"""What is released loads as it was, or says why it does not."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import voxelith
from data_prep.errors import CorruptionError, InputError
from data_prep.files import file_digest
from pretrain.export import export, strictest_first
from pretrain.foreign.nnssl_file import adaptation_plan
from pretrain.manifest import OPTIONAL, PLAN_FILE
from pretrain.release import (
    DECODER,
    FILES,
    Release,
    check_golden,
    load_release,
    relative_error,
)
from pretrain.settings import PretrainSettings
from pretrain.start import recipe_hash
from pretrain.train import pretrain

BACKBONES = {
    "resenc": (
        {
            "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
            "features": [4, 8],
            "strides": [1, 2],
            "blocks": [1, 1],
        },
        {"_target_": "pretrain.objectives.cnn_mae.CnnMAE", "block": 4},
    ),
    "vit": (
        {
            "_target_": "pretrain.backbones.vit.ViT3D",
            "patch_size": 4,
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 2,
        },
        {
            "_target_": "pretrain.objectives.mae.MAE",
            "decoder_dim": 24,
            "decoder_depth": 1,
            "decoder_heads": 2,
        },
    ),
}


@pytest.fixture(scope="module", params=BACKBONES)
def run(
    request: pytest.FixtureRequest, pretrain_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    backbone, objective = BACKBONES[request.param]
    return pretrain(
        PretrainSettings(
            corpus=pretrain_corpus,
            run=request.param,
            runs=tmp_path_factory.mktemp("runs"),
            backbone=backbone,
            objective=objective,
            trainer={"accelerator": "cpu", "workers": 0},
            crop_size=(8, 16, 8),
            steps=2,
            batch_size=2,
            lr=1e-3,
        )
    )


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return export(run, tmp_path_factory.mktemp("releases") / "mine")


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release.path, tmp_path / "copy"))


def resign(path: Path) -> None:
    """Makes the sums right again: whoever tampers with a config can do that too."""
    names = [name for name in (*FILES, *OPTIONAL) if (path / name).exists()]
    lines = [f"{file_digest(path / name)}  {name}\n" for name in names]
    (path / "SHA256SUMS").write_text("".join(lines))


def change_config(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))
    resign(path)


def test_weights_are_those_of_the_last_checkpoint(run: Path, release: Release) -> None:
    checkpoint = sorted((run / "checkpoints").glob("*.pt"))[-1]
    state = torch.load(checkpoint, weights_only=True)["objective"]
    stored = load_file(release.path / "model.safetensors")
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    assert stored.keys() == encoder.keys()
    assert all(torch.equal(stored[name], encoder[name]) for name in stored)


def test_every_file_is_there_and_golden_features_come_back(release: Release) -> None:
    # U-Net's decoder is cnn_mae's, and nnssl has its architecture; a ViT has none, nor is it there.
    others = {DECODER, PLAN_FILE} if release.has_decoder else set()
    assert {path.name for path in release.path.iterdir()} == {*FILES, "SHA256SUMS"} | others
    assert check_golden(release.path) <= 1e-5


def test_the_plan_for_nnssl_is_part_of_it(release: Release, copy: Path) -> None:
    plan, file = adaptation_plan(release.config), copy / PLAN_FILE
    assert (plan is not None) == file.exists() == ("resenc" in release.config["backbone"]["name"])
    if plan is None:
        return
    assert json.loads(file.read_text()) == plan
    file.write_text(file.read_text().replace("encoder.stem", "encoder.stages"))
    with pytest.raises(CorruptionError, match=f"{PLAN_FILE}: its bytes are not those"):
        voxelith.load_encoder(copy)
    file.unlink()
    with pytest.raises(CorruptionError, match=f"{PLAN_FILE}: is missing"):
        voxelith.load_encoder(copy)
    resign(copy)  # as releases from before have none
    assert check_golden(copy) <= 1e-5


def test_the_card_tells_how_the_training_ended(run: Path, release: Release) -> None:
    metrics = release.config["training"]["metrics"]
    with (run / "metrics.csv").open() as file:
        loss = float(list(csv.DictReader(file))[-1]["loss"])
    assert metrics["loss"] == loss and metrics["rank"] > 1
    card = (release.path / "README.md").read_text()
    assert f"| at its end | loss {loss:.4g}, RankMe of the tokens " in card


def test_the_same_run_gives_the_same_release(run: Path, release: Release, tmp_path: Path) -> None:
    assert export(run, tmp_path / "again").digest == release.digest


def test_a_recipe_is_all_but_the_seed_and_the_place(run: Path, release: Release) -> None:
    settings = json.loads((run / "config.json").read_text())
    index_hash = release.config["data"]["index_hash"]
    own = release.config["training"]["recipe_hash"]
    elsewhere = {"seed": 7, "run": "b", "runs": "y", "corpus": "z", "log_every": 3, "accumulate": 2}
    for name, value in elsewhere.items():
        assert recipe_hash(settings | {name: value}, index_hash, 2) == own, name
    others = {"lr": 2e-3, "steps": 3, "flip": [False] * 3, "objective": {}, "backbone": {}}
    trainer = settings["trainer"] | {"precision": "bf16-mixed"}
    for name, value in (others | {"trainer": trainer}).items():
        assert recipe_hash(settings | {name: value}, index_hash, 2) != own, name
    assert recipe_hash(settings, "another", 2) != own != recipe_hash(settings, index_hash, 1)


def test_three_lines_from_a_scan_to_features(release: Release, samples: Path) -> None:
    encoder = voxelith.load_encoder(release.path)
    scan = sorted((samples / "ixi").rglob("*.nii.gz"))[0]
    features = encoder.features(scan)
    stride = encoder.module.strides[-1]
    image = nib.load(scan)
    shape = nib.as_closest_canonical(image).shape[::-1]  # I S P order reversed to D, H, W sizes
    cells = tuple(-(-n // s) for n, s in zip(shape, stride, strict=True))
    assert features.map.shape == (encoder.module.channels[-1], *cells)
    np.testing.assert_allclose(features.vector, features.map.mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    # The middle of the feature grid lies within a cell of the middle of the scan, in millimetres.
    middle = features.affine @ [*((np.array(cells) - 1) / 2), 1]
    expected = image.affine @ [*((np.array(image.shape) - 1) / 2), 1]
    assert np.abs(middle - expected).max() <= 0.5 * max(features.spacing) + 1e-6
    assert encoder.report is not None and encoder.report.covered == 1.0
    assert not any(p.requires_grad for p in encoder.module.parameters())


def test_orientation_of_the_file_does_not_matter(release: Release, tmp_path: Path) -> None:
    """The same head stored in other axes gives the same features."""
    encoder = voxelith.load_encoder(release.path)
    golden = nib.load(release.path / "golden_input.nii.gz")
    expected = encoder.features(release.path / "golden_input.nii.gz")
    turned = golden.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, tmp_path / "turned.nii.gz")
    found = encoder.features(tmp_path / "turned.nii.gz")
    np.testing.assert_allclose(found.map, expected.map, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)


def test_an_array_needs_its_spacing_and_agrees_with_the_file(release: Release) -> None:
    from data_prep.volume import read_nifti

    encoder = voxelith.load_encoder(release.path)
    path = release.path / "golden_input.nii.gz"
    volume = read_nifti(path)
    with pytest.raises(InputError, match="spacing=None"):
        encoder.features(volume.physical()[0])
    found = encoder.features(volume.physical()[0], spacing=volume.spacing)
    np.testing.assert_allclose(found.map, encoder.features(path).map, rtol=1e-4, atol=1e-4)


def test_unreadable_scans_say_why(release: Release, tmp_path: Path) -> None:
    encoder = voxelith.load_encoder(release.path)
    (tmp_path / "text.nii.gz").write_text("no image")
    with pytest.raises(InputError, match=r"text\.nii\.gz: "):
        encoder.features(tmp_path / "text.nii.gz")
    with pytest.raises(InputError, match="2 channels found, this encoder takes 1"):
        encoder.features(np.zeros((2, 8, 8, 8)), spacing=(1, 1, 1))
    with pytest.raises(InputError, match="modality='PT'"):
        encoder.features(np.zeros((8, 8, 8)), spacing=(1, 1, 1), modality="PT")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_refused(copy: Path, name: str, seed: int) -> None:
    file = copy / name
    data = bytearray(file.read_bytes())
    place = int(np.random.default_rng((seed, len(name))).integers(len(data)))
    data[place] ^= 1 << 3
    file.write_bytes(data)
    with pytest.raises(CorruptionError, match=f"{name}: its bytes are not those"):
        voxelith.load_encoder(copy)


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=name):
        voxelith.load_encoder(copy)


def test_a_config_that_names_a_target_is_refused(copy: Path) -> None:
    marker = copy / "ran"
    change_config(
        copy,
        lambda c: c["backbone"]["args"].update(
            {"_target_": "os.system", "command": f"touch {marker}"}
        ),
    )
    with pytest.raises(InputError, match="name nothing to import"):
        voxelith.load_encoder(copy)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "vit.torch",
        "vit.Block",  # imported by that module, not its own
        "..objectives.mae.MAE",
        "vit.__dict__",
        "resenc.ResidualBlock",  # ours, but a part: its arguments have no bounds
        "convolution.Pyramid",
        "backbone.Backbone",
        "nowhere.Net",
        "vit",
    ],
)
def test_only_our_own_backbones_can_be_named(copy: Path, name: object) -> None:
    change_config(copy, lambda c: c["backbone"].update(name=name))
    with pytest.raises(InputError, match="is not one of our backbones"):
        voxelith.load_encoder(copy)


def hostile(copy: Path) -> list[tuple[str, Callable[[], object]]]:
    """Releases with right sums and wrong contents."""
    config = copy / "config.json"
    return [
        ("name is a number", lambda: change_config(copy, lambda c: c["backbone"].update(name=5))),
        ("args are a list", lambda: change_config(copy, lambda c: c["backbone"].update(args=[]))),
        ("deep", lambda: config.write_text("[" * 100_000)),
        ("a long number", lambda: config.write_text('{"format": ' + "9" * 5000 + "}")),
        ("no text", lambda: config.write_bytes(b"\xff\xfe\x00")),
        ("a list", lambda: config.write_text("[]")),
        ("huge", lambda: config.write_text('"' + "a" * 2**21 + '"')),
        ("prints are a list", lambda: (copy / "fingerprints.json").write_text("[]")),
        ("modality", lambda: change_config(copy, lambda c: c.update(modalities=5))),
        ("training", lambda: change_config(copy, lambda c: c.update(training="x"))),
        ("crop", lambda: change_config(copy, lambda c: c.update(crop_size=[2048] * 3))),
        ("small crop", lambda: change_config(copy, lambda c: c.update(crop_size=[1, 1, 1]))),
        (
            "stride",
            lambda: change_config(
                copy,
                lambda c: c["backbone"]["args"].update(strides=[1, -1], patch_size=10**9),
            ),
        ),
    ]


@pytest.mark.parametrize("case", range(13))
def test_hostile_contents_are_refused_with_a_message(copy: Path, case: int) -> None:
    name, plant = hostile(copy)[case]
    plant()
    resign(copy)
    with pytest.raises(InputError) as caught:
        load_release(copy).fingerprints  # noqa: B018
        voxelith.load_encoder(copy)
    assert str(copy) in str(caught.value), name


def test_sums_that_are_no_text_or_name_other_files_are_refused(copy: Path) -> None:
    (copy / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptionError, match="is not text"):
        load_release(copy)
    resign(copy)
    with (copy / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(CorruptionError, match="which is no part of a release"):
        load_release(copy)


def test_arguments_are_checked_before_anything_is_made(copy: Path) -> None:
    change_config(copy, lambda c: c["backbone"]["args"].update(in_channels=-1, depths=3))
    with pytest.raises(InputError) as caught:
        voxelith.load_encoder(copy)
    assert "in_channels=-1: must be greater" in str(caught.value)
    assert "depths: unknown" in str(caught.value)


def test_absurd_sizes_are_refused_before_allocation(copy: Path) -> None:
    key = "embed_dim" if "vit" in json.loads((copy / "config.json").read_text())["name"] else None
    big = {key: 24 * 10**8} if key else {"features": [10**8, 10**8]}
    change_config(copy, lambda c: c["backbone"]["args"].update(big))
    with pytest.raises(InputError, match="must be less"):
        voxelith.load_encoder(copy)


def test_a_network_of_allowed_but_other_sizes_is_refused_before_allocation(copy: Path) -> None:
    """Each size is within its bounds; together they would take terabytes."""
    vit = "vit" in json.loads((copy / "config.json").read_text())["name"]
    big = {"embed_dim": 8190, "depth": 128, "num_heads": 1} if vit else {
        "features": [4096] * 8, "strides": [1] * 8, "blocks": [100] * 8
    }  # fmt: skip
    change_config(copy, lambda c: c["backbone"]["args"].update(big))
    with pytest.raises(InputError, match="does not fit this network"):
        voxelith.load_encoder(copy)


def test_unknown_or_missing_keys_and_formats_are_refused(copy: Path) -> None:
    change_config(copy, lambda c: (c.pop("preprocess"), c.update(extra=1)))
    with pytest.raises(InputError, match=r"preprocess: missing(.|\n)*extra: unknown"):
        load_release(copy)
    change_config(copy, lambda c: c.update(format=99))
    with pytest.raises(InputError, match="format is 99, this version reads 1"):
        load_release(copy)


def test_weights_of_another_network_are_listed(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[0]
    weights["renamed"] = weights.pop(name)
    save_file(weights, copy / "model.safetensors")
    resign(copy)
    with pytest.raises(InputError, match=rf"2 tensors differ.*{name} is missing; renamed is not"):
        voxelith.load_encoder(copy)


def test_what_is_no_release_is_told_apart(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such release"):
        load_release(tmp_path / "nowhere")
    with pytest.raises(InputError, match="it is a run: `voxelith export` makes a release"):
        load_release(run)


def test_export_overwrites_nothing_and_leaves_no_rest(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export(run, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_release_is_called_as_its_maker_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert voxelith.main(["export", str(run), str(tmp_path / "a"), "name=resenc-mine"]) == 0
    assert voxelith.main(["export", str(run), str(tmp_path / "b")]) == 0
    named, plain = load_release(tmp_path / "a"), load_release(tmp_path / "b")
    assert (named.name, plain.name) == ("resenc-mine", run.name)
    assert (named.path / "README.md").read_text().startswith("# resenc-mine\n")
    assert named.config | {"name": run.name} == plain.config
    assert voxelith.main(["export", str(run), str(tmp_path / "c"), "name=../c"]) == 2
    assert "name=../c: a name has letters" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_paths_and_names_of_the_run_stay_out(release: Release, run: Path) -> None:
    text = "".join((release.path / name).read_text() for name in ("config.json", "README.md"))
    assert str(run.parent) not in text and "corpus" not in json.loads(
        (release.path / "config.json").read_text()
    )


def test_licences_are_ordered_by_what_they_forbid() -> None:
    found = strictest_first({"MIT": 1, "CC BY-NC-SA 4.0": 1, "CC BY 4.0": 2, "odd": 1})
    assert found == ["odd", "CC BY-NC-SA 4.0", "CC BY 4.0", "MIT"]


@pytest.mark.parametrize("name", ["map", "vector"])
def test_the_golden_check_notices_other_features(copy: Path, name: str) -> None:
    """Sums that are right do not help: these are not the features that were released."""
    golden = load_file(copy / "golden_output.safetensors")
    golden[name] = golden[name] + 1e-3 * golden[name].abs().max()
    save_file(golden, copy / "golden_output.safetensors")
    resign(copy)
    with pytest.raises(CorruptionError, match="the golden scan gives features that differ"):
        check_golden(copy)


def test_the_golden_check_notices_changed_preprocessing(copy: Path) -> None:
    change_config(
        copy, lambda c: c["preprocess"]["operations"][1].update(spacing_mm=[2.0, 2.0, 2.0])
    )
    with pytest.raises(CorruptionError, match="the golden scan gives features that differ"):
        check_golden(copy)


def test_an_answer_that_is_no_number_is_no_match() -> None:
    """`max` keeps the number before a NaN, so a comparison must not meet one."""
    good = torch.tensor([1.0, 2.0])
    nan = torch.tensor([1.0, float("nan")])
    assert relative_error(good, good) == 0.0 and relative_error(good * 1.5, good) == 0.5
    assert {relative_error(*pair) for pair in ((nan, good), (good, nan), (good[:1], good))} == {
        float("inf")
    }
    assert relative_error(None, good) == relative_error(good, None) == float("inf")
