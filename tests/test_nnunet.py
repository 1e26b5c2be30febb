"""nnU-Net itself finetunes what `write_nnssl` wrote, beginning from the released weights.

It runs by its own commands, in its own environment, whose bin folder is VOXELITH_NNUNET_BIN: those
of the package of PyPI (2.8.1 or later), and `nnUNetv2_train_pretrained` of its repository, each
where it is there.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.build import prep
from data_prep.settings import PrepSettings
from pretrain.decoders import unet_decoder, without_head
from pretrain.export import export
from pretrain.foreign import open_foreign, read_weights
from pretrain.foreign.nnssl_file import CHECKPOINT, adaptation_plan, write_nnssl
from pretrain.release import Release, load_release
from pretrain.settings import PretrainSettings
from pretrain.train import pretrain

BIN = Path(os.environ.get("VOXELITH_NNUNET_BIN", "."))
COMMANDS = ("extract_fingerprint", "plan_experiment", "preprocess_like_nnssl", "train_pretrained")
MISSING = [f"nnUNetv2_{name}" for name in COMMANDS if not (BIN / f"nnUNetv2_{name}").exists()]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GIVEN = f"VOXELITH_NNUNET_BIN={os.environ.get('VOXELITH_NNUNET_BIN', '')}"
of_repository = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{GIVEN} has no {', '.join(MISSING)}: give the bin folder of an environment with "
    "nnU-Net 2.8.1 or later, from its repository",
)


def version_of_nnunet() -> str:
    """Of that environment; empty where there is none."""
    asked = "from importlib.metadata import version; print(version('nnunetv2'))"
    if not (BIN / "python").exists():
        return ""
    done = subprocess.run([str(BIN / "python"), "-c", asked], capture_output=True, text=True)
    return done.stdout.strip()


VERSION = version_of_nnunet()
of_package = pytest.mark.skipif(
    [int(number) for number in re.findall(r"\d+", VERSION)[:3]] < [2, 8, 1],
    reason=f"{GIVEN} has nnunetv2 {VERSION or 'not at all'}: give the bin folder of an environment "
    "with 2.8.1 or later",
)

# nnU-Net's own command with its own arguments, and a trainer that is its own but for the length of
# the training and a copy of the network as it was loaded.
DRIVER = """
import os
import sys
from importlib.metadata import entry_points

import nnunetv2
import torch
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

def initialize(self):
    base.initialize(self)
    torch.set_num_threads(1)  # it took all cores, which others may be using
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
    torch.save(self.network.state_dict(), loaded)

if __name__ == "__main__":
    loaded, name = sys.argv.pop(1), sys.argv.pop(1)
    trainers = "nnunetv2.training.nnUNetTrainer"
    folder = os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer")
    base = recursive_find_python_class(folder, name, trainers)
    short = type("ShortTrainer", (base,), {"initialize": initialize})
    setattr(sys.modules[base.__module__], "ShortTrainer", short)
    os.environ["nnUNet_n_proc_DA"] = "0"  # crops are made in this process
    (command,) = entry_points(group="console_scripts", name="nnUNetv2_train_pretrained")
    command.load()()
"""

# A trainer of the package is found in the folder nnUNet_extTrainer. This one is its own but for the
# length of the training and a copy of the network as it was loaded.
TRAINER = """
import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class ShortTrainer(nnUNetTrainer):
    def initialize(self):
        super().initialize()
        torch.set_num_threads(1)  # it took all cores, which others may be using
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

        os.environ["nnUNet_n_proc_DA"] = "0"  # crops are made in this process

    def on_train_start(self):
        torch.save(self.network.state_dict(), os.environ["VOXELITH_LOADED"])
        super().on_train_start()
