"""A released encoder: a directory that says what it is and proves that it is whole.

    model.safetensors      weights of the encoder, no pickle
    decoder.safetensors    of the decoder that was trained with it, where it can be finetuned
    config.json            architecture, preprocessing, training, data: data only, nothing to run
    fingerprints.json      hashes of the volumes it was trained on, for the leakage gate
    golden_input.nii.gz    a small scan with odd spacing and orientation ...
    golden_output.safetensors   ... and the features that it must give
    README.md              the card
    SHA256SUMS             of all of these

A release names its architecture from our own packages, with arguments checked against bounds
before anything is allocated. Sums prove integrity, not origin.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data_prep.errors import CorruptionError, InputError, plain_message
from data_prep.files import make_folder, write_bytes, write_json, write_text
from data_prep.preprocess import Preprocess
from pretrain.arguments import build_backbone
from pretrain.backbones.backbone import Backbone

FORMAT = 1
FILES = (
    "model.safetensors",
    "config.json",
    "fingerprints.json",
    "golden_input.nii.gz",
    "golden_output.safetensors",
    "README.md",
)
DECODER = "decoder.safetensors"
"""Beside those where config.json has a `decoder`."""
TOLERANCE = 1e-5
"""Of the golden features, relative to their largest value, in float32 on a CPU."""
MAX_TEXT = 2**20
"""Bytes of config.json and SHA256SUMS; a larger one is no config."""
MAX_PRINTS = 2**30
MAX_CROP = 2**27
"""Voxels of a crop: 512 cubed."""


class Part(BaseModel):
    """A class of ours and its arguments, which are checked against its signature where used."""

    model_config = ConfigDict(extra="forbid")

    name: str
    args: dict[str, Any]


class DecoderFacts(BaseModel):
    """What rebuilds the decoder: the backbone says which it is, so its outputs are all it needs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    out_channels: Annotated[int, Field(ge=1, le=4096)]


class ReleaseConfig(BaseModel):
    """The keys of config.json, format 1; releases without a decoder have the last two or not."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    kind: Literal["encoder"]
    backbone: Part
    objective: Part
    crop_size: Annotated[
        list[Annotated[int, Field(ge=1, le=2048)]], Field(min_length=3, max_length=3)
    ]
    modalities: Annotated[list[Literal["CT", "MR"]], Field(min_length=1, max_length=2)]
    preprocess: dict[str, Any]
    training: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    decoder: DecoderFacts | None = None
    transfers: Literal["encoder", "network"] = "encoder"

    @model_validator(mode="after")
    def _network_has_a_decoder(self) -> Self:
        if self.transfers == "network" and self.decoder is None:
            raise ValueError("transfers='network', and there is no decoder: one of them is wrong")
        return self

    @model_validator(mode="after")
    def _crop_is_sane(self) -> Self:
        if math.prod(self.crop_size) > MAX_CROP:
            raise ValueError(f"crop_size={self.crop_size} has more than {MAX_CROP} voxels")
        return self


class Fingerprints(BaseModel):
    """fingerprints.json, format 1."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    values: list[Annotated[str, Field(max_length=200)]]


