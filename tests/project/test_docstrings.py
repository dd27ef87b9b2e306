"""A docstring says what a thing is: whoever reads it alone need not guess what "they" are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "pahq_hf"
FILES = sorted(ROOT.rglob("*.py"))
PRONOUN = re.compile(r"(They|Them|Their|It|Its|That|Those|These|Like)\b")
ENTRY = re.compile(r"^\s+\*{0,2}\w+: ((?:They|Them|It|That|Those|These)\b.*)", re.MULTILINE)


def docstrings(source: str) -> list[str]:
    """All docstrings of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [text for node in nodes if (text := ast.get_docstring(node, clean=False))]


def pronouns(text: str) -> list[str]:
    """Beginnings of a docstring, and of what it says of arguments, that name nothing."""
    first = text.strip().splitlines()[0]
    return ([first] if PRONOUN.match(first) else []) + ENTRY.findall(text)


def test_pronouns_are_found() -> None:
    body = 'def f(a, b):\n    """Add.\n\n    Args:\n        a: It by name.\n        b: Itself.\n    """'
    text = f'"""They."""\n{body}'
    assert [found for doc in docstrings(text) for found in pronouns(doc)] == ["They.", "It by name."]


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_what_they_are_about(file: Path) -> None:
    found = [text for doc in docstrings(file.read_text(encoding="utf-8")) for text in pronouns(doc)]
    assert found == []
