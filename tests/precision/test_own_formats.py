"""The registry of formats: one's own in models, policies and commands, an unknown name nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pahq_hf import LowFormat, PAHQConfig, PAHQModel, load_task, register_format
from pahq_hf.errors import ConfigError
from pahq_hf.precision.formats.registry import find_format, known_formats
from tests.helpers import FP32, run_main

BUILT_IN = known_formats()


class Int4Weight(nn.Module):
    """Symmetric 4-bit integers, two in a byte, with one FP32 scale for every row."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._shape = (weight.shape[0], weight.shape[1])
        scale = weight.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
        codes = F.pad((weight / scale).round().to(torch.int8) + 8, (0, weight.shape[1] % 2))
        self.register_buffer("codes", (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.uint8))
        self.register_buffer("scale", scale)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (out) and columns (in)."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """The stored values of a block, in FP32. [rows, cols]"""
        both = torch.stack((self.codes[rows] & 15, self.codes[rows] >> 4), dim=-1).flatten(1)
        return (both[:, cols].to(torch.float32) - 8) * self.scale[rows]


INT4 = LowFormat("int4", Int4Weight, lambda rows, cols: rows * (-(-cols // 2) + 4), error=0.3, fineness=0)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers ends with it."""
    known = {name: find_format(name) for name in known_formats()}
    monkeypatch.setattr("pahq_hf.precision.formats.registry._FORMATS", known)
    yield


def test_one_of_ones_own_decides_as_fp32_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_format(INT4)
    exact = PAHQModel.from_pretrained("demo", FP32)
    task = load_task("ioi", exact.tokenizer, n=4)
    options: dict[str, Any] = {"threshold": 0.05, "progress": False}
    wanted = exact.discover(task, **options)
    model = PAHQModel.from_pretrained("demo", format="int4")
    kept = {type(module).__name__ for module in model.modules()}
    assert "Int4Weight" in kept and "Float8Weight" not in kept
    found = model.discover(task, **options)
    assert np.array_equal(found.kept, wanted.kept)
    assert found.discovery["arguments"]["margin"] == pytest.approx(0.6)  # twice its error

    out = tmp_path / "run"
    search = ("discover", "demo", "--task", "ioi", "--n", "4", "--threshold", "0.05", "--out", str(out))
    assert run_main(*search, "--format", "int4", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["precision"]["format"] == "int4"
    assert facts["edges"]["kept"] == wanted.edge_count
    assert run_main("info", "demo", "--json") == 0  # plans memory with the formats there are


def test_a_policy_takes_it() -> None:
    register_format(INT4)
    model = PAHQModel.from_pretrained("demo", PAHQConfig("pahq", "int8", policy={"m*": "int4"}))
    kept = [type(module).__name__ for module in model.modules()]
    assert kept.count("Int4Weight") == 2 * model.config.n_layer and "Int8Weight" in kept


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        (replace(INT4, name="fp8"), "format 'fp8' is built in"),
        (replace(INT4, name="fp32"), "format 'fp32' is built in"),
        (replace(INT4, name="INT 4"), "lower case letters, digits, _ and -; got 'INT 4'"),
        (replace(INT4, error=0.0), "needs its scores' error, above 0; got 0.0"),
        (replace(INT4, error="x"), "needs its scores' error, above 0; got 'x'"),  # type: ignore[arg-type]
        (replace(INT4, error=float("nan")), "needs its scores' error, above 0; got nan"),
        (replace(INT4, fineness=None), "needs a number as its fineness; got None"),  # type: ignore[arg-type]
        (replace(INT4, stored_bytes=lambda rows, cols: None), "above 0; got None"),  # type: ignore[arg-type]
        (replace(INT4, stored_bytes=lambda rows: rows), r"stored_bytes\(64, 96\) fails \(TypeError: "),  # type: ignore[arg-type, misc]
        (replace(INT4, make=None), "needs a function as make"),  # type: ignore[arg-type]
        (Int4Weight, "register_format takes a LowFormat"),
    ],
)
def test_what_cannot_be_registered(fmt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_format(fmt)
    assert known_formats() == BUILT_IN


class Careless(Int4Weight):
    """One whose blocks are all of the matrix, and in BF16."""

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """Too much."""
        return super().dense(slice(None), slice(None)).bfloat16()


class Deaf(Int4Weight):
    """One that gives as many rows as it is asked for, but always the first."""

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """Rows from the first."""
        return super().dense(slice(0, rows.stop - rows.start), cols)


class Blind(Int4Weight):
    """One that gives all columns whatever it is asked for."""

    def dense(self, rows: slice, cols: slice) -> Tensor:
        """All columns."""
        return super().dense(rows, slice(None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Deaf, "format 'int4': dense must give the rows and columns it is asked for"),
        (Blind, "format 'int4': dense must give the rows and columns it is asked for"),
        (lambda weight: Int4Weight(weight * torch.inf), "format 'int4': dense gives NaN or infinity"),
        (Careless, r"gives torch.bfloat16 of shape \(\d+, 128\) as a row of 128 values in FP32"),
        (lambda weight: Int4Weight(weight.T), r"makes a weight of shape \(128, \d+\) of one of \(\d+, 128\)"),
        (lambda weight: weight.half(), "format 'int4' makes no torch.nn.Module, but Tensor"),
    ],
)
def test_what_makes_no_weights_is_refused_at_load(make: Any, message: str) -> None:
    register_format(replace(INT4, make=make))
    with pytest.raises(ConfigError, match=message):
        PAHQModel.from_pretrained("demo", format="int4")


def test_one_that_fails_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fail(weight: Tensor) -> Any:
        raise ValueError("no such luck")

    register_format(replace(INT4, make=fail))
    where = ("discover", "demo", "--task", "ioi", "--n", "2", "--out", str(tmp_path / "run"))
    assert run_main(*where, "--format", "int4") == 2
    said = "pahq: format 'int4' failed: ValueError: no such luck; PAHQ_TRACEBACK=1 shows where"
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize("command", ["discover", "attribute", "sweep"])
def test_an_unknown_name_ends_a_command_before_a_model_is_loaded(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"discover": (), "attribute": ("--topn", "3"), "sweep": ("--thresholds", "0.1")}[command]
    where = (command, "nowhere", "--task", "ioi", "--out", "nowhere", *more)
    assert run_main(*where, "--format", "fp4") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "--format" in err and f"format must be one of {', '.join(BUILT_IN)}; got 'fp4'" in err
    assert run_main(command, "--help") == 0
    shown = "".join(c for c in capsys.readouterr().out if c.isalnum() or c in "-,")
    assert ",".join(BUILT_IN) in shown
