"""Rehearsals in a process of their own, many in one: importing takes longer than most of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.pretend.form import Form, can_compile

ROOT = Path(__file__).parents[2]
BEST: Form = "cuda" if can_compile() else "pure"


def rehearsed(form: Form, scenarios: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """What came of one of some scenarios, which all run when the first is asked for.

    Args:
        form: Of the device.
        scenarios: Fields of `rehearse.Scenario` by name.
        name: Which.

    Returns:
        Fields of `rehearse.Outcome`.
    """
    return _outcomes(form, json.dumps(list(scenarios.values())))[list(scenarios).index(name)]


@cache
def _outcomes(form: Form, scenarios: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scenarios.json"
        path.write_text(scenarios)
        done = subprocess.run(
            [sys.executable, "-m", "tests.pretend.rehearse", form, str(path)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
