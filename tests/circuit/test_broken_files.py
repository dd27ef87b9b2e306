"""A circuit's files with any value in any place: one line, or a circuit that can be shown."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from pahq_hf import Circuit
from pahq_hf.circuit.interchange import from_mib, to_mib
from pahq_hf.circuit.json_reader import parse_json, read_regular
from pahq_hf.errors import CircuitError, PAHQError
from tests.circuit.small import small
from tests.cli.world import in_process
from tests.tiers import exhaustive

Key = tuple[str, ...]
EDGE = "EDGE"  # stands for the name of one
TEXTS = {
    **{"digits": "9" * 400, "more digits": "9" * 5000, "inf": "Infinity", "nan": "NaN", "1e400": "1e400"},
    **{"-1": "-1", "0": "0", "true": "true", "null": "null", "list": "[]", "object": "{}", "text": '"x"'},
    **{"half a character": '"\\ud800"', "controls": '"\\u0000\\u001b[2J"', "long": f'"{"x" * 100_000}"'},
    **{"deep": "[" * 500 + "]" * 500, "nested": "[" * 40 + "]" * 40, "2**63": str(2**63)},
    **{"10**9": "1000000000"},
}  # fmt: skip
QUICK = ("digits", "nan", "list", "half a character")
CIRCUIT: list[Key] = [
    *(("cfg", name) for name in ("format_version", "n_layers", "n_heads", "n_key_value_heads", "base_model")),
    *(("cfg", name) for name in ("revision", "model_type", "d_model", "fingerprint", "coupled_heads")),
    *(("cfg",), ("edges",), ("nodes",), ("more",), ("edges", EDGE), ("edges", EDGE, "score")),
    ("edges", EDGE, "in_graph"),
]
DISCOVERY: list[Key] = [
    *((name,) for name in ("method", "title", "header", "arguments", "precision", "task", "edges", "metric")),
    *(
        (name,)
        for name in ("seconds", "verdict", "verified", "checksums", "directions", "bootstrap", "apply")
    ),
    *(("apply",), *(("arguments", name) for name in ("threshold", "screen", "readers"))),
    *(("edges", "total"), ("task", "name"), ("task", "examples"), ("seconds", "total"), ("metric", "full")),
    *(("metric", name) for name in ("final", "final_recomputed", "tolerance")),
]
IMPORTED: list[Key] = [
    *(("cfg", name) for name in ("n_layers", "n_heads", "n_key_value_heads", "parallel_attn_mlp", "d_model")),
    *(("cfg",), ("edges",), ("edges", EDGE), ("edges", EDGE, "score"), ("edges", EDGE, "in_graph")),
    ("edges", "\ud800->\x1b"),
]


def with_text(document: dict[str, Any], key: Key, text: str) -> str:
    """A document as JSON with other text in one place."""
    *above, last = (next(iter(document["edges"])) if name == EDGE else name for name in key)
    whole = json.loads(json.dumps(document))
    node = whole
    for name in above:
        node = node.setdefault(name, {})
    node[last] = "@@@"
    return json.dumps(whole).replace('"@@@"', text)


def cases(keys: list[Key]) -> list[Any]:
    return [
        (key, kind) if kind in QUICK or key == keys[0] else exhaustive(key, kind)
        for key, kind in product(keys, TEXTS)
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = {"threshold": 0.1, "screen": "eap:0.5"}
    metric = {"name": "kl", "full": 0.0, "final": 0.1, "final_recomputed": 0.1, "tolerance": 1e-3}
    task = {"name": "ioi", "examples": 3}
    circuit = small(
        method="acdc", arguments=facts, metric=metric, task=task, seconds={"total": 1.0}, verified=True
    )
    folder = tmp_path_factory.mktemp("circuit") / "run"
    circuit.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    return to_mib(small())


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, all of whose files can be replaced."""
    (tmp_path / "run").mkdir()
    for path in saved.iterdir():
        os.link(path, tmp_path / "run" / path.name)
    return tmp_path / "run"


