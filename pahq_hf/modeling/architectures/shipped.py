"""Facts about the supported families as a table that comes with the package.

They follow from rows and configs (`architectures.describe_families`), for which torch and transformers have
to be imported; a list of names need not wait for that. `python -m benchmarks.family_tables` writes the table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

TABLE_PATH = Path(__file__).with_name("families.json")


@dataclass(frozen=True)
class FamilyFacts:
    """How one family, or a variant of it, is read.

    Attributes:
        family: `config.model_type`.
        variant: Which configs this is about; empty for the default one.
        layers: Where the decoder layers are.
        attention: Norm, projections, output projection, and what follows.
        mlp: The same of the MLP.
        blocks: `sequential`, or `parallel` when both read the same stream.
        positions: How positions enter.
        also: What else differs from Llama.
    """

    family: str
    variant: str
    layers: str
    attention: str
    mlp: str
    blocks: str
    positions: str
    also: str

    @property
    def name(self) -> str:
        """Family and variant."""
        return f"{self.family} ({self.variant})" if self.variant else self.family

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return asdict(self)


def stored_families() -> list[FamilyFacts]:
    """The families of the package and their variants, in order; not those that a program registered.

    Returns:
        What `architectures.describe_families` says of them.
    """
    rows = json.loads(TABLE_PATH.read_text(encoding="utf-8"))
    return [FamilyFacts(**row) for row in rows]
