"""Rehearsals in a process of their own, many in one: importing takes longer than most of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests.pretend.form import Form, can_compile

ROOT = Path(__file__).parents[2]
BEST: Form = "cuda" if can_compile() else "pure"


def rehearsed(form: Form, scenario: dict[str, Any]) -> dict[str, Any]:
    """What came of a scenario.

    Args:
        form: Of the device.
        scenario: Fields of `rehearse.Scenario`.

    Returns:
        Fields of `rehearse.Outcome`.
    """
    outcome: dict[str, Any] = json.loads(_outcome(form, json.dumps(scenario)))
    return outcome


@cache
def _outcome(form: Form, scenario: str) -> str:
    process = _process(form)
    assert process.stdin and process.stdout
    process.stdin.write(scenario + "\n")
    process.stdin.flush()
    outcome = process.stdout.readline()
    assert outcome, f"the rehearsal of {scenario} ended with exit code {process.wait()}"
    return outcome


@cache
def _process(form: Form) -> subprocess.Popen[str]:
    """The process that has the device; it ends with this one."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "tests.pretend.rehearse", form]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
