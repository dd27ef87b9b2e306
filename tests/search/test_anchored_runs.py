"""Whole runs in the anchored regime: what they write, what pins them, and the command line's share."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import ACDCConfig, Circuit, PAHQConfig, PAHQModel, Task
from pahq_hf.config import EngineConfig
from pahq_hf.errors import ConfigError, RunError
from tests.helpers import (
    FILES,
    assert_same_circuit,
    files_of,
    id_rows,
    journal_lines,
    run_main,
    save_tiny,
    wrapped,
    write_rows,
)
from tests.models import FAMILIES, random_task
from tests.tiers import quick

TASK = random_task(batch=3, seed=21)
TAU = 0.03
_models: dict[PAHQConfig, PAHQModel] = {}


def model_of(**options: Any) -> PAHQModel:
    """The tiny Llama in the anchored regime; shared."""
    config = PAHQConfig(**({"compute": "fp32"} | options))
    if config not in _models:
        _models[config] = PAHQModel(FAMILIES["llama"](), config)
    return _models[config]


def discover(model: PAHQModel, out: Path | None = None, task: Task = TASK, **options: Any) -> Circuit:
    return model.discover(task, out=out, progress=False, **({"threshold": TAU} | options))


def strict(text: str) -> Any:
    """JSON without NaN and infinities."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that looked at every edge again."""
    folder = tmp_path_factory.mktemp("run") / "out"
    discover(model_of(), folder, margin=math.inf)
    return folder


def interrupted(finished: Path, folder: Path, records: int) -> Path:
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(b"".join(journal_lines(finished)[: 1 + records]))
    return folder


# -- what a run writes ----------------------------------------------------------------------------------


def test_every_file_of_a_run_without_a_margin_is_strict_json(endless: Path) -> None:
    assert set(files_of(endless)) == FILES
    for name in ("circuit.json", "discovery.json"):
        strict((endless / name).read_text())
    records = [strict(line.decode()) for line in journal_lines(endless)]
    header, facts = records[0], strict((endless / "discovery.json").read_text())
    assert header == facts["header"] | {
        "settings": facts["settings"],
        "data": facts["task"],
        "check": header["check"],
    }
    assert header["acdc"]["margin"] == facts["arguments"]["margin"] == "inf"
    assert ACDCConfig.from_dict({k: v for k, v in header["acdc"].items()}).margin == math.inf
    assert header["precision"]["regime"] == "pahq" and header["precision"]["compute"] == "fp32"
    looks = facts["second_looks"]
    assert looks["margin"] == "inf"
    assert looks["tests"] == sum(record["looks"] for record in records[1:]) >= facts["edges"]["tested"] > 0
    assert looks["changed"] == sum(record["changed"] for record in records[1:]) <= looks["tests"]


def test_an_endless_margin_finds_the_fp32_circuit(endless: Path) -> None:
    found, exact = Circuit.from_pretrained(endless), discover(wrapped("llama"))
    assert np.array_equal(found.kept, exact.kept) and np.array_equal(found.tested, exact.tested)
    assert np.abs(found.scores - exact.scores).max() <= 1e-5
    for name in ("full", "empty", "final", "final_recomputed", "fp32"):
        assert found.discovery["metric"][name] == pytest.approx(exact.discovery["metric"][name], abs=1e-5)
    none = exact.discovery["second_looks"]
    assert none == {"margin": None, "tests": 0, "changed": 0}


@pytest.mark.parametrize("active", ["receiver", "both"])
def test_the_default_margin_looks_at_some_edges(active: Any) -> None:
    circuit = discover(model_of(active=active), threshold=0.01)
    looks, header = circuit.discovery["second_looks"], circuit.discovery["header"]
    assert looks["margin"] == header["acdc"]["margin"] == 0.2
    assert header["precision"]["active"] == active
    assert 0 < looks["tests"] < circuit.discovery["edges"]["tested"]
    assert circuit.discovery["evaluations"] >= circuit.discovery["edges"]["tested"] + 2 * looks["tests"]
    blind = discover(model_of(active=active), threshold=0.01, margin=0.0)
    assert blind.discovery["second_looks"] == {"margin": 0.0, "tests": 0, "changed": 0}


