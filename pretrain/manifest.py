"""What a release says of itself, and the proof that it is whole. No torch in here.

`pretrain.release` makes networks of it, `voxelith inspect` tells what it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from safetensors import SafetensorError, safe_open

from data_prep.errors import CorruptionError, InputError, plain_message
from data_prep.files import file_digest
from data_prep.preprocess import Preprocess

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
TRAINING = "training.safetensors"
"""Beside those of a full release: what its training needs to go on."""
PLAN_FILE = "adaptation_plan.json"
"""The encoder in nnssl's terms, where nnssl has such an architecture (`foreign/nnssl_file.py`)."""
OPTIONAL = (DECODER, PLAN_FILE, TRAINING)
"""What a release may have beside FILES."""
MAX_TEXT = 2**20
"""Bytes of config.json and SHA256SUMS; a larger one is no config."""
MAX_PRINTS = 2**30
MAX_PRINT = 2**16
MAX_DEPTH = 64
"""Of lists and dicts within each other: what walks through them never meets Python's own limit."""
MAX_CROP = 2**27
"""Voxels of a crop: 512 cubed."""


ReleaseKind = Literal["encoder", "segmenter", "answerer"]
"""An encoder, or one that was finetuned: with a decoder to segment, with a head to answer."""

FACTS = {"segmenter": "segmentation", "answerer": "answers"}
"""The key of config.json that says what a finetuned network is for."""


class Part(BaseModel):
    """A class of ours and its arguments, which are checked against its signature where used."""

    model_config = ConfigDict(extra="forbid")

    name: str
    args: dict[str, Any]


class DecoderFacts(BaseModel):
    """What rebuilds the decoder: the backbone says which it is, so its outputs are all it needs.

    With `blocks`, the first ones of a U-Net's decoder are all that was trained and is there.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    out_channels: Annotated[int, Field(ge=1, le=4096)]
    blocks: Annotated[int, Field(ge=1, le=64)] | None = None

    @model_serializer(mode="wrap")
    def _without_absent_blocks(self, made: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in made(self).items() if value is not None}


class ReleaseConfig(BaseModel):
    """The keys of config.json, format 1; what an older one lacks has a default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    kind: ReleaseKind
    backbone: Part
    objective: Part
    crop_size: Annotated[
        list[Annotated[int, Field(ge=1, le=2048)]], Field(min_length=3, max_length=3)
    ]
    modalities: Annotated[list[Literal["CT", "MR"]], Field(min_length=1, max_length=2)]
    channels: list[str] = []
    """What they were called, in order, of scans with several; empty where nobody knows."""
    preprocess: dict[str, Any]
    training: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    decoder: DecoderFacts | None = None
    transfers: Literal["encoder", "network"] = "encoder"
    full: bool = False
    """Whether the state of its training is there too."""
    segmentation: dict[str, Any] | None = None
    """Of a segmenter: its task and how it looks at scans; finetune checks it."""
    answers: dict[str, Any] | None = None
    """The same of an answerer, whose task is of whole scans."""

    @model_validator(mode="after")
    def _finetuned_network_has_its_parts(self) -> Self:
        for kind, name in FACTS.items():
            given = getattr(self, name) is not None
            if self.kind == kind and not (given and self.decoder is not None):
                raise ValueError(f"kind={kind!r} needs {name} and decoder")
            if self.kind != kind and given:
                raise ValueError(f"{name} belongs to kind={kind!r}")
        return self

    @model_validator(mode="after")
    def _network_has_a_decoder(self) -> Self:
        if self.decoder is not None and self.decoder.blocks and self.kind != "encoder":
            raise ValueError(f"decoder.blocks belongs to kind='encoder', not {self.kind!r}")
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
    values: list[Annotated[str, Field(max_length=MAX_PRINT)]]


Shapes = dict[str, tuple[int, ...]]


