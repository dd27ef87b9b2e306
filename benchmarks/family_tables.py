"""Write the tables of families in README.md and docs/families.md, and the one that `pahq families` reads.

$ python -m benchmarks.family_tables
"""

from __future__ import annotations

import json
from pathlib import Path

from pahq_hf.circuit.files import write_text
from pahq_hf.cli.tables import families_markdown
from pahq_hf.modeling.architectures.describe import describe_families
from pahq_hf.modeling.architectures.shipped import TABLE_PATH

ROOT = Path(__file__).parent.parent
START, END = "<!-- families: made by python -m benchmarks.family_tables -->", "<!-- end of families -->"


def with_table(text: str, table: str) -> str:
    """A document with this table between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table}\n\n{END}{after}"


def documents() -> dict[Path, str]:
    """All three files as they should be."""
    facts = describe_families()
    wide = f"{families_markdown(facts)}\n\n{families_markdown(facts, paths=True)}"
    tables = {ROOT / "README.md": families_markdown(facts), ROOT / "docs" / "families.md": wide}
    rows = json.dumps([row.to_dict() for row in facts], indent=1, ensure_ascii=False) + "\n"
    written = {path: with_table(path.read_text(encoding="utf-8"), table) for path, table in tables.items()}
    return written | {TABLE_PATH: rows}


def main() -> None:
    """Rewrite them."""
    for path, text in documents().items():
        write_text(path, text)


if __name__ == "__main__":
    main()
