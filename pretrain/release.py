"""A release: a directory that says what it is and proves that it is whole.

    model.safetensors      weights of the encoder, no pickle
    decoder.safetensors    of the decoder that was trained with it: where it can be finetuned, and
                           always of a segmenter, head and all
    training.safetensors   of a full release: the whole objective, heads and teacher included, and
                           its optimiser's moments
    adaptation_plan.json   architecture and preprocessing as nnssl writes them, if it has such
    config.json            architecture, preprocessing, training, data: data only, nothing to run
    fingerprints.json      hashes of the volumes it was trained on, for the leakage gate
    golden_input.nii.gz    a small scan with odd spacing and orientation ...
    golden_output.safetensors   ... and what it must give: features, and a segmenter's scores
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from data_prep.errors import CorruptionError, InputError, some
from data_prep.files import atomic_folder, file_digest, write_bytes, write_json, write_text
from data_prep.naming import plain
from data_prep.preprocess import Preprocess
from pretrain.adapters import Channels, adapted_state
from pretrain.arguments import build_backbone
from pretrain.backbones.backbone import Backbone
from pretrain.manifest import (
    DECODER,
    FILES,
    OPTIONAL,
    PLAN_FILE,
    TRAINING,
    Manifest,
    Shapes,
    read_manifest,
    stored_shapes,
)

if TYPE_CHECKING:
    from pretrain.encoder import Encoder

TOLERANCE = 1e-5
"""Of the golden features, relative to their largest value, in float32 on a CPU."""


@dataclass
class LoadReport:
    """What happened to each tensor of a load: every name stands in exactly one of four lists.

    Attributes:
        covered: share of the encoder's parameters that are copied or adapted.
        copied: names in the network.
        adapted: names in the network, and how.
        skipped: names in the file, and why.
        new: names in the network.
        sources: names in the file of what is copied or adapted, where they are others.
        constant: of what is copied or adapted, weights that have one value throughout, which no
            training leaves: most likely they were never trained, or lost.
    """

    covered: float = 0.0
    copied: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, *, encoder: LoadReport, decoder: LoadReport) -> LoadReport:
        """One report of a network, with the names that its tensors have there."""
        both = cls(covered=encoder.covered)
        for prefix, part in (("encoder.", encoder), ("decoder.", decoder)):
            both.copied += [prefix + name for name in part.copied]
            both.new += [prefix + name for name in part.new]
            both.adapted |= {prefix + name: how for name, how in part.adapted.items()}
            both.skipped |= {prefix + name: why for name, why in part.skipped.items()}
            both.sources |= {prefix + name: source for name, source in part.sources.items()}
            both.constant += [prefix + name for name in part.constant]
        return both

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for load_report.json."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What a logger keeps: the share, the counts, and the names that should make one wonder."""
        counts = {
            name: len(getattr(self, name)) for name in ("copied", "adapted", "skipped", "new")
        }
        return {"covered": self.covered, **counts, "constant": self.constant}

    def __str__(self) -> str:
        counts = (
            f"{len(self.copied)} tensors copied, {len(self.adapted)} adapted, "
            f"{len(self.skipped)} skipped, {len(self.new)} new: "
            f"{self.covered:.1%} of the encoder's parameters"
        )
        if not self.constant:
            return counts
        return f"{counts}; WITHOUT VALUES (one number throughout): {some(self.constant)}"