def stored_shapes(weights: Path) -> Shapes:
    """Names and shapes of a safetensors file, from its header alone."""
    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CorruptionError(f"{weights}: cannot be read as safetensors: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """A verified release on disk, without its weights."""

    path: Path
    config: dict[str, Any]
    preprocess: Preprocess
    digest: str

    @property
    def name(self) -> str:
        """What the release calls itself."""
        return str(self.config["name"])

    @property
    def kind(self) -> ReleaseKind:
        """What it is."""
        kind: ReleaseKind = self.config["kind"]
        return kind

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
    def is_full(self) -> bool:
        """Whether the state of its training is part of it: heads, teacher, optimiser."""
        return bool(self.config["full"])

    @property
    def decoder_blocks(self) -> int | None:
        """How many blocks of a U-Net's decoder it has, from the coarsest; None: all of it."""
        blocks: int | None = (self.config["decoder"] or {}).get("blocks")
        return blocks

    @property
    def transfers(self) -> Literal["encoder", "network"]:
        """What its objective means finetuning to take over."""
        return "network" if self.config["transfers"] == "network" else "encoder"

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """Counts of the data of each training that the weights had, the last one first."""
        init = self.config["training"].get("init")
        before = init.get("data") if isinstance(init, dict) else None
        told = before if isinstance(before, list) else []
        return [self.config["data"], *(one for one in told if isinstance(one, dict))]

    @property
    def fingerprints(self) -> set[str]:
        """Hashes of the volumes that the weights were trained on."""
        file = self.path / "fingerprints.json"
        return set(_checked(Fingerprints, _read_json(file, MAX_PRINTS), file).values)


def read_manifest(ref: str | Path) -> Manifest:
    """Opens a release and verifies every byte of it.

    Raises:
        InputError: it is not there, or not a release of a format that we know.
        CorruptionError: a file is missing or is not what SHA256SUMS says.
    """
    path = Path(ref)
    if path.is_file():
        raise InputError(
            f"{path}: is a file, and no release; of a file of public weights `voxelith export FILE "
            "OUT` with what its makers tell makes one, see `voxelith export --help`"
        )
    if not path.is_dir():
        raise InputError(
            f"{path}: no such release; give the folder that `voxelith export RUN OUT` wrote"
        )
    sums = path / "SHA256SUMS"
    if not sums.is_file():
        hint = "it is a run: `voxelith export` makes a release of it; " * (
            (path / "run.json").exists()
        )
        raise InputError(f"{path}: is not a release, it has no SHA256SUMS; {hint}check the path")
    _refuse_links_out(path, [sums.name])
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
    told = {
        DECODER: ("decoder", config["decoder"], config["decoder"] is not None),
        TRAINING: ("full", config["full"], config["full"]),
    }
    problems = [
        f"{file}: {key} is {value}, and SHA256SUMS {'does not list' if wanted else 'lists'} "
        f"{name}; fetch the release again"
        for name, (key, value, wanted) in told.items()
        if wanted != (name in listed)
    ]
    if problems:
        raise CorruptionError(problems)
    try:
        preprocess = Preprocess.from_dict(config["preprocess"])
    except InputError as error:
        raise InputError([f"{file}: {problem}" for problem in error.problems]) from error
    digest = hashlib.sha256(sums.read_bytes()).hexdigest()
    return Manifest(path, config, preprocess, digest)


def listed_files(sums: str, where: str) -> dict[str, str]:
    """The files that a SHA256SUMS lists, with their digests: those of a release and no others.

    Args:
        sums: its text.
        where: what to call it in messages.

    Raises:
        CorruptionError: it lists something else, or not all that a release has.
    """
    listed: dict[str, str] = {}
    for line in sums.splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    problems = [
        f"{where}: does not list {name}; the release is incomplete"
        for name in FILES
        if name not in listed
    ]
    problems += [
        f"{where}: lists {name!r}, which is no part of a release"
        for name in listed
        if name not in (*FILES, *OPTIONAL)
    ]
    if problems:
        raise CorruptionError(problems)
    return listed


def _verify(path: Path, sums: str) -> set[str]:
    """The names that the sums list, once every file has been found to be what they say."""
    listed = listed_files(sums, f"{path}/SHA256SUMS")
    _refuse_links_out(path, listed)
    problems = []
    for name, expected in listed.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: is missing; copy or fetch the release again")
        elif file_digest(file) != expected:
            problems.append(
                f"{file}: its bytes are not those that were released (sha256 differs from "
                "SHA256SUMS); copy or fetch the release again"
            )
    if problems:
        raise CorruptionError(problems)
    return set(listed)


def _refuse_links_out(path: Path, names: Iterable[str]) -> None:
    """What lies elsewhere can be another file by the time that it is read again."""
    root = os.path.realpath(path)
    problems = [
        f"{path / name}: is a link out of the release; copy the folder with what its links lead to "
        "(cp -rL)"
        for name in names
        if not Path(os.path.realpath(path / name)).is_relative_to(root)
    ]
    if problems:
        raise CorruptionError(problems)


def _read_text(file: Path, limit: int = MAX_TEXT) -> str:
    if file.stat().st_size > limit:
        raise InputError(f"{file}: has {file.stat().st_size} bytes, more than {limit}")
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise CorruptionError(f"{file}: is not text ({error}); fetch the release again") from error


def _read_json(file: Path, limit: int) -> Any:
    try:
        read = json.loads(_read_text(file, limit))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON that can be read ({error})") from error
    if _is_deep(read):
        raise InputError(f"{file}: nests deeper than {MAX_DEPTH}, which no release does")
    return read


def _is_deep(value: Any) -> bool:
    """Whether lists and dicts lie deeper within each other than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        lists = [one.values() if isinstance(one, dict) else one for one in level if _holds(one)]
        level = [part for parts in lists for part in parts]
    return bool(level)


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


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
    """Where a key occurs; `_read_json` has bounded the depth."""
    if isinstance(value, dict):
        here = [f"{where}{key}"] if key in value else []
        return here + [f for k, v in value.items() for f in _find_key(v, key, f"{where}{k}.")]
    if isinstance(value, list):
        return [f for i, v in enumerate(value) for f in _find_key(v, key, f"{where}{i}.")]
    return []