@dataclass
class LoadReport:
    """What happened to each tensor of a load: every name stands in exactly one list."""

    copied: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    covered: float = 0.0

    @classmethod
    def joined(cls, *, encoder: LoadReport, decoder: LoadReport) -> LoadReport:
        """One report of a network, with the names that its tensors have there."""
        both = cls(covered=encoder.covered)
        for prefix, part in (("encoder.", encoder), ("decoder.", decoder)):
            both.copied += [prefix + name for name in part.copied]
            both.new += [prefix + name for name in part.new]
            both.adapted |= {prefix + name: how for name, how in part.adapted.items()}
            both.skipped |= {prefix + name: why for name, why in part.skipped.items()}
        return both

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for load_report.json."""
        return {
            "covered": self.covered,
            "copied": self.copied,
            "adapted": self.adapted,
            "skipped": self.skipped,
            "new": self.new,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.copied)} tensors copied, {len(self.adapted)} adapted, "
            f"{len(self.skipped)} skipped, {len(self.new)} new: "
            f"{self.covered:.1%} of the encoder's parameters"
        )


@dataclass(frozen=True)
class Release:
    """A verified release on disk."""

    path: Path
    config: dict[str, Any]
    preprocess: Preprocess
    digest: str

    @property
    def name(self) -> str:
        """What the release calls itself."""
        return str(self.config["name"])

    @property
    def crop_size(self) -> tuple[int, int, int]:
        """(D, H, W) in voxels that it was trained on."""
        d, h, w = self.config["crop_size"]
        return int(d), int(h), int(w)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the channels' training data, such as CT and MR."""
        return tuple(self.config["modalities"])

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder that the encoder was trained with is part of it."""
        return self.config["decoder"] is not None

    @property
    def transfers(self) -> Literal["encoder", "network"]:
        """What its objective means finetuning to take over."""
        return "network" if self.config["transfers"] == "network" else "encoder"

    @property
    def fingerprints(self) -> set[str]:
        """Hashes of the volumes that the encoder was trained on."""
        file = self.path / "fingerprints.json"
        return set(_checked(Fingerprints, _read_json(file, MAX_PRINTS), file).values)

    def build_encoder(self) -> Backbone:
        """The encoder with fresh random weights.

        Made without memory first: a config that describes another network than the weights, or an
        absurd one, is refused before anything is allocated.

        Raises:
            InputError: the backbone is not ours, its arguments are out of bounds, or it is not
                the network of the weights.
        """
        weights = self.path / "model.safetensors"
        with torch.device("meta"):
            light = self._make()
            _check_shapes(stored_shapes(weights), light, weights)
        try:
            light.grids(self.crop_size)
        except ValueError as error:
            raise InputError(f"{self.path}/config.json: crop_size: {error}") from error
        return self._make()

    def _make(self) -> Backbone:
        chosen = self.config["backbone"]
        where = f"{self.path}: backbone"
        try:
            return build_backbone(chosen["name"], chosen["args"], where)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise InputError(f"{where}: {error}; export the release again") from error

    def load(self, encoder: nn.Module) -> LoadReport:
        """Copies the weights, strictly: all names and shapes must agree.

        Raises:
            InputError: they do not; the message lists every tensor that differs.
        """
        return load_strictly(encoder, self.path / "model.safetensors")

    def load_decoder(self, decoder: nn.Module) -> LoadReport:
        """Copies the decoder's weights but those of its head, which belongs to the pretraining.

        Raises:
            InputError: there is no decoder, its weights are not those that config.json tells of,
                or it is another than `decoder`; the message lists every tensor that differs.
        """
        from pretrain.decoders import build_decoder, without_head  # features do without it

        if not self.has_decoder:
            raise InputError(f"{self.path}: has no decoder; transfer=encoder takes the encoder")
        weights = self.path / DECODER
        found = stored_shapes(weights)
        with torch.device("meta"):
            told = build_decoder(self._make(), int(self.config["decoder"]["out_channels"]))
        _check_shapes(found, told, weights)
        body, state = without_head(found), decoder.state_dict()
        _check_fit(body, {n: tuple(t.shape) for n, t in without_head(state).items()}, weights)
        with safe_open(weights, framework="pt") as file:
            copied = {name: file.get_tensor(name) for name in body}
        decoder.load_state_dict(state | copied)
        return LoadReport(copied=sorted(body), new=sorted(state.keys() - body.keys()))

    def equal_but_weights(self) -> str:
        """Hash of architecture and preprocessing: releases that share it share a scratch twin."""
        parts = {name: self.config[name] for name in ("backbone", "preprocess", "crop_size")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_strictly(module: nn.Module, weights: Path) -> LoadReport:
    """Copies a safetensors file into a module of exactly that shape."""
    found = stored_shapes(weights)
    _check_shapes(found, module, weights)
    with safe_open(weights, framework="pt") as file:
        module.load_state_dict({name: file.get_tensor(name) for name in found})
    return LoadReport(copied=sorted(found), covered=1.0)


Shapes = dict[str, tuple[int, ...]]


def stored_shapes(weights: Path) -> Shapes:
    """Names and shapes of a safetensors file, from its header alone."""
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CorruptionError(f"{weights}: cannot be read as safetensors: {error}") from error


def _check_shapes(found: Shapes, module: nn.Module, weights: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_fit(found, wanted, weights)


def _check_fit(found: Shapes, wanted: Shapes, weights: Path) -> None:
    problems = _differences(found, wanted)
    if problems:
        shown = problems[:10] + (["..."] if len(problems) > 10 else [])
        raise InputError(
            f"{weights}: does not fit this network ({len(problems)} tensors differ): "
            + "; ".join(shown)
        )


def _differences(
    found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> list[str]:
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} is not part of it" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} has shape {list(found[name])}, expected {list(wanted[name])}"
            for name in sorted(found.keys() & wanted.keys())
            if found[name] != wanted[name]
        ),
    ]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_release(ref: str | Path) -> Release:
    """Opens a release and verifies every byte of it.

    Raises:
        InputError: it is not there, or not a release of a format that we know.
        CorruptionError: a file is missing or is not what SHA256SUMS says.
    """
    path = Path(ref)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such release; give the folder that `voxelith export RUN OUT` wrote"
        )
    sums = path / "SHA256SUMS"
    if not sums.exists():
        hint = "it is a run: `voxelith export` makes a release of it; " * (
            (path / "run.json").exists()
        )
        raise InputError(f"{path}: is not a release, it has no SHA256SUMS; {hint}check the path")
    listed = _verify(path, _read_text(sums))
    file = path / "config.json"
    raw = _read_json(file, MAX_TEXT)
    if isinstance(raw, dict) and raw.get("format") != FORMAT:
        raise InputError(
            f"{file}: format is {raw.get('format')!r}, this version reads {FORMAT}; "
            "update voxelith or export again"
        )
    problems = [
        f"{file}: {where}: releases are data and name nothing to import"
        for where in _find_key(raw, "_target_")
    ]
    if problems:
        raise InputError(problems)
    config = _checked(ReleaseConfig, raw, file).model_dump(mode="json")
    if (config["decoder"] is not None) != (DECODER in listed):
        there = "and SHA256SUMS does not list" if config["decoder"] else "which SHA256SUMS lists,"
        raise CorruptionError(
            f"{file}: decoder is {config['decoder']}, {there} {DECODER}; fetch the release again"
        )
    preprocess = Preprocess.from_dict(config["preprocess"])
    digest = hashlib.sha256(sums.read_bytes()).hexdigest()
    return Release(path, config, preprocess, digest)


def _verify(path: Path, sums: str) -> set[str]:
    """The names that the sums list, once every file has been found to be what they say."""
    listed: dict[str, str] = {}
    for line in sums.splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    problems = [
        f"{path}/SHA256SUMS: does not list {name}; the release is incomplete"
        for name in FILES
        if name not in listed
    ]
    for name, expected in listed.items():
        file = path / name
        if name not in (*FILES, DECODER):
            problems.append(f"{path}/SHA256SUMS: lists {name!r}, which is no part of a release")
        elif not file.is_file():
            problems.append(f"{file}: is missing; copy or fetch the release again")
        elif file_digest(file) != expected:
            problems.append(
                f"{file}: its bytes are not those that were released (sha256 differs from "
                "SHA256SUMS); copy or fetch the release again"
            )
    if problems:
        raise CorruptionError(problems)
    return set(listed)


def _read_text(file: Path, limit: int = MAX_TEXT) -> str:
    if file.stat().st_size > limit:
        raise InputError(f"{file}: has {file.stat().st_size} bytes, more than {limit}")
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise CorruptionError(f"{file}: is not text ({error}); fetch the release again") from error


def _read_json(file: Path, limit: int) -> Any:
    try:
        return json.loads(_read_text(file, limit))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON that can be read ({error})") from error


Model = TypeVar("Model", bound=BaseModel)


def _checked(model: type[Model], raw: Any, file: Path) -> Model:
    """Raw JSON as the model that it should be; every problem is listed."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            where = ".".join(str(part) for part in item["loc"]) or "content"
            if item["type"] == "missing":
                problems.append(f"{file}: {where}: missing; export the release again")
            elif item["type"] == "extra_forbidden":
                problems.append(f"{file}: {where}: unknown; this version does not know it")
            else:
                problems.append(f"{file}: {where}: {plain_message([item], len(item['loc']))}")
        raise InputError(problems) from error


