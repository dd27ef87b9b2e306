"""`pahq families`: the model families that are supported."""

from __future__ import annotations

from typing import Annotated

import typer

from pahq_hf.cli.output import JsonOption, print_json, print_rich
from pahq_hf.errors import ConfigError


def families(
    family: Annotated[str | None, typer.Argument(help="Show where this one keeps its parts.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Supported model families, and how their blocks are read."""
    from pahq_hf.cli.tables import facts_table, families_table
    from pahq_hf.modeling.architectures.shipped import stored_families

    facts = [row for row in stored_families() if family in (None, row.family)]
    if not facts:
        raise ConfigError(f"model family {family!r} is not supported; see: pahq families")
    if as_json:
        print_json({"families": [row.to_dict() for row in facts]})
    elif family is None:
        print_rich(families_table(facts))
    else:
        print_rich(*(facts_table(row.to_dict()) for row in facts))
