"""Arguments of a class, read off its source: what a configuration can give it, without importing.

The classes that configurations name need torch, which takes seconds; their help does not.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import config_text


class Argument(NamedTuple):
    """Default of an argument as a configuration has it, ??? without one, and what it is."""

    default: str
    about: str


def class_arguments(path: str) -> dict[str, Argument]:
    """Arguments of `package.module.Class` by name; none where its source cannot be read."""
    module, _, name = path.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(str(spec and spec.origin)).read_text())
    except (ImportError, ValueError, OSError, SyntaxError):
        return {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            about = _documented(ast.get_docstring(node) or "")
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    return {n: Argument(d, about.get(n, "")) for n, d in _defaults(part.args)}
    return {}


def _defaults(arguments: ast.arguments) -> list[tuple[str, str]]:
    plain = arguments.args[1:]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    pairs = zip([*plain, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], strict=True)
    return [(argument.arg, _text(default)) for argument, default in pairs]


def _text(default: ast.expr | None) -> str:
    if default is None:
        return "???"
    try:
        return config_text(ast.literal_eval(default))
    except ValueError:
        return ast.unparse(default)


def _documented(docstring: str) -> dict[str, str]:
    """What the `Args:` of a docstring say."""
    section = re.search(r"^Args:\n((?: +.*\n?)+)", inspect.cleandoc(docstring), re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M)
    plain = {name: " ".join(text.split()).rstrip(".") for name, text in found}
    return {name: re.sub(r"\bNone\b", "null", text) for name, text in plain.items()}