@pytest.mark.parametrize("margin", quick([0.2, math.inf], 0.2))
def test_the_hooks_engine_runs_the_anchored_regime_too(margin: float) -> None:
    sparse, hooks = (
        discover(model_of(), engine=EngineConfig(engine=kind), margin=margin)  # type: ignore[arg-type]
        for kind in ("sparse", "hooks")
    )
    assert np.array_equal(sparse.kept, hooks.kept) and np.array_equal(sparse.tested, hooks.tested)
    assert np.abs(sparse.scores - hooks.scores).max() < 1e-5
    assert hooks.discovery["second_looks"] == sparse.discovery["second_looks"]
    metric = hooks.discovery["metric"]
    assert metric["final"] == pytest.approx(metric["fp32"], abs=1e-6)


# -- going on, or refusing to ---------------------------------------------------------------------------


def test_runs_with_second_looks_resume_to_the_bit(endless: Path, tmp_path: Path) -> None:
    whole = Circuit.from_pretrained(endless)
    for records in (0, 1, 6, 13, len(journal_lines(endless)) - 1):
        folder = interrupted(endless, tmp_path / str(records), records)
        circuit = discover(model_of(), folder, margin=math.inf, resume=True)
        assert circuit.discovery["resumed_readers"] == records
        assert circuit.discovery["second_looks"] == whole.discovery["second_looks"]
        assert_same_circuit(circuit, whole)
        assert journal_lines(folder) == journal_lines(endless)
    assert_same_circuit(discover(model_of(), endless, margin=math.inf, resume=True), whole)


@pytest.mark.parametrize("done", [True, False], ids=["finished", "interrupted"])
def test_margin_compute_and_active_pin_a_run(endless: Path, tmp_path: Path, done: bool) -> None:
    folder = endless if done else interrupted(endless, tmp_path / "half", 4)
    before = files_of(folder)
    for options in ({}, {"margin": 0.2}, {"margin": 0.0}, {"margin": 1e300}):
        with pytest.raises(RunError, match="holds another run: its margin is inf there, "):
            discover(model_of(), folder, resume=True, **options)
    for changed in ({"compute": "bf16"}, {"active": "both"}, {"format": "int8"}):
        with pytest.raises(RunError, match=r"holds another run: its (compute|active|format) is "):
            discover(model_of(**changed), folder, resume=True, margin=math.inf)
    assert files_of(folder) == before


# -- configurations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [None, 0.0, 0.25, 1e300, math.inf])
def test_a_margin_survives_json(margin: float | None) -> None:
    config = ACDCConfig(threshold=0.02, margin=margin)
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert ACDCConfig.from_dict(strict(text)) == ACDCConfig.from_dict(config.to_dict()) == config
    assert replace(config, threshold=0.5).margin == margin


@pytest.mark.parametrize("margin", [math.nan, -0.1, -math.inf])
def test_margins_that_make_no_sense_are_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin must be a number >= 0 or inf"):
        ACDCConfig(margin=margin)
    with pytest.raises(ConfigError, match="margin must be a number >= 0 or inf"):
        ACDCConfig.from_dict({"margin": margin})


