"""A public layout: how it is told, which backbone of ours it is, and where each tensor goes.

One module per family holds the layouts; what all of them have in common is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.backbones.backbone import Backbone
from pretrain.manifest import Shapes
from pretrain.release import LoadReport, constant_tensors, shapes_of

Placed = tuple[dict[str, Tensor], str]
"""What a public tensor is here, by our names, and how it was adapted; or nothing, and why."""

NOT_OURS = "no part of the encoder"


class Untold(str):
    """In place of an argument that neither tensors nor file tell: why it is needed."""


@dataclass(frozen=True)
class Found:
    """A network within a file, without its values.

    Attributes:
        shapes: by the names of its encoder, without what precedes them.
        root: what precedes them.
        others: what lies outside of it, by whole names.
        facts: what the file says beside the weights.
    """

    shapes: Shapes
    root: str = ""
    others: Shapes = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A family of public files.

    Attributes:
        name: for reports.
        backbone: our class, as a release names it.
        mark: a tensor that the encoder has in every such file. What precedes this name in a file
            precedes all names of the encoder, and is free: `module.`, `backbone.`, none.
        recognises: from names (without what precedes them) and shapes, whether it is this layout.
        arguments: of our class, as far as the file tells them; an `Untold` where it does not.
        place: where a tensor goes, from its name, all tensors and the encoder; raises ValueError
            if the encoder has no place for it or computes something else.
        beside: why a tensor that is not below the prefix is left out; raises ValueError as well.
        second_names: patterns of names under which tensors are stored once more, and the first.
        hidden: arguments of an encoder that its tensors do not show, to compare with `arguments`.
        preprocessing: what the file says about it, as plain data.
        never_behind: what may not precede the mark: there it is of another layout.
        axes: how images on other axes are taken: by an argument of the encoder, by weights that
            are turned (`pretrain.foreign.axes`), or not at all.
    """

    name: str
    backbone: str
    mark: str
    recognises: Callable[[Shapes], bool]
    arguments: Callable[[Found], dict[str, Any]]
    place: Callable[[str, Mapping[str, Tensor], Any], Placed]
    beside: Callable[[str, Tensor, Any], str] = lambda name, tensor, encoder: NOT_OURS
    second_names: Mapping[str, str] = field(default_factory=dict)
    hidden: Callable[[Any], dict[str, Any]] = lambda encoder: {}
    preprocessing: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda facts: None
    never_behind: tuple[str, ...] = ()
    axes: Literal["argument", "weights", "none"] = "none"

    def roots(self, shapes: Shapes) -> list[str]:
        """What precedes the encoder's names, for each network of this layout in a file."""
        ends = [name for name in shapes if name == self.mark or name.endswith(f".{self.mark}")]
        roots = [name.removesuffix(self.mark) for name in ends]
        return [
            root
            for root in roots
            if not root.endswith(self.never_behind) and self.recognises(below(shapes, root))
        ]

    def sizes(self, file: Found) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What `arguments` and `preprocessing` read.

        Raises:
            InputError: tensors, or what the file says beside them, are of another kind.
        """
        try:
            return self.arguments(file), self.preprocessing(file.facts)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise InputError(f"is of no size or plan of {self.name} ({said})") from error


def below(named: Mapping[str, Any], root: str) -> dict[str, Any]:
    """What lies under a prefix, without it."""
    return {n.removeprefix(root): value for n, value in named.items() if n.startswith(root)}


def root_of(layout: Layout, weights: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """The prefix of a file's encoder, and the names under which parts of it are stored once more.

    Raises:
        InputError: there are several networks that differ, and none is a teacher.
    """
    roots = sorted(layout.roots(_shapes(weights)), key=lambda root: (len(root), root))
    teachers = [root for root in roots if "teacher" in root]
    root = teachers[0] if len(teachers) == 1 else roots[0]
    again: dict[str, str] = {}
    for other in roots:
        if other == root:
            continue
        names = {
            other + name: root + name
            for name in below(weights, other)
            if not any(
                (other + name).startswith(r) for r in roots if r != other and r.startswith(other)
            )
        }
        differ = [name for name, first in names.items() if not _equal(weights, name, first)]
        if not differ:
            again |= names
        elif root not in teachers:
            raise InputError(
                f"holds several networks of {layout.name}, with names that begin with "
                f"{', '.join(repr(r) for r in roots)}, which differ ({differ[0]}); keep one"
            )
    for name in below(weights, root):
        for pattern, first in layout.second_names.items():
            if re.search(pattern, name):
                again[root + name] = root + re.sub(pattern, first, name)
    return root, again


def convert(
    layout: Layout,
    weights: Mapping[str, Tensor],
    encoder: Backbone,
    facts: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Gives public weights the names and shapes of an encoder; all of it must come from them.

    Args:
        layout: of the weights.
        weights: by their names in the file.
        encoder: of ours, which may be without memory.
        facts: what the file says beside them, which the encoder must agree with.

    Returns:
        The encoder's tensors in float32 where they are fractions, and what became of each tensor:
        of the encoder as copied or adapted, of others as skipped.

    Raises:
        InputError: they are another network's, or lack something; the message lists every tensor
            that does not fit.
    """
    wanted = shapes_of(encoder)
    kinds = {name: value.is_floating_point() for name, value in encoder.state_dict().items()}
    root, again = root_of(layout, weights)
    inside = {n: t for n, t in below(weights, root).items() if root + n not in again}
    found: dict[str, Tensor] = {}
    report = LoadReport()
    problems = _disagreements(layout, found_in(weights, root, facts), encoder)
    for name, tensor in weights.items():
        try:
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError("has values that are not finite")
            if name in again:
                if not _equal(weights, name, again[name]):
                    raise ValueError(f"differs from {again[name]}, whose second name it is")
                report.skipped[name] = f"second name of {again[name]}"
                continue
            if not name.startswith(root):
                report.skipped[name] = layout.beside(name, tensor, encoder)
                continue
            placed, how = layout.place(name.removeprefix(root), inside, encoder)
            for own, value in placed.items():
                if tuple(value.shape) != wanted.get(own):
                    expected = list(wanted[own]) if own in wanted else "nothing of that name"
                    raise ValueError(f"has shape {list(value.shape)}, the encoder {expected}")
                if value.is_floating_point() != kinds[own]:
                    raise ValueError(f"is {value.dtype}, which no weight of an encoder is")
                if own in found:
                    raise ValueError(f"is {own}, which {report.sources.get(own, own)} is already")
        except (LookupError, RuntimeError, ValueError) as error:
            problems.append(f"{name}: {error}")
            continue
        found |= placed
        report.sources |= {own: name for own in placed if own != name}
        if not placed:
            report.skipped[name] = how
        elif how:
            report.adapted |= dict.fromkeys(placed, how)
        else:
            report.copied += placed
    problems += [f"{own}: is not in the file" for own in wanted.keys() - found.keys()]
    if problems:
        raise InputError(sorted(problems))
    report.covered = 1.0
    report.constant = constant_tensors(found)
    return {n: t.float() if t.is_floating_point() else t for n, t in found.items()}, report


