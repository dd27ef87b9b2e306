"""The GPU benchmark runs on a CPU too, where its figures mean nothing but all of its steps are run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_scale
from benchmarks.gpu_agreement import Suite, agreement

CPU = torch.device("cpu")


def test_a_machine_without_a_card_is_told_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert gpu.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu: this machine lacks a CUDA device")
    assert said.count("\n") == 1


def test_an_unknown_step_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--steps", "machines"]) == 2
    assert "no step 'machines'; there are machine, products" in capsys.readouterr().err


def test_a_step_that_failed_is_run_again_and_a_finished_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []

    def steps(options: Any) -> dict[str, gpu.Step]:
        def good(device: torch.device, options: Any) -> dict[str, Any]:
            runs.append("good")
            return {"figure": 0.5, "rows": [{"name": "a", "ms": 1.0}]}

        def bad(device: torch.device, options: Any) -> dict[str, Any]:
            runs.append("bad")
            raise RuntimeError("no luck")

        return {"bad": bad, "good": good}

    monkeypatch.setattr(gpu, "steps", steps)
    file = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--json", str(file)]
    assert gpu.main(arguments) == 1  # and the step after the one that failed was run
    assert gpu.main(arguments) == 1
    assert runs == ["bad", "good", "bad"]
    document = json.loads(file.read_text())
    assert document["steps"]["bad"]["failed"] == "RuntimeError: no luck"
    assert document["steps"]["good"]["figure"] == 0.5
    assert document["conditions"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert "figure 0.5" in shown
    assert "good: rows" in shown


def test_pieces_of_a_search_on_a_tiny_shape() -> None:
    found = gpu_scale.measure(gpu_scale.TINY, CPU)
    assert [row["phase"] for row in found["phases"]] == ["load", "capture"]
    assert [row["reader"] for row in found["readers"]] == ["logits", "m2", "m1", "a1.h0<q>", "m0", "a0.h0<q>"]
    assert all(row["ms_per_edge"] > 0 and row["look_ms"] > 0 for row in found["readers"])
    both, hooks, attribution = found["rivals"]
    assert both["sparse"] == pytest.approx(both["hooks"], rel=1e-3)
    assert hooks["ms"] > 0
    assert attribution["ms"] > 0


def test_pieces_without_time_are_named_and_the_step_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_scale, "SHAPES", (gpu_scale.TINY,))
    clock = iter(range(10**6))  # a second for every look at it
    monkeypatch.setattr(gpu_scale.time, "perf_counter", lambda: float(next(clock)))
    file = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--json", str(file), "--steps", "tiny", "--minutes", "0.5"]
    assert gpu.main(arguments) == 0
    found = json.loads(file.read_text())["steps"]["tiny"]
    assert [row["reader"] for row in found["readers"]] and "EAP-IG" in found["left_out"]
    assert f"tiny: done but for {found['left_out'][0]}" in capsys.readouterr().err
    assert gpu.main([*arguments[:-1], "1000"]) == 0
    found = json.loads(file.read_text())["steps"]["tiny"]
    assert "left_out" not in found and len(found["readers"]) == 6 and len(found["rivals"]) == 3


def test_agreement_compares_circuits_and_repeats() -> None:
    suite = Suite((("fp32", "sparse"), ("pahq:compute=fp8", "sparse")), 4, 0.5, readers="logits,m*")
    first, second = agreement("demo", CPU, suite)["searches"]
    assert first["same_circuit"] and first["repeats"] and first["score_error"] == 0
    assert second["failed"].startswith("ConfigError: compute=fp8 needs")