@pytest.mark.parametrize("regime", ["fp32", "rtn", "pahq-literal"])
def test_only_the_anchored_regime_has_margins_writers_and_bf16(regime: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"active=both needs precision pahq; in {regime}"):
        PAHQConfig(regime, active="both")
    for compute in ("bf16", "fp8"):
        with pytest.raises(ConfigError, match=f"compute={compute} needs precision pahq"):
            PAHQConfig(regime, compute=compute)  # type: ignore[arg-type]
    assert wrapped("llama", regime=regime).pahq_config.compute == "fp32"  # what auto means there
    for margin in (0.2, math.inf):
        with pytest.raises(ConfigError, match=f"a margin needs precision pahq: in {regime}"):
            discover(wrapped("llama", regime=regime), tmp_path / "out", margin=margin)
    assert not (tmp_path / "out").exists()
    assert discover(wrapped("llama", regime=regime), margin=0.0).edge_count


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"compute must be one of auto, fp32, bf16.*; got 'fp16'"):
        PAHQConfig(compute="fp16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="active must be one of receiver, both; got 'sender'"):
        PAHQConfig(active="sender")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="compute=fp8 needs format fp8 and CUDA"):
        PAHQModel(FAMILIES["llama"](), PAHQConfig(compute="fp8"))
    assert PAHQConfig().regime == "pahq" and model_of(compute="auto").pahq_config.compute in ("fp32", "bf16")


# -- the command line -----------------------------------------------------------------------------------


def run_demo(capfd: pytest.CaptureFixture[str], out: Path, *more: str) -> tuple[int, str, str]:
    arguments = ["discover", "demo", "--task", "ioi", "--n", "8", "--json", "--out", str(out), *more]
    code = run_main(*arguments)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_the_demo_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, text, _ = run_demo(capfd, out, "--margin", "inf", "--compute", "bf16")
    assert code == 0
    assert text.endswith("\n") and text.count("\n") == 1
    facts = strict(text)
    written = strict((out / "discovery.json").read_text())
    assert written.pop("checksums") and facts == {"out": str(out), "next": facts["next"], **written}
    assert facts["second_looks"]["margin"] == "inf"
    assert facts["second_looks"]["tests"] >= facts["edges"]["tested"] > 50
    assert facts["precision"]["regime"] == "pahq" and facts["precision"]["compute"] == "bf16"
    metric = facts["metric"]
    assert metric["final"] == pytest.approx(metric["fp32"], abs=1e-5)
    assert metric["full"] < metric["fp32"] < metric["empty"]
    before = files_of(out)
    for other in (["--margin", "0.5"], [], ["--margin", "inf", "--compute", "fp32"]):
        compute = [] if "--compute" in other else ["--compute", "bf16"]
        code, text, err = run_demo(capfd, out, "--resume", *compute, *other)
        assert (code, text) == (2, "")
        assert err.splitlines()[-1].startswith(f"pahq: {out} holds another run: its ")
    code, text, _ = run_demo(capfd, out, "--resume", "--margin", "inf", "--compute", "bf16")
    assert code == 0 and strict(text) == facts
    assert files_of(out) == before
    assert run_main("show", str(out), "--json") == 0
    strict(capfd.readouterr().out)


BAD = {
    "nan": (["--margin", "nan"], "margin must be a number >= 0 or inf"),
    "negative": (["--margin=-0.1"], "margin must be a number >= 0 or inf"),
    "a word": (["--margin", "wide"], "--margin"),
    "rtn": (["--margin", "0.2", "--precision", "rtn"], "a margin needs precision pahq"),
    "fp32": (["--margin", "inf", "--precision", "fp32"], "a margin needs precision pahq"),
    "both": (["--active", "both", "--precision", "rtn"], "active=both needs precision pahq"),
    "bf16": (["--compute", "bf16", "--precision", "pahq-literal"], "compute=bf16 needs precision pahq"),
    "fp16": (["--compute", "fp16"], "--compute"),
    "float64": (["--dtype", "float64"], "low-precision regimes need dtype=torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line_and_leave_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, reason = BAD[name]
    save_tiny(tmp_path / "model")
    write_rows(tmp_path / "ids.jsonl", id_rows(TASK))
    where = ["--task", str(tmp_path / "ids.jsonl"), "--out", str(tmp_path / "out")]
    assert run_main("discover", str(tmp_path / "model"), *where, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and not (tmp_path / "out").exists()
    line = captured.err.splitlines()[-1]
    assert line.startswith("pahq: ") and reason in line
