"""Every code block of the documentation runs; `gpt2` is a small model on a Hub on loopback.

As written in the exhaustive tests, in the others on fewer examples, with little learning.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pahq_hf.checkpoint.demo_path import demo_path
from tests.blocks import (
    ROOT,
    blocks_of,
    documents,
    less_work,
    mentioned_programs,
    run_file,
    unfenced_code,
)
from tests.forked import Ended
from tests.helpers import run_main
from tests.hub_server import HubServer, client_environment, run_client
from tests.tiers import exhaustive

Reader = Callable[[str], Ended]

FILES = documents()
# Blocks that no test runs. Each says why in its file.
# What they run takes longest, and is what other tests run too.
LONG = {f"docs/{name}.md" for name in ("searches", "refine", "learned-masks", "evaluation")}
NOT_RUN = {"README.md": 1, "CONTRIBUTING.md": 1, "docs/gpu.md": 1}


def _runs_quickly(file: str) -> bool:
    return any(block.runs and not block.mark for block in blocks_of(file))


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A Hub with the demo checkpoint under the name of gpt2, where the user is `me`."""
    with HubServer({"token": "me"}) as server:
        yield server


@pytest.fixture
def reader(hub: HubServer, tmp_path: Path) -> Reader:
    """Somebody logged in there, who has cloned the project."""
    return partial(
        run_client, env=client_environment(hub, tmp_path / "home", "token") | {"PYTHONPATH": str(ROOT)}
    )


def run(file: str, hub: HubServer, reader: Reader, folder: Path, *, exhaustive: bool = False) -> None:
    """Run a file's blocks in an empty folder, with nothing on the Hub but the model."""
    hub.repos.clear()
    hub.create("gpt2", {path.name: path.read_bytes() for path in demo_path().iterdir() if path.is_file()})
    ended = reader(
        f"""
        import os
        from tests.blocks import run_file
        os.chdir({str(folder)!r})
        run_file({file!r}, exhaustive={exhaustive})
        """
    )
    assert ended.code == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"


@pytest.mark.parametrize("file", [f if f not in LONG else exhaustive(f) for f in FILES if _runs_quickly(f)])
def test_blocks_run_on_few_examples(file: str, hub: HubServer, reader: Reader, tmp_path: Path) -> None:
    run(file, hub, reader, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", [f for f in FILES if any(b.runs for b in blocks_of(f))])
def test_blocks_run_as_written(
    file: str, hub: HubServer, reader: Reader, tmp_path: Path, smollm2_path: Path
) -> None:
    run(file, hub, reader, tmp_path, exhaustive=True)


def test_what_is_not_run_is_counted() -> None:
    found = {file: sum(block.mark == "not run" for block in blocks_of(file)) for file in FILES}
    assert {file: count for file, count in found.items() if count} == NOT_RUN


@pytest.mark.parametrize("file", FILES)
def test_code_is_in_blocks_that_are_run(file: str) -> None:
    assert unfenced_code(file) == []
    for block in blocks_of(file):
        assert block.language in ("python", "console", "text", "json"), (file, block.line)
        assert block.language != "console" or block.commands, (file, block.line)
        assert block.language == "console" or "\n$ " not in f"\n{block.text}", (file, block.line)


class Parsed(Exception):
    """A program's arguments make sense to it."""


@pytest.mark.parametrize(
    ("file", "command"), [(file, command) for file in FILES for command in mentioned_programs(file)]
)
def test_programs_take_the_arguments_that_the_text_gives_them(
    file: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    _, _, module, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


def test_make_demo_finds_the_circuit_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["make", "--dry-run", "--no-print-directory", "demo", f"RUN={tmp_path / 'demo'}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [shlex.split(line) for line in printed.splitlines() if "/pahq " in line]
    assert [step[1] for step in steps] == ["discover", "show"]
    for step in steps:
        assert run_main(*step[1:]) == 0
    assert "a0.h" in capsys.readouterr().out


def test_work_is_all_that_is_changed() -> None:
    line = "$ pahq discover gpt2 --n 50 --threshold 0.01 --topn 200; load_task('ioi', n=3), f(mean=30, n=20)"
    assert less_work(line) == line.replace("--n 50", "--n 4").replace(" n=20", " n=4")
    for learns in ("--n 3 --edges 9", "--search refine --curve --bootstrap 2"):
        assert less_work(f"pahq discover gpt2 {learns}") == f"pahq discover gpt2 {learns} --steps 1"
    for other in (
        "discover gpt2 --edges 9 --search mine",
        "attribute gpt2 --edges 9",
        "discover --steps 7 --edges 9",
    ):
        assert less_work(f"pahq {other}") == f"pahq {other}"


def test_a_block_that_fails_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.blocks.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\nThen\n\n```python\nassert x == 1\nx.y\n```\n")
    with pytest.raises(AttributeError):
        run_file("page.md", exhaustive=False)
    for command in ("pahq show nowhere", "false", "python -m benchmarks.agreement demo"):
        page.write_text(f"```console\n$ {command}    # so\n```\n")
        with pytest.raises(SystemExit, match=rf"page.md:2: `{command}.*exit code [12]"):
            run_file("page.md", exhaustive=False)
    page.write_text("<!-- exhaustive: it fails -->\n```console\n$ false\n```\n")
    run_file("page.md", exhaustive=False)
    with pytest.raises(SystemExit):
        run_file("page.md", exhaustive=True)