"""

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
CASES = 2
SPACING = [1.5, 1.0, 1.0]


@dataclass
class NNUNet:
    """A data set of nnU-Net's, and the environment in which its commands run."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, *words: str, **environment: str) -> str:
        done = subprocess.run(
            [str(BIN / command), *words],
            env=self.environment | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


def data_set(folder: Path, samples: Path, cases: int) -> NNUNet:
    raw = folder / "raw" / "Dataset004_Hippocampus"
    with (samples / "hippocampus.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"][:cases]
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for number, row in enumerate(rows):
        shutil.copy(samples / row["image"], raw / "imagesTr" / f"case{number}_0000.nii.gz")
        shutil.copy(samples / row["label"], raw / "labelsTr" / f"case{number}.nii.gz")
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about))
    places = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    environment = os.environ | places | {
        "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    return NNUNet(folder, environment)


@pytest.fixture(scope="module")
def nnunet(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> NNUNet:
    made = data_set(tmp_path_factory.mktemp("nnunet"), samples, CASES)
    made.run("nnUNetv2_extract_fingerprint", "-d", "4", "-np", "1")
    made.run("nnUNetv2_plan_experiment", "-d", "4")
    (made.folder / "driver.py").write_text(DRIVER)
    return made


@pytest.fixture(scope="module")
def corpus(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "c"
    chosen = {"keys": "names", "processes": 1, "labels": False, "spacing": SPACING}
    prep(PrepSettings(input=samples / "hippocampus.csv", output=output, **chosen))
    return output


RESENC = {
    "_target_": "pretrain.backbones.resenc.ResEncUNetEncoder",
    "features": [8, 16, 24],
    "strides": [1, [1, 2, 2], 2],
    "blocks": [1, 2, 1],
}
CNN_MAE = {"_target_": "pretrain.objectives.cnn_mae.CnnMAE", "block": 4}
PRIMUS = {
    "_target_": "pretrain.backbones.vit.ViT3D", "patch_size": 8, "embed_dim": 72, "depth": 2,
    "num_heads": 3, "mlp_ratio": 8 / 3, "mlp": "swiglu", "inner_norm": True, "layer_scale": 0.1,
    "norm_eps": 1e-5, "rope": True, "position": "learned", "position_grid": [2, 4, 4],
    "decoder": "patch",
}  # fmt: skip
MAE = {
    "_target_": "pretrain.objectives.mae.MAE",
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def released(
    corpus: Path, folder: Path, backbone: dict[str, Any], objective: dict[str, Any]
) -> Release:
    run = pretrain(
        PretrainSettings(
            corpus=corpus, run="r", runs=folder, backbone=backbone,
            objective=objective, trainer={"accelerator": "cpu", "workers": 0},
            crop_size=(16, 32, 32), steps=2, batch_size=2, lr=1e-3,
        )
    )  # fmt: skip
    return export(run, folder / "release")


@of_repository
@pytest.mark.parametrize(
    ("name", "backbone", "objective", "trainer", "told"),
    [
        ("resenc", RESENC, CNN_MAE, "PretrainedTrainer", {}),
        (
            "primus", PRIMUS, MAE, "PretrainedTrainer_Primusx",
            {"num_heads": 3, "position_grid": [2, 4, 4]},
        ),
    ],
)  # fmt: skip
def test_nnunet_begins_from_the_released_weights(
    nnunet: NNUNet,
    corpus: Path,
    tmp_path: Path,
    name: str,
    backbone: dict[str, Any],
    objective: dict[str, Any],
    trainer: str,
    told: dict[str, Any],
) -> None:
    release = released(corpus, tmp_path, backbone, objective)
    file = write_nnssl(release, tmp_path / "nnssl") / CHECKPOINT
    nnunet.run(
        "nnUNetv2_preprocess_like_nnssl",
        *("-d", "4", "-n", name, "-pc", str(file), "-am", "like_pretrained", "-np", "1"),
    )  # fmt: skip
    folder = nnunet.folder / "preprocessed" / "Dataset004_Hippocampus"
    (plans,) = folder.glob(f"ptPlans__{name}*.json")
    made = json.loads(plans.read_text())["configurations"]["3d_fullres"]
    assert made["spacing"] == SPACING and made["patch_size"] == [16, 32, 32]

    loaded = tmp_path / "loaded.pth"
    nnunet.run(
        "python", "driver.py", str(loaded), trainer,
        "4", "3d_fullres", "all", "-p", plans.stem, "-tr", "ShortTrainer", "-device", "cpu",
    )  # fmt: skip
    encoder = load_release(release.path).build_encoder()
    release.load(encoder)
    own = encoder.state_dict()
    theirs = open_foreign(loaded, told).state
    assert theirs.keys() == own.keys()
    assert [n for n in own if not torch.equal(theirs[n], own[n])] == []

    # It has trained them, and segmented with them.
    (results,) = (nnunet.folder / "results").glob(f"*/ShortTrainer__{plans.stem}__*/fold_all")
    trained = open_foreign(results / "checkpoint_final.pth", told).state
    assert any(not torch.equal(trained[n], own[n]) for n in own)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trained.values())
    assert len(list((results / "validation").glob("case*.nii.gz"))) == CASES
    assert adaptation_plan(release.config) is not None


def ways_of_the_page() -> tuple[list[list[str]], str]:
    """The commands of docs/checkpoints.md for the package, and its plans.py."""
    page = PAGE.read_text().partition("**The package nnunetv2 of PyPI")[2]
    commands, snippet = re.findall(r"```(?:python)?\n(.*?)```", page, flags=re.DOTALL)[:2]
    return [shlex.split(line) for line in commands.splitlines()], snippet


@of_package
def test_the_package_begins_from_the_released_weights(
    samples: Path, corpus: Path, tmp_path: Path
) -> None:
    """By the commands of docs/checkpoints.md, which get to hear only how long and where."""
    nnunet = data_set(tmp_path, samples, 5)  # as many as it has folds
    commands, snippet = ways_of_the_page()
    (tmp_path / "plans.py").write_text(snippet)
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "short.py").write_text(TRAINER)
    release = released(corpus, tmp_path, RESENC, CNN_MAE)
    write_nnssl(release, tmp_path / "for_nnunet")
    loaded = tmp_path / "loaded.pth"
    one = ["-np", "1"]
    more = {
        "nnUNetv2_extract_fingerprint": one,
        "nnUNetv2_preprocess": one,
        "nnUNetv2_train": ["-tr", "ShortTrainer", "-device", "cpu"],
    }
    for command, *words in commands:
        said = nnunet.run(
            command, *words, *more.get(command, []),
            nnUNet_extTrainer=str(tmp_path / "trainers"), VOXELITH_LOADED=str(loaded),
        )  # fmt: skip
    assert "Loading pretrained weights from file  for_nnunet/checkpoint_final.pth" in said

    encoder = load_release(release.path).build_encoder()
    release.load(encoder)
    own, theirs = encoder.state_dict(), open_foreign(loaded).state
    assert theirs.keys() == own.keys()
    assert [name for name in own if not torch.equal(theirs[name], own[name])] == []
    decoder = unet_decoder(encoder, 1)
    release.load_decoder(decoder)
    found = read_weights(loaded)
    for name, tensor in without_head(decoder.state_dict()).items():
        assert torch.equal(found[f"decoder.{name}"], tensor)

    # It has trained them, on the crops and the spacing of the release, and segmented with them.
    (results,) = (tmp_path / "results").glob("*/ShortTrainer__voxelith__3d_fullres/fold_0")
    plans = json.loads((results.parent / "plans.json").read_text())
    made = plans["configurations"]["3d_fullres"]
    assert made["spacing"] == SPACING and made["patch_size"] == [16, 32, 32]
    trained = open_foreign(results / "checkpoint_final.pth").state
    assert any(not torch.equal(trained[name], own[name]) for name in own)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trained.values())
    assert len(list((results / "validation").glob("case*.nii.gz"))) == 1
