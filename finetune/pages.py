"""Pages that stand on their own, made of the templates beside this file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values; text in them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(values)


def data_uri(data: bytes, kind: str) -> str:
    """Bytes that a page carries in itself."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
