"""What comments, docstrings and documents cite exists: files, folders, modules, headings."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blocks import ROOT, documents

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("pahq_hf", "tests", "benchmarks", "tools", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
FOLDERS = [ROOT, *(path for name in ("pahq_hf", "tests") for path in ((ROOT / name).glob("**/")))]
_FILE = re.compile(r"(?<![\w./{}*-])(?:\w[\w.-]*/)*\w[\w.-]*\.(?:md|py|toml|jinja)\b(?![\w/(])")
_MODULE = re.compile(r"(?<![\w./-])pahq_hf(?:\.[A-Za-z_]\w*)+")
_LINK = re.compile(r"\]\(([\w./-]*)(?:#([\w-]+))?\)")
_ELSEWHERE = {"acdc/docstring/utils.py"}  # in another project, which the text names


def prose(source: str) -> str:
    """The comments and docstrings of a Python file."""
    found = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node, clean=False) or "")
    return "\n".join(found)


def text_of(file: str) -> str:
    """What a file says to people."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return prose(text) if file.endswith(".py") else text


def missing_files(text: str, beside: Path = ROOT) -> Iterator[str]:
    """Files of the project that a text names and that are not there.

    A path starts beside the text, at the repository's root, in the package, or in one of its rooms.
    """
    for name in sorted({match[0] for match in _FILE.finditer(text)} - _ELSEWHERE):
        if not any((folder / name).exists() for folder in (beside, *FOLDERS)):
            yield name


def missing_modules(text: str) -> Iterator[str]:
    """Modules of the package, and names in them, that a text gives and that are not there."""
    for name in sorted({match[0] for match in _MODULE.finditer(text)}):
        module, *rest = name.split(".")
        found = importlib.import_module(module)
        for part in rest:
            module = f"{module}.{part}"
            try:
                found = getattr(found, part) if hasattr(found, part) else importlib.import_module(module)
            except ImportError:
                yield name
                break


def headings(file: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("folder", sorted({str(Path(file).parent) for file in documents() + SOURCES}))
def test_files_and_modules_that_are_named_exist(folder: str) -> None:
    for file in documents() + SOURCES:
        if str(Path(file).parent) == folder:
            text = text_of(file)
            assert [*missing_files(text, ROOT / folder), *missing_modules(text)] == [], file


@pytest.mark.parametrize("file", documents())
def test_links_lead_somewhere(file: str) -> None:
    for target, heading in _LINK.findall(re.sub(r"```.*?```|`[^`\n]*`", "", text_of(file), flags=re.DOTALL)):
        aim = (ROOT / file).parent / target if target else ROOT / file
        assert aim.exists(), target
        assert not heading or heading in headings(aim), f"{target}#{heading}"


def test_what_is_not_there_is_found() -> None:
    text = (
        "# see docs/nowhere.md, `engine/none.py`, pahq_hf.nowhere.Thing and tools/train_demo.py, README.md\n"
    )
    assert list(missing_files(text)) == ["docs/nowhere.md", "engine/none.py"]
    assert list(missing_modules(text)) == ["pahq_hf.nowhere.Thing"]
    assert prose('"""One."""\nx = "two.md"  # three\n').split() == ["#", "three", "One."]
