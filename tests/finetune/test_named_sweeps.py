"""A named sweep: all known public encoders beside the user's own, and no silent gap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seeds import SEED
from small_runs import add_split, backbone, write_encoder

from conf.compose import HERE
from data_prep.errors import InputError
from finetune.experiments import expanded, with_family
from finetune.protocol import family_of
from finetune.rows import read_rows
from finetune.sweep import plan_jobs, sweep
from pretrain import adopt
from pretrain.registry import KNOWN, Known

CNN: dict[str, Any] = {
    "name": "resenc.ResEncUNetEncoder",
    "args": {"features": [4, 8], "strides": [1, 2], "blocks": [1, 1]},
}
TOLD = {
    "modalities": ["MR"], "spacing_mm": None, "MR": {"rule": "zscore"}, "crop_size": [16, 24, 32],
}  # fmt: skip
Say = Callable[..., list[str]]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A public CNN and a public ViT for the real list, and one that is nowhere to be fetched.

    What would be fetched lies here already: that it arrives is shown in test_fetch.
    """
    monkeypatch.setenv("VOXELITH_CACHE", str(tmp_path / "cache"))
    for name in list(KNOWN):
        monkeypatch.delitem(KNOWN, name)
    torch.manual_seed(SEED)
    cnn, vit = backbone("resenc").state_dict(), backbone("vit").state_dict()
    grid = vit.pop("pos_embed.weight").flatten(0, 2)[None]
    vit |= {"pos_embed": grid, "cls_token": vit["cls_token"].view(1, 1, -1)}
    vit["register_tokens"] = vit["register_tokens"][None]
    vit |= {f"blocks.{b}.ls{n}.gamma": torch.ones(24) for b in range(4) for n in (1, 2)}
    found = {"public-cnn": tmp_path / "cnn.pth", "public-vit": tmp_path / "vit.pth"}
    torch.save(
        {"network_weights": {f"encoder.{k}": v for k, v in cnn.items()}}, found["public-cnn"]
    )
    torch.save({"teacher": {f"backbone.{k}": v for k, v in vit.items()}}, found["public-vit"])
    told = {
        "public-cnn": {"strides": [1, 2, 2, 2]},
        "public-vit": {"num_heads": 2, "position_grid": [2, 3, 4]},
    }
    for name, file in found.items():
        one = Known(name, "public", "CC0", "", "org/x", file.name, told={**TOLD, **told[name]})
        monkeypatch.setitem(KNOWN, name, one)
    monkeypatch.setitem(KNOWN, "nowhere", Known("nowhere", "x", "CC0", "", note="on a drive"))
    monkeypatch.setattr(adopt, "resolve", lambda ref: found.get(str(ref), Path(ref)))
    return found


@pytest.fixture
def say(files: dict[str, Path], labelled_corpus: Path, tmp_path: Path) -> Say:
    mine = write_encoder(tmp_path / "mine", CNN, name="mine")
    add_split(labelled_corpus, "sweep", 4, 1)
    return lambda *more: [
        "experiment=compare_released", "task=hippocampus", f"corpus={labelled_corpus}",
        f"ckpt={mine.path if hasattr(mine, 'path') else mine}", "labels=2", "split=sweep",
        f"runs={tmp_path / 'runs'}", "trainer=cpu", "trainer.workers=0", *more,
    ]  # fmt: skip


def value(words: list[str], key: str) -> str:
    return next(word for word in words if word.startswith(f"{key}=")).removeprefix(f"{key}=")


def test_all_that_are_known_and_ones_own(say: Say, capsys: Any) -> None:
    found = expanded(say("seed=0,1"))
    names = [Path(ref).name for ref in value(found, "ckpt").split(",")]
    assert names == ["public-cnn", "public-vit", "mine"]
    assert value(found, "init") == "pretrained,scratch" and value(found, "seed") == "0,1"
    assert value(found, "recipe_of") == "twin,own" and value(found, "protocol") == "short"
    assert "nowhere is left out: on a drive" in capsys.readouterr().out
    assert value(expanded(say("protocol=full")), "protocol") == "full"
    fewer = value(expanded(say("without=public-vit")), "ckpt")
    assert "public-vit" not in fewer and "public-vit is left out" in capsys.readouterr().out
    assert expanded(["task=x", "seed=0"]) == ["task=x", "seed=0"]


def test_none_is_missing_unless_it_is_said(say: Say, files: dict[str, Path]) -> None:
    files["public-cnn"].write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"public-cnn: .*without=public-cnn leaves it out"):
        expanded(say())
    assert expanded(say("without=public-cnn"))
    # One that was typed is told together with them, and is not left out by `without`.
    own = str(files["public-vit"])
    with pytest.raises(InputError) as caught:
        expanded([*(w for w in say() if not w.startswith("ckpt=")), f"ckpt={own}"])
    known, typed = caught.value.problems
    assert known.startswith("public-cnn: ") and typed.startswith(f"{own}: is a file of weights")
    assert "without=" not in typed
    with pytest.raises(InputError, match=r"without=public-cn: .*did you mean public-cnn"):
        expanded(say("without=public-cn"))
    with pytest.raises(InputError, match=r"experiment=compare: .*did you mean compare_released"):
        expanded(["experiment=compare"])
    with pytest.raises(InputError, match="seed: stand there twice"):
        expanded(say("seed=1", "seed=2"))


def test_each_trains_by_the_protocol_of_its_family(say: Say) -> None:
    jobs = plan_jobs(expanded(say("validations=0")))
    by = {
        (job.plan.release.name, job.plan.settings.arm): job.plan.settings.protocol for job in jobs
    }
    assert by["public-cnn", "pretrained"] == by["mine", "pretrained"] == "short_cnn"
    assert by["public-vit", "pretrained"] == "short_vit"
    arms = [job.plan.settings.arm for job in jobs]
    assert [arms.count(arm) for arm in ("pretrained", "scratch", "scratch-own")] == [3, 3, 3]
    assert with_family({"protocol": "tiny", "ckpt": "x"})["protocol"] == "tiny"


def test_every_backbone_has_a_family() -> None:
    attention = {"vit", "slice_vit", "swin_unetr"}
    for file in (HERE / "backbone").glob("*.yaml"):
        target = next(w for w in file.read_text().split() if w.startswith("pretrain.backbones."))
        name = target.removeprefix("pretrain.backbones.")
        assert family_of(name) == ("vit" if name.split(".")[0] in attention else "cnn")


@pytest.mark.slow
def test_the_comparison_runs_to_its_rows(say: Say, tmp_path: Path) -> None:
    given = say(
        "protocol=tiny", "own={lr: 1e-3}", "search={lr: [1e-3], draws: 1}", "steps=2",
        "batch_size=2", "warmup=1", "augment=none", "crop_size=[16,24,32]",
    )  # fmt: skip
    states = sweep(given, jobs=2)
    assert states["failed"] == states["stopped"] == [] and len(states["done"]) == 9
    rows = [row for path in (tmp_path / "runs").glob("*/rows.csv") for row in read_rows(path)]
    assert {row.checkpoint for row in rows} == {"public-cnn", "public-vit", "mine", ""}
    seen = {row.checkpoint: row.status for row in rows}
    assert seen["public-cnn"] == seen["public-vit"] == "unknown"
