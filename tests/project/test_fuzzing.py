"""`tools/fuzz_readers.py` finds what is wrong, and nothing where a few rounds are."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fuzz_readers import Target, one_round, targets

from pahq_hf.errors import CircuitError

ROUNDS = 6


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_damaged_files_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    draw, found = random.Random(target.name), Counter[str]()
    ends = Counter(one_round(target, draw, tmp_path, found) for _ in range(ROUNDS))
    assert not found and set(ends) <= {"read", "refused"}


def test_a_foreign_exception_is_kept_once(tmp_path: Path) -> None:
    def read(folder: Path) -> Any:
        document = json.loads((folder / "f.json").read_bytes().decode("latin-1"))
        if not isinstance(document["a"], int):
            raise CircuitError("no number")

    target = Target("mine", {"f.json": b'{"a": 1, "b": [1, 2, 3]}'}, read)
    draw, found = random.Random(0), Counter[str]()
    ends = {one_round(target, draw, tmp_path, found) for _ in range(60)}
    assert any(end.startswith("JSONDecodeError in decoder.py") for end in ends)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == len(found) and found.total() > len(found)
    assert all((tmp_path / name / "traceback.txt").read_text() for name in kept)
