"""Public weights as a release: what a file of weights does not say is told once, and kept.

Which spacing, which intensities, which axes, which crop: a file of weights has none of it, and
features that come from a wrong guess look like features. So nothing is guessed. Of checkpoints that
are known by name (`pretrain.registry`) it is written down there with its source; of others whoever
has the file tells it. The release that is made has all of it in its config.json, and everything
that takes releases takes it: features, finetuning, comparisons, further pretraining.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.errors import InputError, near, plain_message
from data_prep.files import file_digest, make_folder
from data_prep.licences import UNSTATED
from data_prep.preprocess import Preprocess, Rule
from data_prep.settings import Millimetres
from pretrain.backbones.axes import Axes
from pretrain.cache import cache_folder
from pretrain.fetch import resolve
from pretrain.foreign import Foreign, open_foreign
from pretrain.manifest import FORMAT
from pretrain.registry import KNOWN
from pretrain.release import Release, write_release
from pretrain.run_folder import versions
from pretrain.settings import Side


class Told(BaseModel):
    """What a release needs and a file of weights does not tell.

    Attributes:
        modalities: that it was trained on.
        crop_size: voxels (D, H, W) that it was trained on, on our axes.
        spacing_mm: (d, h, w) that its scans were resampled to; null: they kept their own.
        CT: how HU become its values.
        MR: how values of MRI become its values.
        axes: codes of its images' axes, such as RAS.
        name: what the release is called.
        licence: of the weights.
        page: where its makers tell of it.
        data: what it was trained on, in words.
        note: what else its user must know.
        arguments: of our backbone, which no tensor shows.
    """

    model_config = ConfigDict(extra="forbid")

    modalities: Annotated[list[Literal["CT", "MR"]], Field(min_length=1, max_length=2)]
    crop_size: tuple[Side, Side, Side]
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres] | None
    CT: Rule | None = None
    MR: Rule | None = None
    axes: Axes = "SPL"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]{0,99}$")]
    licence: str = UNSTATED
    page: str = ""
    data: str = ""
    note: str = ""
    arguments: dict[str, Any] = {}

    @model_validator(mode="after")
    def _every_modality_has_its_rule(self) -> Self:
        for modality in self.modalities:
            if getattr(self, modality) is None:
                raise ValueError(
                    f"{modality}: missing; how do its values become those of the network? For "
                    f"example {modality}={EXAMPLES[modality]}"
                )
        return self

    def preprocess(self) -> Preprocess:
        """As a list of operations; a modality that it was not trained on has the usual rule."""
        rules = {one: getattr(self, one) for one in ("CT", "MR") if getattr(self, one) is not None}
        plain = {one: rule.model_dump(exclude_none=True) for one, rule in rules.items()}
        return Preprocess.default(self.spacing_mm, intensity=plain)


EXAMPLES = {"CT": "{rule: window, low: -175, high: 250, onto: [0, 1]}", "MR": "{rule: zscore}"}


def adopt(ref: str | Path, output: Path, told: Mapping[str, Any] | None = None) -> Release:
    """Writes a release of a file of public weights.

    Args:
        ref: the file, a reference to one or the name of a known checkpoint.
        output: folder that is made.
        told: keys of `Told`, and arguments of our backbone; they go before what is known.

    Raises:
        InputError: the file is of no layout or does not fit, or something is left untold; all that
            is missing is said at once.
    """
    file, named = resolve(ref), _known(ref)
    if not file.is_file():
        raise InputError(
            f"{ref}: is no run and no file of weights; give one, or a name that "
            "`voxelith fetch --list` has"
        )
    facts = _facts(file, {**named, **(told or {})}, str(ref))
    return _write(file, output, facts)


def released(ref: str | Path) -> Path:
    """The folder of a release; of a known checkpoint of others it is made once, in the cache.

    A path is left alone where nothing lies: whoever opens it says so.

    Raises:
        InputError, UnreachableError: as `resolve`; it is a file of weights that is not known.
    """
    path, known = resolve(ref), _known(ref)
    if not path.is_file():
        return path
    if not known:
        raise InputError(
            f"{ref}: is a file of weights, which does not say what a scan must be turned into; "
            "`voxelith export FILE OUT` with what its makers tell makes a release of it, see "
            "`voxelith export --help`"
        )
    facts = _facts(path, known, str(ref))
    text = json.dumps(facts.model_dump(mode="json"), sort_keys=True)
    key = hashlib.sha256(f"{file_digest(path)} {text}".encode()).hexdigest()
    place = cache_folder() / "adopted" / key / facts.name
    if not place.is_dir():
        make_folder(place.parent, "VOXELITH_CACHE")
        print(f"{ref}: is made a release of, once: {place}")
        try:
            _write(path, place, facts)
        except InputError:
            if not place.is_dir():  # another process may have been faster
                raise
    return place


def _known(ref: str | Path) -> dict[str, Any]:
    one = KNOWN.get(str(ref))
    if one is None or one.told is None:
        return {}
    said = {"name": one.name, "licence": one.licence, "page": one.page, "data": one.about}
    return {**said, "note": one.note, **one.told}


def _facts(file: Path, told: Mapping[str, Any], ref: str) -> Told:
    """What is told, and what is left of it for the backbone.

    Raises:
        InputError: something is missing or wrong; all of it.
    """
    fields = {name for name in Told.model_fields if name != "arguments"}
    own = {name: value for name, value in told.items() if name in fields}
    arguments = {name: value for name, value in told.items() if name not in fields}
    arguments |= arguments.pop("arguments", {})
    default = {"name": file.stem}
    try:
        return Told.model_validate({**default, **own, "arguments": arguments})
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            key = str(item["loc"][0]) if item["loc"] else ""
            if item["type"] == "missing":
                problems.append(f"{ref}: {key}: missing; {_MEANING[key]}")
            else:
                said = plain_message([item], len(item["loc"]))
                problems.append(f"{ref}: {key + ': ' if key else ''}{said}")
        if arguments:
            problems += [
                f"{ref}: {name}: is taken for an argument of the backbone; {near(name, fields)}"
                for name in arguments
            ]
        raise InputError(problems) from error


_MEANING = {
    "modalities": "what it was trained on: modalities=[CT], [MR] or [CT,MR]",
    "crop_size": "voxels (D, H, W) of its training: crop_size=[96,96,96]",
    "spacing_mm": "what its scans were resampled to, (d, h, w): spacing_mm=[1.5,1.5,1.5], or null",
}


def _write(file: Path, output: Path, facts: Told) -> Release:
    found = open_foreign(file, facts.arguments, axes=facts.axes, crop_size=facts.crop_size)
    encoder = found.build()
    try:
        encoder.grids(facts.crop_size)
    except ValueError as error:
        raise InputError(f"{file}: crop_size: {error}") from error
    digest = file_digest(file)
    config = {
        "format": FORMAT,
        "name": facts.name,
        "kind": "encoder",
        "backbone": found.backbone,
        "objective": {"name": "of others", "args": {}},
        "crop_size": list(facts.crop_size),
        "modalities": sorted(facts.modalities),
        "preprocess": facts.preprocess().to_dict(),
        "training": {
            "layout": found.layout,
            "sha256": digest,
            "axes": facts.axes,
            **{k: v for k, v in (("page", facts.page), ("note", facts.note)) if v},
            "tensors": found.report.to_dict(),
        },
        "data": {
            "samples": None,
            "source": {facts.data or f"{UNSTATED} by {facts.name}": None},
            "licence": {facts.licence: None},
        },
        "versions": versions(),
    }
    return write_release(
        output,
        encoder=encoder,
        config=config,
        # No corpus has it, so the leakage gate takes it for no answer.
        fingerprints={"format": 1, "values": [f"unknown:{digest}"]},
        card=_card(config, facts, found),
    )


def _card(config: Mapping[str, Any], facts: Told, found: Foreign) -> str:
    report, operations = found.report, config["preprocess"]["operations"]
    changed = "\n".join(f"- `{name}`: {how}" for name, how in sorted(report.adapted.items()))
    parameters = sum(tensor.numel() for tensor in found.state.values())
    spacing = facts.spacing_mm
    grid = f"resampled to {list(spacing)} mm" if spacing else "kept at its own spacing"
    rules = "; ".join(
        f"{modality}: {json.dumps(operations[2][modality])}" for modality in facts.modalities
    )
    return f"""# {facts.name}

Public weights of others ({found.layout}), as an encoder of Voxelith. Its makers' page: \
{facts.page or "not told"}.

```python
import voxelith

encoder = voxelith.load_encoder("path/to/this/folder")
features = encoder.features("scan.nii.gz")
features.map, features.affine, features.vector
```

**Licence of the weights: {facts.licence}.** It is for you to judge what it allows.

| | |
| --- | --- |
| architecture | `{config["backbone"]["name"]}`, {parameters:,} parameters |
| trained on | {facts.data or "not told"} |
| modalities | {", ".join(facts.modalities)} |
| crops | {list(facts.crop_size)} voxels |
| a scan is | turned to S, P, L axes and {grid}; {rules} |
| its images' axes were | {facts.axes} |
| file | sha256 {config["training"]["sha256"]} |
| note | {facts.note or "none"} |

How a scan is prepared was told by hand from what the makers say, not read from the weights: see
their page. {len(report.copied)} tensors are copied, {len(report.adapted)} adapted, \
{len(report.skipped)} left out; config.json lists them.

{"Adapted:" if changed else "None was adapted."}

{changed}

## Limits

What these weights have seen is not known volume by volume, so `voxelith finetune` calls results
on any test set `unknown`, never clean.
"""
