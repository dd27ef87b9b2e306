"""Write the table of families that `pahq families` reads, and people.

$ python -m benchmarks.family_table
"""

from __future__ import annotations

from pahq_hf.circuit.files import write_text
from pahq_hf.modeling.architectures.describe import describe_families
from pahq_hf.modeling.architectures.shipped import TABLE_PATH, written


def main() -> None:
    """Rewrite it."""
    write_text(TABLE_PATH, written(describe_families()))


if __name__ == "__main__":
    main()
