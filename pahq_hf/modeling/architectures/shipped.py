"""Facts about the supported families as a table that comes with the package.

They follow from rows and configs (`architectures.describe_families`), for which torch and transformers have
to be imported; a list of names need not wait for that. `python -m benchmarks.family_table` writes the table.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

TABLE_PATH = Path(__file__).with_name("families.csv")


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
    with TABLE_PATH.open(encoding="utf-8", newline="") as file:
        return [FamilyFacts(**row) for row in csv.DictReader(file)]


def written(families: Sequence[FamilyFacts]) -> str:
    """The table as a file."""
    file = io.StringIO()
    table = csv.DictWriter(file, [field.name for field in fields(FamilyFacts)], lineterminator="\n")
    table.writeheader()
    table.writerows(row.to_dict() for row in families)
    return file.getvalue()