@dataclass(frozen=True)
class Release(Manifest):
    """A verified release on disk, and the networks in it.

    Attributes:
        stored_channels: of the weights, where the networks are to take others; see `for_channels`.
        adapt_channels: how these are adapted.
    """

    stored_channels: int | None = None
    adapt_channels: Channels = "repeat"

    @property
    def in_channels(self) -> int:
        """Channels of the scans that its networks take."""
        return int(self.config["backbone"]["args"].get("in_channels", 1))

    def other_order(self, names: Sequence[str]) -> str:
        """Which channels of its own name stand elsewhere among those of a corpus; empty if none.

        Channels are taken by position, so all tensors would fit, and mean something else.
        """
        own, given = (
            [plain(name) for name in found] for found in (self.config.get("channels", ()), names)
        )
        both = [name for name in own if own.count(name) == 1 == given.count(name)]
        if all(own.index(name) == given.index(name) for name in both):
            return ""
        return f"has the channels {', '.join(self.config['channels'])}, not {', '.join(names)}"

    def for_channels(self, count: int, how: Channels | None = None) -> Release:
        """The same release for scans of other channels: its weights are adapted when they load.

        Args:
            count: of the scans.
            how: see `pretrain.adapters`; None shares out one channel, and makes of several no other
                number, which is meant seldom.

        Raises:
            InputError: it has several channels itself, and which is like which nobody knows.
        """
        own = self.in_channels
        if count == own:
            return self
        said = how == "repeat" if count == 1 else (how == "first" and count > own)
        if own > 1 and not said:
            way = ""
            if count == 1:
                way = ", or adapt_channels=repeat, by which one stands for all"
            elif count > own:
                way = f", or adapt_channels=first: the first {own} are those, others get zeros"
            raise InputError(
                f"{self.path}: takes {own} channels, and which of them {count} would be nobody "
                f"knows; give scans of {own}{way}"
            )
        return replace(
            self._with_channels(count), stored_channels=own, adapt_channels=how or "repeat"
        )

    def as_stored(self) -> Release:
        """The release for scans of the channels that it was trained on."""
        if self.stored_channels is None:
            return self
        return replace(self._with_channels(self.stored_channels), stored_channels=None)

    def _with_channels(self, count: int) -> Release:
        chosen = self.config["backbone"]
        args = {**chosen["args"], "in_channels": count}
        return replace(self, config={**self.config, "backbone": {**chosen, "args": args}})

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
            light = self._make(self.stored_channels)
            _check_fit(stored_shapes(weights), shapes_of(light), weights)
        try:
            light.grids(self.crop_size)
        except ValueError as error:
            raise InputError(f"{self.path}/config.json: crop_size: {error}") from error
        return self._make()

    def _make(self, channels: int | None = None) -> Backbone:
        chosen = self.config["backbone"]
        args = chosen["args"] if channels is None else {**chosen["args"], "in_channels": channels}
        where = f"{self.path}: backbone"
        try:
            return build_backbone(chosen["name"], args, where)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise InputError(f"{where}: {error}; export the release again") from error

    def load(self, encoder: nn.Module) -> LoadReport:
        """Copies the weights, strictly: all names and shapes must agree.

        Those of other channels are adapted first (`pretrain.adapters`).

        Raises:
            InputError: they do not; the message lists every tensor that differs.
        """
        weights = self.path / "model.safetensors"
        if self.stored_channels is None:
            return load_strictly(encoder, weights)
        state, how = adapted_state(read_tensors(weights), encoder, self.adapt_channels)
        return _load(encoder, state, weights, how)

    def load_decoder(self, decoder: nn.Module, *, head: bool = False) -> LoadReport:
        """Copies the decoder's weights but those of its head, which belongs to the pretraining.

        Where only its first blocks were trained, the others are new, like the head.

        Args:
            decoder: that gets them.
            head: whether the head's go along: those of a network that was finetuned for the task.

        Raises:
            InputError: there is no decoder, its weights are not those that config.json tells of,
                or it is another than `decoder`; the message lists every tensor that differs.
        """
        from pretrain.decoders import build_decoder, first_blocks  # features do without it

        if not self.has_decoder:
            raise InputError(f"{self.path}: has no decoder; transfer=encoder takes the encoder")
        weights = self.path / DECODER
        found = stored_shapes(weights)
        with torch.device("meta"):
            outputs = int(self.config["decoder"]["out_channels"])
            told = build_decoder(self._make(self.stored_channels), outputs)
        blocks, state = self.decoder_blocks, decoder.state_dict()
        wanted = shapes_of(told)
        _check_fit(found, wanted if blocks is None else first_blocks(wanted, blocks), weights)
        body = read_tensors(weights, found if head else first_blocks(found, blocks))
        how: dict[str, str] = {}
        if self.stored_channels is not None:  # UNETR's decoder reads the image too
            body, how = adapted_state(body, decoder, self.adapt_channels)
        fits = {name: tuple(tensor.shape) for name, tensor in body.items()}
        own = shapes_of(decoder)
        heads = {name: own[name] for name in fits if name in own} if head else {}
        _check_fit(fits, first_blocks(own, blocks) | heads, weights)
        _check_kinds(body, state, weights)
        decoder.load_state_dict(state | body)
        return LoadReport(
            copied=sorted(body.keys() - how.keys()),
            adapted=how,
            new=sorted(state.keys() - body.keys()),
            constant=constant_tensors(body),
        )

    def equal_but_weights(self, crop_size: Sequence[int]) -> str:
        """Hash of architecture and preprocessing: releases that share it share a scratch twin.

        Args:
            crop_size: of the training that is going to be; on which crops weights were made is
                nothing that a twin has.
        """
        parts = {name: self.config[name] for name in ("backbone", "preprocess")}
        parts["crop_size"] = list(crop_size)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TrainingState:
    """What a training goes on with.

    Attributes:
        objective: its state, by name.
        optimizer: which optimiser it was, as the settings name it.
        moments: what that kept of each parameter, by the parameter's name.
    """

    objective: Mapping[str, torch.Tensor]
    optimizer: str = ""
    moments: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Writes it as safetensors: no pickle in there either."""
        named = {f"objective.{name}": value for name, value in self.objective.items()}
        for name, kept in self.moments.items():
            named |= {f"optimizer.{kind}.{name}": value for kind, value in kept.items()}
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}
        save_file(tensors, file, metadata={"format": "pt", "optimizer": self.optimizer})

    @classmethod
    def load(cls, file: Path) -> TrainingState:
        """The inverse of `save`.

        Raises:
            CorruptionError: the file is something else.
        """
        named = read_tensors(file)
        with safe_open(file, framework="pt") as opened:
            optimizer = (opened.metadata() or {}).get("optimizer", "")
        objective: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in named.items():
            part, _, rest = name.partition(".")
            kind, _, parameter = rest.partition(".")
            if part == "objective" and rest:
                objective[rest] = value
            elif part == "optimizer" and parameter:
                moments.setdefault(parameter, {})[kind] = value
            else:
                raise CorruptionError(f"{file}: {name} is no part of a training's state")
        return cls(objective, optimizer, moments)


def load_strictly(module: nn.Module, weights: Path) -> LoadReport:
    """Copies a safetensors file into a module of exactly that shape."""
    found = stored_shapes(weights)
    _check_fit(found, shapes_of(module), weights)
    return _load(module, read_tensors(weights, found), weights, {})


def read_tensors(weights: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file: those that are named, or all.

    Raises:
        CorruptionError: it is none.
    """
    names = stored_shapes(weights) if names is None else names
    with safe_open(weights, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _load(
    module: nn.Module, state: dict[str, torch.Tensor], weights: Path, how: dict[str, str]
) -> LoadReport:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_fit(shapes, shapes_of(module), weights)
    _check_kinds(state, module.state_dict(), weights)
    module.load_state_dict(state)
    return LoadReport(
        copied=sorted(state.keys() - how.keys()),
        adapted=how,
        covered=1.0,
        constant=constant_tensors(state),
    )


def _check_kinds(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], weights: Path
) -> None:
    """Copying takes whole numbers for fractions, without a word."""
    problems = [
        f"{weights}: {name} is {value.dtype}, expected {own[name].dtype}"
        for name, value in state.items()
        if value.is_floating_point() != own[name].is_floating_point()
    ]
    if problems:
        raise InputError(problems[:10])


