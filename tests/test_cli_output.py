"""A stdout that cannot be written: one line on stderr and exit code 2; a reader that is gone: not a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAHQ = [sys.executable, "-m", "pahq_hf"]
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no full device")
@pytest.mark.parametrize("arguments", [["families"], ["families", "--json"], ["discover", "--help"]])
def test_a_full_disk_is_one_line_and_code_2(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        ended = subprocess.run([*PAHQ, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2  # 1 is a circuit that is not confirmed
    assert ended.stderr == f"pahq: cannot write to stdout: {os.strerror(28)}\n"


@pytest.mark.parametrize("arguments", [["families"], ["families", "--json"]])
def test_a_reader_that_is_gone_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run([*PAHQ, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_closed_stdout_is_said() -> None:
    command = f'"{sys.executable}" -m pahq_hf families >&-'
    ended = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (2, "pahq: cannot write to stdout: it is closed\n")
