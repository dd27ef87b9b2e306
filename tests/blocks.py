"""Code blocks of Markdown files, and how they are run: as written, in order, as a reader would.

A block that is not run, or only with the exhaustive tests, says so in a comment on the line before it:
`<!-- not run: it needs a GPU -->`, `<!-- exhaustive: two minutes on SmolLM2 -->`.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FEW = 4  # examples of the blocks' tasks in `make test`
_FENCE = re.compile(r"```(\w*)$")
_LEARNS = re.compile(r"pahq discover (?=.*(--search refine|--edges))(?!.*--search (?!refine))")
_MARK = re.compile(r"<!-- (not run|exhaustive): (.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        file: Of which file.
        line: Number of its first line.
        language: What the fence says.
        text: Its lines.
        mark: `not run`, `exhaustive`, or nothing.
        reason: Why.
    """

    file: str
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""

    @property
    def commands(self) -> list[str]:
        """What follows the prompts of a console block; the rest is what they print."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]

    @property
    def runs(self) -> bool:
        """Whether it is code that is run at all."""
        return self.language in ("python", "console") and self.mark != "not run"


def documents() -> list[str]:
    """Every Markdown file of the project, but for the list of changes."""
    tracked = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "examples", "tools"):
        tracked += sorted((ROOT / folder).glob("*.md"))
    return [path.relative_to(ROOT).as_posix() for path in tracked]


def blocks_of(file: str) -> list[Block]:
    """The fenced blocks of a file, in order."""
    return list(_blocks(file, (ROOT / file).read_text(encoding="utf-8").splitlines()))


def _blocks(file: str, lines: list[str]) -> Iterator[Block]:
    start, language = None, ""
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, language = number + 1, fence[1]
        elif fence and start is not None:
            before = _MARK.match(lines[start - 3]) if start > 2 else None
            text = "\n".join(lines[start - 1 : number - 1])
            yield Block(file, start, language, text, *(before.groups() if before else ()))
            start = None


def mentioned_programs(file: str) -> list[str]:
    """Programs that the text of a file mentions, with arguments that have to parse."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for block in blocks_of(file):
        text = text.replace(block.text, "")
    found = re.findall(r"`(python -m benchmarks[^`]+)`", text)
    return [" ".join(command.split()) for command in found]


def unfenced_code(file: str) -> list[str]:
    """Lines of code that no fence encloses, and which nobody would run."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    inside = {
        n for block in blocks_of(file) for n in range(block.line, block.line + block.text.count("\n") + 1)
    }
    return [
        f"{file}:{number}: {line}"
        for number, line in enumerate(lines, 1)
        if number not in inside and re.match(r"(    |\$ |>>> )\S", line)
    ]


def less_work(text: str) -> str:
    """Code with tasks of at most `FEW` examples, edges and resamples, one step of learning."""
    text = re.sub(r"(--n |\bn=)(\d+)\b", lambda found: f"{found[1]}{min(int(found[2]), FEW)}", text)
    text = re.sub(r"(--bootstrap )\d+\b", r"\g<1>2", text)
    text = re.sub(r"(--edges )\d\d+\b", r"\g<1>20", text)
    return f"{text} --steps 1" if _LEARNS.match(text) and "--steps" not in text else text


def run_file(file: str, *, exhaustive: bool) -> None:
    """Run a file's blocks in the working directory: Python in one namespace, commands one by one.

    Args:
        file: Which.
        exhaustive: As written, those marked so as well; else with less work.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(file):
        if not block.runs or (block.mark and not exhaustive):
            continue
        if block.language == "python":
            text = block.text if exhaustive else less_work(block.text)
            exec(compile("\n" * (block.line - 1) + text, ROOT / file, "exec"), namespace)
            continue
        for command in block.commands:
            code = _run_command(command if exhaustive else less_work(command))
            if code:
                raise SystemExit(f"{file}:{block.line}: `{command}` ended with exit code {code}")


def _run_command(command: str) -> int:
    """Run a line of a shell; `pahq` and `python` in this process, which has the libraries loaded."""
    words = shlex.split(command, comments=True)
    if words[0] not in ("pahq", "python") or re.search(r"[|<>;&*$]", command.split(" #")[0]):
        path = f"{Path(sys.executable).parent}"
        return subprocess.run(f'PATH="{path}:$PATH"\n{command}', shell=True).returncode
    words = [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]
    before = sys.argv
    try:
        if words[0] == "pahq":
            sys.argv = words
            from pahq_hf.cli.app import main

            main()
        elif words[1] == "-m":
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words[1:]
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
        return code if isinstance(code, int) else 0 if code is None else 1
    finally:
        sys.argv = before
    return 0