def _find_key(value: Any, key: str, where: str = "") -> list[str]:
    """Where a key occurs; JSON's own parser has bounded the depth."""
    if isinstance(value, dict):
        here = [f"{where}{key}"] if key in value else []
        return here + [f for k, v in value.items() for f in _find_key(v, key, f"{where}{k}.")]
    if isinstance(value, list):
        return [f for i, v in enumerate(value) for f in _find_key(v, key, f"{where}{i}.")]
    return []


# Writing.


def golden_scan(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A small smooth scan in P, I, R axes with three different spacings, tilted a little."""
    rng = np.random.default_rng(seed)
    shape = (37, 29, 41)
    grid = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij"))
    values = sum(
        rng.normal() * np.cos(np.pi * np.tensordot(rng.integers(0, 6, 3), grid, 1) + rng.uniform())
        for _ in range(24)
    )
    turn = np.deg2rad(7.0)
    tilt = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    axes = np.array([[0, 0, 1.0], [-1.0, 0, 0], [0, -1.0, 0]])  # P, I, R
    affine = np.eye(4)
    affine[:3, :3] = tilt @ axes @ np.diag([1.3, 0.9, 2.1])
    affine[:3, 3] = [-20.0, 35.0, 11.0]
    return (100.0 * np.asarray(values)).astype(np.float32), affine


def write_release(
    output: Path,
    *,
    encoder: Backbone,
    config: dict[str, Any],
    fingerprints: dict[str, Any],
    card: str,
    decoder: nn.Module | None = None,
) -> Release:
    """Writes a release beside `output` and moves it there when it is whole and verified.

    Raises:
        InputError: `output` exists and is not empty.
    """
    from pretrain.encoder import Encoder

    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: already exists; choose another folder or remove it")
    make_folder(output.parent, "OUT")
    folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        _save_weights(encoder, folder / "model.safetensors")
        if decoder is not None:
            _save_weights(decoder, folder / DECODER)
        write_json(folder / "config.json", config)
        write_json(folder / "fingerprints.json", fingerprints)
        write_text(folder / "README.md", card)
        values, affine = golden_scan()
        scan = nib.Nifti1Image(values, affine).to_bytes()
        # Without the time in gzip's header: the same run gives the same release.
        write_bytes(folder / "golden_input.nii.gz", gzip.compress(scan, mtime=0))
        preprocess = Preprocess.from_dict(config["preprocess"])
        probe = Encoder(encoder.cpu(), preprocess, config)
        save_file(_golden_features(probe, folder), folder / "golden_output.safetensors")
        names = FILES if decoder is None else (*FILES, DECODER)
        sums = "".join(f"{file_digest(folder / name)}  {name}\n" for name in names)
        write_text(folder / "SHA256SUMS", sums)
        check_golden(folder)
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return load_release(output)


def _save_weights(module: nn.Module, file: Path) -> None:
    weights = {name: value.contiguous().cpu() for name, value in module.state_dict().items()}
    save_file(weights, file, metadata={"format": "pt"})


def _golden_features(encoder: Any, folder: Path) -> dict[str, torch.Tensor]:
    modality = "MR" if "MR" in encoder.config["modalities"] else encoder.config["modalities"][0]
    features = encoder.features(folder / "golden_input.nii.gz", modality=modality)
    return {"map": torch.from_numpy(features.map), "vector": torch.from_numpy(features.vector)}


def check_golden(path: Path) -> float:
    """Loads a release as a user would and compares the golden features.

    Returns:
        The largest error, relative to the largest feature.

    Raises:
        CorruptionError: it is above the tolerance.
    """
    from pretrain.encoder import load_encoder

    found = _golden_features(load_encoder(path), path)
    worst = 0.0
    with safe_open(path / "golden_output.safetensors", framework="pt") as file:
        for name, value in found.items():
            expected = file.get_tensor(name)
            if value.shape != expected.shape:
                worst = math.inf
            else:
                scale = expected.abs().max().clamp_min(1e-12)
                worst = max(worst, float((value - expected).abs().max() / scale))
    if not worst <= TOLERANCE:
        raise CorruptionError(
            f"{path}: the golden scan gives features that differ by {worst:.1e} (relative), "
            f"allowed {TOLERANCE:.0e}; weights or preprocessing are not what was released"
        )
    return worst