def _disagreements(layout: Layout, file: Found, encoder: Backbone) -> list[str]:
    told, _ = layout.sizes(file)
    return [
        f"backbone.{name}={value}: these weights were trained with {told[name]}"
        for name, value in layout.hidden(encoder).items()
        if name in told and not isinstance(told[name], Untold) and told[name] != value
    ]


def found_in(
    weights: Mapping[str, Tensor], root: str, facts: Mapping[str, Any] | None = None
) -> Found:
    """What there is to read sizes from."""
    shapes = _shapes(weights)
    others = {name: shape for name, shape in shapes.items() if not name.startswith(root)}
    return Found(below(shapes, root), root, others, facts or {})


def _equal(weights: Mapping[str, Tensor], name: str, first: str) -> bool:
    return first in weights and torch.equal(weights[name], weights[first])


def _shapes(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


# Sizes, from shapes.


def count(shapes: Shapes, pattern: str) -> int:
    """Of parts that are numbered without gaps from 0, by a pattern with the number as its group."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    return next(n for n in range(len(numbers) + 1) if n not in numbers)


def ratio(hidden: int, width: int) -> float | Untold:
    """The ratio of which a class makes exactly this hidden width, cutting fractions off."""
    if not hidden:
        return Untold(
            "mlp_ratio: the blocks have no mlp.fc1, as those of DINOv2's and DINOv3's largest "
            "models, which no encoder here computes"
        )
    found = hidden / width
    return found if int(width * found) == hidden else math.nextafter(found, math.inf)


def published(sizes: Mapping[int, int], width: int, argument: str) -> int | Untold:
    """What goes with a published width, if it is one."""
    known = ", ".join(f"{value} at {key}" for key, value in sizes.items())
    reason = f"no tensor shows it, and a width of {width} was not published ({known})"
    return sizes.get(width, Untold(f"{argument}: {reason}"))


def cube(cells: int, axes: int = 3) -> int | None:
    """The side of a grid of so many cells with equal sides, if there is one."""
    side = round(cells ** (1 / axes))
    return side if side**axes == cells else None
