"""Arguments checked against the signature of the class that takes them.

A class that a config names declares types and bounds in its own signature, such as
`mask_ratio: Annotated[float, Field(gt=0, lt=1)]`. The same check serves a user's config and a
downloaded release, so a new objective brings its own and needs no entry anywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import typing
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_prep.errors import InputError, near, plain_message
from pretrain.backbones.backbone import Backbone


def check_arguments(
    target: type, arguments: Mapping[str, Any], where: str, given: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Checks keyword arguments for a class.

    Args:
        target: the class.
        arguments: what a config says.
        where: prefix for messages, such as `objective`.
        given: names that the program itself passes.

    Returns:
        The arguments in the types of the signature, and the problems.
    """
    signature = inspect.signature(target)
    hints = typing.get_type_hints(inspect.unwrap(vars(target)["__init__"]), include_extras=True)
    known = [name for name in signature.parameters if name not in given]
    values: dict[str, Any] = {}
    problems = []
    for name, value in arguments.items():
        if name not in known:
            problems.append(f"{where}.{name}: unknown; {near(name, known)}")
            continue
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(hints.get(name, Any))
            values[name] = adapter.validate_python(value)
        except ValidationError as error:
            said = plain_message(error.errors(include_url=False))
            problems.append(f"{where}.{name}={value}: {said}")
    for name in known:
        if signature.parameters[name].default is inspect.Parameter.empty and name not in arguments:
            problems.append(f"{where}.{name}: missing; {target.__name__} needs it")
    return values, problems


def split_target(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Separates `_target_` from the arguments beside it."""
    arguments = {name: value for name, value in config.items() if name != "_target_"}
    return str(config["_target_"]), arguments


def locate(path: str, where: str) -> type:
    """Imports the class that a user's own config names.

    Raises:
        InputError: there is no such module or class.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{where}._target_={path}: cannot be imported ({error}); "
            "give package.module.Class of something installed or on PYTHONPATH"
        ) from error
    if not inspect.isclass(found):
        raise InputError(f"{where}._target_={path}: is no class")
    return found


def build(config: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Makes what a user's own config names; downloaded files never come here."""
    path, arguments = split_target(config)
    target = locate(path, where)
    values, problems = check_arguments(target, arguments, where, given)
    if problems:
        raise InputError(problems)
    return target(**values, **given)


def allowed_name(target: type, package: str) -> str:
    """`vit.ViT3D` for a class of `pretrain.backbones`; other classes keep their whole path."""
    path = f"{target.__module__}.{target.__qualname__}"
    return path.removeprefix(f"{package}.")


def build_backbone(name: str, arguments: Mapping[str, Any], where: str) -> Backbone:
    """Makes the backbone that a release names, if it is one of ours.

    Nothing downloaded chooses what is imported: the name must be `module.Class` of a module that
    lies directly in `pretrain.backbones` and defines that class, and its arguments must fit the
    bounds in its signature before anything is allocated.
    """
    package = "pretrain.backbones"
    refusal = (
        f"{where}={name!r}: is not one of our backbones; "
        "a release may name nothing else, so this one is damaged, foreign or not to be trusted"
    )
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 2 or not all(part.isidentifier() and part[0] != "_" for part in parts):
        raise InputError(refusal)
    spec = importlib.util.find_spec(f"{package}.{parts[0]}")
    if spec is None:
        raise InputError(refusal)
    module = importlib.import_module(f"{package}.{parts[0]}")
    target = getattr(module, parts[1], None)
    if not (inspect.isclass(target) and target.__module__ == module.__name__):
        raise InputError(refusal)
    # Backbones state bounds for keyword arguments; parts and bases of backbones have none to check.
    kinds = {p.kind for p in inspect.signature(target).parameters.values()}
    if not issubclass(target, Backbone) or kinds != {inspect.Parameter.KEYWORD_ONLY}:
        raise InputError(refusal)
    values, problems = check_arguments(target, arguments, where)
    if problems:
        raise InputError(problems)
    return target(**values)
