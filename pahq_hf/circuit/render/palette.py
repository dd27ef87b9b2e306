"""The colours of circuits, in one place: of the page, of the still picture, of plots and of DOT files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pahq_hf.circuit.graph import ReaderKind
from pahq_hf.errors import ConfigError


@dataclass(frozen=True)
class Palette:
    """Colours on one ground, each as `#rrggbb`.

    Attributes:
        ground: The ground.
        panel: Of what stands beside the drawing.
        ink: Text, and the ends of the stream: `input` and `logits`.
        faint: Text of less weight.
        line: Borders.
        grid: Rows.
        dim: What is not highlighted, and what serves for comparison.
        accent: Controls, and single curves.
        chosen: The highlighted node.
        head: Attention heads.
        mlp: MLPs.
        edges: Edges by what is computed from them.
        sets: Edges of only A, only B and both, where two circuits are compared.
    """

    ground: str
    panel: str
    ink: str
    faint: str
    line: str
    grid: str
    dim: str
    accent: str
    chosen: str
    head: str
    mlp: str
    edges: Mapping[ReaderKind, str]
    sets: tuple[str, str, str]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            several = value.values() if isinstance(value, dict) else value
            for colour in [value] if isinstance(value, str) else several:
                if not re.fullmatch(r"#[0-9a-fA-F]{6}", str(colour)):
                    raise ConfigError(f"a colour is written as #rrggbb; {name} has {colour!r}")

    @property
    def nodes(self) -> dict[str, str]:
        """Colours of nodes by kind."""
        return {"input": self.ink, "head": self.head, "mlp": self.mlp, "logits": self.ink}

    def for_scripts(self) -> dict[str, Any]:
        """What the page's scripts draw with."""
        plain = {name: getattr(self, name) for name in ("ink", "ground", "grid", "faint", "dim", "chosen")}
        return {**plain, "nodes": self.nodes, "edges": dict(self.edges), "sets": list(self.sets)}

    def for_styles(self) -> str:
        """Custom properties for a style sheet."""
        names = ("ground", "panel", "ink", "faint", "line", "accent")
        return "".join(f"--{name}:{getattr(self, name)};" for name in names)


LIGHT = Palette(
    ground="#ffffff",
    panel="#f5f6f8",
    ink="#1c2127",
    faint="#5c6670",
    line="#d5dae0",
    grid="#eceff2",
    dim="#9aa4ae",
    accent="#0b62b8",
    chosen="#d0021b",
    head="#5b6b7b",
    mlp="#9b4f96",
    edges={"q": "#0072b2", "k": "#d98a00", "v": "#009e73", "mlp": "#b3589a", "logits": "#d55e00"},
    sets=("#0072b2", "#d55e00", "#7a8590"),
)
DARK = Palette(
    ground="#14171b",
    panel="#1d2126",
    ink="#e6e9ed",
    faint="#a0a9b3",
    line="#363d46",
    grid="#22272d",
    dim="#5d6671",
    accent="#6db8ff",
    chosen="#ff6b6b",
    head="#8d9cab",
    mlp="#d08bc5",
    edges={"q": "#56b4e9", "k": "#f0b030", "v": "#2fc79b", "mlp": "#e08cc8", "logits": "#ff8a4c"},
    sets=("#56b4e9", "#ff8a4c", "#98a3ae"),
)
