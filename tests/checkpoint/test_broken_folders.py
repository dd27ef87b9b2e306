"""Model folders with broken, hostile or missing files: one line, no code run, nothing waited for."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.checkpoint.load import load_tokenizer
from pahq_hf.errors import PAHQError
from tests.cli.world import tokenizer
from tests.models import tiny_llama

DEEP = "[" * 5000 + "]" * 5000
Spoil = Callable[[Path], Any]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def holding(name: str, content: str | bytes | dict[str, Any]) -> Spoil:
    """A file with this content."""

    def spoil(folder: Path) -> None:
        raw = json.dumps(content) if isinstance(content, dict) else content
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(raw.encode() if isinstance(raw, str) else raw)

    return spoil


def put(name: str, make: Spoil) -> Spoil:
    """Something else in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def pickled(make: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make(folder / "pytorch_model.bin")

    return spoil


def index(content: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        holding("model.safetensors.index.json", content)(folder)

    return spoil


def header(text: str, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + rest


def wrapper(**values: Any) -> Spoil:
    document = {"format_version": 1, "base_model": "x", "revision": None, "precision": {"regime": "fp32"}}

    def spoil(folder: Path) -> None:
        for path in list(folder.iterdir()):
            path.unlink()
        (folder / "pahq_config.json").write_text(json.dumps(document | values))

    return spoil


def cut(path: Path) -> None:
    torch.save(tiny_llama().state_dict(), path)
    os.truncate(path, 2000)


def mapped(name: Any) -> dict[str, Any]:
    return {"metadata": {}, "weight_map": {"lm_head.weight": name}}


OTHER_JSON: dict[str, str | bytes] = {
    **{"empty": "", "a list": "[]", "null": "null", "too deep": DEEP, "no text": b"\xff\xfe\x00"},
    **{"digits": '{"vocab_size":' + "9" * 5000 + "}", "half": '{"a": ', "two": "{}{}"},
}
PLACES: dict[str, Spoil] = {
    **{"pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")},
    **{"link to itself": lambda path: path.symlink_to(path.name)},
}
REFUSED: dict[str, Spoil] = {
    **{f"config.json: {name}": holding("config.json", text) for name, text in OTHER_JSON.items()},
    **{f"config.json: {name}": put("config.json", make) for name, make in PLACES.items()},
    "config.json: half of a character": holding("config.json", '{"model_type": "\\ud800"}'),
    "config.json: a control character": holding("config.json", '{"model_type": "a\\u0000\\u001b[2J"}'),
    **{f"generation_config: {n}": holding("generation_config.json", t) for n, t in OTHER_JSON.items()},
    "generation_config: a pipe": put("generation_config.json", os.mkfifo),
    "generation_config: a number": holding("generation_config.json", {"watermarking_config": 5}),
    "generation_config: a cache": holding("generation_config.json", {"cache_implementation": 7}),
    **{f"index: {name}": index(text) for name, text in OTHER_JSON.items()},
    "index: no map": index({"metadata": {}}),
    "index: no object": index({"metadata": {}, "weight_map": []}),
    "index: nothing in it": index({"metadata": {}, "weight_map": {}}),
    "index: numbers": index(mapped(1)),
    "index: no metadata": index({"weight_map": {"lm_head.weight": "model.safetensors"}}),
    "index: no such file": index(mapped("nowhere.safetensors")),
    "index: elsewhere": index(mapped("../other/model.safetensors")),
    "index: from the root": index(mapped("/etc/passwd")),
    "index: a zero": index(mapped("a\0b")),
    "index: a long name": index(mapped("x" * 5000)),
    "index: the folder": index(mapped(".")),
    **{f"weights: {name}": put("model.safetensors", make) for name, make in PLACES.items()},
    "weights: empty": holding("model.safetensors", b""),
    "weights: no tensors": holding("model.safetensors", header("{}")),
    "weights: a huge header": holding("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
    "weights: a list": holding("model.safetensors", header("[]")),
    "weights: an unknown dtype": holding(
        "model.safetensors", header('{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}}', b"a")
    ),
    "pickle: code": pickled(lambda path: torch.save({"a": Evil()}, path)),
    "pickle: code, without torch": pickled(lambda path: path.write_bytes(pickle.dumps(Evil()))),
    "pickle: empty": pickled(lambda path: path.write_bytes(b"")),
    "pickle: junk": pickled(lambda path: path.write_bytes(b"junk" * 100)),
    "pickle: a list": pickled(lambda path: torch.save([1, 2], path)),
    "pickle: texts": pickled(lambda path: torch.save({"lm_head.weight": "x"}, path)),
    "pickle: numbers as names": pickled(lambda path: torch.save({1: torch.zeros(2)}, path)),
    "pickle: cut": pickled(cut),
    "wrapper: itself": lambda folder: wrapper(base_model=str(folder))(folder),
    "wrapper: itself, by another way": lambda folder: wrapper(base_model=f"{folder}/../model")(folder),
    "wrapper: lists": wrapper(precision={"regime": [], "format": {}}),
    "wrapper: a policy that is a list": wrapper(precision={"policy": [[]]}),
    "wrapper: a policy of lists": wrapper(precision={"policy": {"m*": []}}),
    "wrapper: version -1": wrapper(format_version=-1),
    "wrapper: version in text": wrapper(format_version="1"),
    "wrapper: a list as base model": wrapper(base_model=["a"]),
    "wrapper: a zero": wrapper(base_model="a\0b"),
    "wrapper: half of a character": wrapper(base_model="\ud800"),
    "wrapper: a long name": wrapper(base_model="x" * 5000),
    "wrapper: a long path": wrapper(base_model="/" + "x/" * 2500),
    "wrapper: no name": wrapper(base_model=""),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a model's folder; what is run would leave something beside it."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "model"
    copy.mkdir()
    for path in good.iterdir():
        os.link(path, copy / path.name)
    return copy


def refusal(folder: Path) -> str:
    with pytest.raises(PAHQError) as caught:
        PAHQModel.from_pretrained(str(folder), PAHQConfig(regime="fp32"))
    return str(caught.value)


@pytest.mark.parametrize("case", [name for name in REFUSED if not name.startswith("wrapper")])
def test_a_folder_with_something_broken_is_refused_in_one_line(case: str, folder: Path) -> None:
    REFUSED[case](folder)
    line = refusal(folder)
    assert "\n" not in line and len(line) < 700 and str(folder) in line
    assert os.listdir(folder.parent) == ["model"]  # no code was run


@pytest.mark.parametrize("case", [name for name in REFUSED if name.startswith("wrapper")])
def test_a_broken_wrapper_is_refused_in_one_line(case: str, folder: Path) -> None:
    REFUSED[case](folder)
    with pytest.raises(PAHQError) as caught:
        PAHQModel.from_pretrained(str(folder))
    assert "\n" not in str(caught.value)


# -- tokenizers, without which a model is fine --------------------------------------------------------------


def edited(**values: Any) -> Spoil:
    """A tokenizer.json with other values."""
    return lambda folder: holding(
        "tokenizer.json", json.loads((folder / "tokenizer.json").read_text()) | values
    )(folder)


def vocabulary(number: Callable[[int], int]) -> Spoil:
    def spoil(folder: Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        vocab = {word: number(value) for word, value in model["vocab"].items()}
        edited(model=model | {"vocab": vocab})(folder)

    return spoil


TOKENIZERS: dict[str, Spoil] = {
    **{f"tokenizer_config: {n}": holding("tokenizer_config.json", t) for n, t in OTHER_JSON.items()},
    **{f"tokenizer.json: {name}": holding("tokenizer.json", text) for name, text in OTHER_JSON.items()},
    "tokenizer_config: a class that is a list": holding("tokenizer_config.json", {"tokenizer_class": []}),
    "tokenizer_config: a length in words": holding("tokenizer_config.json", {"model_max_length": "x"}),
    "tokenizer_config: numbers as tokens": holding("tokenizer_config.json", {"unk_token": 5}),
    "tokenizer_config: no token": holding(
        "tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": 5}}}
    ),
    "tokenizer.json: negative ids": vocabulary(lambda number: -number),
    "tokenizer.json: no words": edited(model={"type": "WordLevel", "vocab": {}, "unk_token": "u"}),
    "tokenizer.json: an unknown type": edited(model={"type": "X"}),
    "tokenizer.json: a negative token": edited(added_tokens=[{"id": -1, "content": "a"}]),
    "tokenizer.json: a wrong pattern": edited(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(("},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer_is_told_of_and_left_out(
    case: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    TOKENIZERS[case](folder)
    assert load_tokenizer(str(folder)) is None
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("pahq_hf")]
    assert line.startswith(f"cannot read the tokenizer of '{folder}'") and "\n" not in line


def test_large_numbers_in_a_tokenizer_are_usual(folder: Path) -> None:
    """Transformers writes 10**30 where a tokenizer has no longest prompt."""
    assert load_tokenizer(str(folder)) is not None
    holding("tokenizer_config.json", {"model_max_length": 10**30})(folder)
    assert load_tokenizer(str(folder)) is not None