def replaced(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


def shown(folder: Path) -> None:
    """A circuit is shown as JSON, or refused in one line."""
    result = in_process("show", str(folder), "--json")
    assert result.code in (0, 2), result.err
    if result.code == 0:
        json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        result = in_process("show", str(folder))
    if result.code == 2:
        assert result.err.startswith("pahq: ") and result.err.count("\n") == 1 and len(result.err) < 1100
    else:
        assert result.code == 0, result.err


@pytest.mark.parametrize(("key", "kind"), cases(CIRCUIT))
def test_any_value_in_circuit_json(key: Key, kind: str, folder: Path) -> None:
    path = folder / "circuit.json"
    replaced(path, with_text(json.loads(path.read_text()), key, TEXTS[kind]))
    shown(folder)


@pytest.mark.parametrize(("key", "kind"), cases(DISCOVERY))
def test_any_value_in_discovery_json(key: Key, kind: str, folder: Path) -> None:
    path = folder / "discovery.json"
    replaced(path, with_text(json.loads(path.read_text()), key, TEXTS[kind]))
    shown(folder)


@pytest.mark.parametrize(("key", "kind"), cases(IMPORTED))
def test_any_value_in_an_import(key: Key, kind: str, graph: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(with_text(graph, key, TEXTS[kind]))
    try:
        circuit = from_mib(path)
    except CircuitError as error:
        assert str(path) in str(error) or "is not an edge" in str(error)
        return
    assert np.isfinite(circuit.scores).all()
    assert Circuit(circuit.graph, circuit.kept, circuit.scores, circuit.tested, circuit.model).to_json()


# -- tensors, and what is no file -------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, Any]], Any], *, lib: Any = torch) -> Callable[[Path], None]:
    """Other tensors in the file."""

    def spoil(path: Path) -> None:
        found = load_file(path)
        path.unlink()
        change(found)
        if lib is torch:
            save_torch({name: torch.as_tensor(value) for name, value in found.items()}, path)
        else:
            save_file(found, path)

    return spoil


def of_type(dtype: torch.dtype) -> Callable[[Path], None]:
    return tensors(lambda found: found.update(score=torch.as_tensor(found["score"]).to(dtype)))


TENSORS: dict[str, Callable[[Path], None]] = {
    **{str(dtype): of_type(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)},
    "complex": of_type(torch.complex64),
    "no scores": tensors(lambda found: found.pop("score")),
    "one number": tensors(lambda found: found.update(score=torch.tensor(1.0))),
    "texts": lambda path: replaced(path, "text"),
    "empty": lambda path: replaced(path, ""),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),  # type: ignore[dict-item,return-value]
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),  # type: ignore[dict-item,return-value]
    "folder": lambda path: (path.unlink(), path.mkdir()),  # type: ignore[dict-item,return-value]
    "link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),  # type: ignore[dict-item,return-value]
}  # fmt: skip
NAMES = ("circuit.json", "scores.safetensors", "discovery.json", "means.safetensors")


@pytest.mark.parametrize("kind", TENSORS)
def test_scores_of_another_kind(kind: str, folder: Path) -> None:
    facts = json.loads((folder / "discovery.json").read_text())
    TENSORS[kind](folder / "scores.safetensors")
    facts["checksums"] = {}  # else these tell first
    replaced(folder / "discovery.json", json.dumps(facts))
    with pytest.raises(CircuitError) as caught:
        Circuit.from_pretrained(folder)
    assert "\n" not in str(caught.value) and "scores.safetensors" in str(caught.value)
    shown(folder)


@pytest.mark.parametrize(("name", "kind"), list(product(NAMES, ("pipe", "device", "folder"))))
def test_what_is_no_file_is_not_opened(name: str, kind: str, folder: Path) -> None:
    (folder / name).touch()
    TENSORS[kind](folder / name)
    with pytest.raises(CircuitError, match=name):
        Circuit.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["x" * 300, "y/" * 2500, "~nosuchuser", os.fsdecode(b"a\xff"), "/dev/null", ""]
)
@pytest.mark.parametrize("command", ["show", "export", "import", "compare", "push", "pull"])
def test_names_that_lead_nowhere(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {
        "export": ["--format", "mib", "--out", "o.json"],
        **{"import": ["--out", "o"], "pull": ["--out", "o"], "compare": [name], "push": ["me/x"]},
    }
    result = in_process(command, name, *more.get(command, []))
    assert result.code == 2 and result.err.startswith("pahq: ") and result.err.count("\n") == 1
    assert len(result.err) < 1100 and not list(tmp_path.iterdir())


# -- the reader -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 101 + "]" * 101, "nested more than 100"),
        ("[" * 100_000, "nested more than 100"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100"),
        (str(2**63), "larger than"),
        (f"[1, {{'a': -{2**63}}}]".replace("'", '"'), "larger than"),
        ("9" * 5000, "digits"),
        ("{} {}", "Extra data"),
        ("", "Expecting value"),
    ],
)
def test_the_reader_bounds_what_it_takes(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_the_reader_takes_what_is_within() -> None:
    nested = "[" * 99 + "1" + "]" * 99
    assert parse_json(nested) == json.loads(nested)
    assert parse_json(f"\ufeff[{2**63 - 1}, -5, 1.5, true]".encode()) == [2**63 - 1, -5, 1.5, True]


def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path) == b"12345"
    with pytest.raises(OSError, match="more than 4"):
        read_regular(path, 4)
    for place in ("/dev/zero", "/dev/null", str(tmp_path)):
        with pytest.raises(OSError):
            read_regular(Path(place))
    with pytest.raises(OSError):
        read_regular(tmp_path / "a\0b")
    shutil.rmtree(tmp_path)


def test_errors_are_the_packages_own() -> None:
    with pytest.raises(PAHQError):
        Circuit.from_pretrained("\0")
