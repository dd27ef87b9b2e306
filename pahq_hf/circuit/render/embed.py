"""What goes into a page that runs scripts: data that cannot be markup, scripts known by their hashes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pahq_hf.circuit.terminal import printable

_LONGEST = 120
# JSON inside HTML: nothing may look like markup, and the two separators end lines in old scripts.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def embedded_json(data: Any) -> Markup:
    """Data as JSON that is safe inside a script element."""
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES))


def readable(text: str) -> str:
    """Text from a file, made harmless to look at: short, control and direction characters as escapes."""
    text = printable(text)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def one_line_ends(text: str) -> str:
    """A browser hashes a script after it has made every line end a newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def script_hashes(scripts: Sequence[str]) -> str:
    """What a page's policy names: only these very scripts run."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def templates() -> Environment:
    """The package's page templates; what goes into them is escaped."""
    return Environment(
        loader=PackageLoader("pahq_hf.circuit.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def source(pages: Environment, name: str) -> str:
    """A file as it is: scripts and styles are full of braces, so they are no templates."""
    assert pages.loader is not None
    return one_line_ends(pages.loader.get_source(pages, name)[0])