def constant_tensors(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of weights that have one value throughout: matrices, kernels, tables and tokens.

    Biases, norms and factors, of one axis each, may do so.
    """
    return sorted(
        name
        for name, tensor in state.items()
        if sum(side > 1 for side in tensor.shape) > 1
        and bool((tensor == tensor.flatten()[0]).all())
    )


def shapes_of(module: nn.Module) -> Shapes:
    """Names and shapes of a module's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


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


def load_release(ref: str | Path) -> Release:
    """Opens a release and verifies every byte of it; raises as `read_manifest`."""
    read = read_manifest(ref)
    return Release(read.path, read.config, read.preprocess, read.digest)


# Writing.


def golden_scan() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A small smooth scan in P, I, R axes with three different spacings, tilted a little."""
    rng = np.random.default_rng(0)
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
    training: TrainingState | None = None,
    plan: Mapping[str, Any] | None = None,
    outputs: Callable[[Path], dict[str, torch.Tensor]] | None = None,
    check: Callable[[Path], object] | None = None,
) -> Release:
    """Writes a release beside `output` and moves it there when it is whole and verified.

    Args:
        output: folder that is made.
        encoder: with its weights.
        config: as `ReleaseConfig` has it.
        fingerprints: as `Fingerprints` has them.
        card: README.md.
        decoder: with its weights.
        training: what a full release has more.
        plan: adaptation_plan.json, where there is one.
        outputs: from the folder so far, what the golden scan gives beside features.
        check: loads the release as its user would and compares; `check_golden` if it is not given.

    Raises:
        InputError: `output` exists and is not empty.
    """
    from pretrain.encoder import Encoder

    with atomic_folder(output) as folder:
        _save_weights(encoder, folder / "model.safetensors")
        if decoder is not None:
            _save_weights(decoder, folder / DECODER, (config["decoder"] or {}).get("blocks"))
        if training is not None:
            training.save(folder / TRAINING)
        write_json(folder / "config.json", config)
        if plan is not None:
            write_json(folder / PLAN_FILE, plan)
        write_json(folder / "fingerprints.json", fingerprints)
        write_text(folder / "README.md", card)
        values, affine = golden_scan()
        scan = nib.Nifti1Image(values, affine).to_bytes()
        # Without the time in gzip's header: the same run gives the same release.
        write_bytes(folder / "golden_input.nii.gz", gzip.compress(scan, mtime=0))
        preprocess = Preprocess.from_dict(config["preprocess"])
        probe = Encoder(encoder.cpu(), preprocess, config)
        golden = golden_features(probe, folder) | (outputs(folder) if outputs else {})
        save_file(golden, folder / "golden_output.safetensors")
        names = (*FILES, *(name for name in OPTIONAL if (folder / name).exists()))
        sums = "".join(f"{file_digest(folder / name)}  {name}\n" for name in names)
        write_text(folder / "SHA256SUMS", sums)
        (check or check_golden)(folder)
    return load_release(output)


def _save_weights(module: nn.Module, file: Path, blocks: int | None = None) -> None:
    from pretrain.decoders import first_blocks

    state = module.state_dict()
    chosen = state if blocks is None else first_blocks(state, blocks)
    weights = {name: value.contiguous().cpu() for name, value in chosen.items()}
    save_file(weights, file, metadata={"format": "pt"})


def golden_modality(modalities: Sequence[str]) -> str:
    """What the golden scan is taken for."""
    return "MR" if "MR" in modalities else modalities[0]


def golden_features(encoder: Encoder, folder: Path) -> dict[str, torch.Tensor]:
    """The features of a release's golden scan, which is every channel of an encoder of several."""
    scans = [folder / "golden_input.nii.gz"] * encoder.module.in_channels
    features = encoder.features(scans, modality=golden_modality(encoder.config["modalities"]))
    return {"map": torch.from_numpy(features.map), "vector": torch.from_numpy(features.vector)}


def check_golden(path: Path) -> float:
    """Loads a release as a user would and compares the golden features.

    Returns:
        The largest error, relative to the largest feature.

    Raises:
        CorruptionError: it is above the tolerance.
    """
    from pretrain.encoder import load_encoder

    return compare_golden(path, golden_features(load_encoder(path), path))


def relative_error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The largest difference over the largest expected value.

    Infinite where shapes differ, one is missing or an error is NaN, which `max` would let pass.
    """
    if found is None or expected is None or found.shape != expected.shape:
        return math.inf
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return math.inf if math.isnan(error) else error


def compare_golden(path: Path, found: dict[str, torch.Tensor]) -> float:
    """Compares what the golden scan gives now with what a release says; as `check_golden`."""
    worst, golden = 0.0, path / "golden_output.safetensors"
    stored = read_tensors(golden)
    for name, value in found.items():
        worst = max(worst, relative_error(value, stored.get(name)))
    if not worst <= TOLERANCE:
        raise CorruptionError(
            f"{path}: the golden scan gives features that differ by {worst:.1e} (relative), "
            f"allowed {TOLERANCE:.0e}; weights or preprocessing are not what was released"
        )
    return worst
