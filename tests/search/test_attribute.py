"""`PAHQModel.attribute` and `pahq attribute`: circuits, their facts and files; gradients of projections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pahq_hf import Circuit, PAHQConfig, PAHQModel
from pahq_hf.errors import ConfigError, MetricError, RunError
from pahq_hf.modeling.lowering import spill_blocks
from pahq_hf.precision.embeddings import EmbeddingMatrix
from pahq_hf.precision.formats.registry import known_formats
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.search.attribution.kinds import MethodName
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.journal import Journal, Step
from tests.helpers import (
    assert_same_circuit,
    files_of,
    id_rows,
    journal_lines,
    run_main,
    save_tiny,
    unsealed,
    weight_of,
    wrapped,
    write_rows,
)
from tests.models import FAMILIES, random_task

TASK = random_task(batch=3, padding="left", seed=5, metric="logit_diff")
METHODS = get_args(MethodName)


# -- circuits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_method_makes_a_circuit(method: Any, tmp_path: Path) -> None:
    model = wrapped("llama")
    circuit = model.attribute(TASK, method=method, topn=20, out=tmp_path)
    graph = circuit.graph
    assert circuit.scores.dtype == np.float64 and circuit.edge_count == 20
    assert np.array_equal(circuit.tested, graph.all_edges)
    assert not circuit.scores[~graph.all_edges].any()
    assert circuit.scores[circuit.kept].min() >= circuit.scores[graph.all_edges & ~circuit.kept].max()
    facts = circuit.discovery
    assert facts["method"] == method and facts["arguments"]["metric"] == "logit_diff"
    assert facts["edges"]["tested"] == facts["edges"]["total"] == graph.edge_count
    judged = model.evaluate(circuit, TASK)
    assert facts["metric"]["fp32"] == judged["metric"]["value"]
    assert (facts["metric"]["full"], facts["metric"]["empty"]) == (
        judged["metric"]["full"],
        judged["metric"]["empty"],
    )
    assert facts["peak_memory"]["anonymous"] > 0 and facts["seconds"]["total"] > 0
    again = Circuit.from_pretrained(tmp_path)
    assert np.array_equal(again.scores, circuit.scores) and np.array_equal(again.kept, circuit.kept)
    assert again.discovery == facts and again.means is not None


def test_without_a_choice_all_edges_stay() -> None:
    circuit = wrapped("gpt2").attribute(TASK, method="eap")
    assert np.array_equal(circuit.kept, circuit.graph.all_edges)
    assert circuit.discovery["metric"]["fp32"] == pytest.approx(circuit.discovery["metric"]["full"])


@pytest.mark.parametrize("absolute", [False, True])
def test_a_threshold_chooses_edges(absolute: bool) -> None:
    circuit = wrapped("gpt2").attribute(TASK, method="eap", threshold=0.05, absolute=absolute)
    size = np.abs(circuit.scores) if absolute else circuit.scores
    assert np.array_equal(circuit.kept, (size >= 0.05) & circuit.graph.all_edges)
    assert 0 < circuit.edge_count < circuit.graph.edge_count
    assert bool(circuit.scores[circuit.kept].min() < 0) is absolute


def test_the_same_twice_to_the_bit() -> None:
    model = PAHQModel(FAMILIES["llama"](), PAHQConfig())
    one, two = (model.attribute(TASK, method="eap-ig", metric="kl") for _ in range(2))
    assert np.array_equal(one.scores, two.scores)


def test_the_model_is_left_as_it_was() -> None:
    model = PAHQModel(FAMILIES["llama"](), PAHQConfig())
    before, size = model(TASK.clean_ids).logits, model.patched.precision.nbytes
    for method in METHODS:
        model.attribute(TASK, method=method)
    assert torch.equal(model(TASK.clean_ids).logits, before)
    assert model.patched.precision.nbytes == size
    assert not any(linear.held_bytes for linear in model.patched.linears())
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in model.base_model.modules()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "acdc"}, "method must be one of"),
        ({"topn": 3, "threshold": 0.1}, "not both"),
        ({"topn": 0}, "topn must be a whole number from 1 on; got 0"),
        ({"topn": 10**6}, "cannot keep"),
        ({"steps": 0}, "steps"),
        ({"threshold": float("nan")}, "threshold"),
        ({"seed": -1}, "seed"),
        ({"ablation": "none"}, "ablation"),
        ({"speed": 3}, "no option"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrapped("gpt2").attribute(TASK, **options)


def test_options_go_to_json_and_back() -> None:
    config = AttributionConfig("eap-ig", "nll", 7, topn=3, absolute=True, ablation="zero")
    assert AttributionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("method", ["eap", "hisp"])
def test_kl_is_refused(method: Any) -> None:
    with pytest.raises(MetricError, match="gradient at the clean run is zero"):
        wrapped("gpt2").attribute(TASK, method=method, metric="kl")


def test_a_folder_with_a_run_is_refused_before_any_work(tmp_path: Path) -> None:
    model = wrapped("gpt2")
    model.attribute(TASK, method="random", topn=5, out=tmp_path)
    before = (tmp_path / "circuit.json").read_bytes()
    with pytest.raises(RunError, match="holds a run already"):
        model.attribute(TASK, method="eap", out=tmp_path)
    assert (tmp_path / "circuit.json").read_bytes() == before


def test_exact_scores_go_on_reader_by_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, append = wrapped("llama", regime="pahq"), Journal.append
    options: dict[str, Any] = {"method": "exact", "topn": 9, "progress": False}
    whole = model.attribute(TASK, **options)

    def fail(journal: Journal, step: Step) -> None:
        if len(journal.steps) == 5:
            raise KeyboardInterrupt
        append(journal, step)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", fail)
        with pytest.raises(KeyboardInterrupt):
            model.attribute(TASK, out=tmp_path, **options)
    with pytest.raises(RunError, match="continue it with --resume"):
        model.attribute(TASK, out=tmp_path, **options)
    circuit = model.attribute(TASK, out=tmp_path, resume=True, **options)
    assert_same_circuit(circuit, whole)
    assert whole.verified and circuit.verified
    both, one = circuit.record.evaluations or 0, whole.record.evaluations or 0
    assert one <= both < 1.5 * one  # of both parts: the second has gone on
    assert_same_circuit(model.attribute(TASK, out=tmp_path, resume=True, **options), whole)
    with pytest.raises(RunError, match="its topn is 9 there, 8 now"):
        model.attribute(TASK, out=tmp_path, resume=True, **(options | {"topn": 8}))


@pytest.mark.parametrize("scores", [{}, {"0": "high"}, {"x": 0.5}])
def test_a_damaged_step_of_exact_scores_is_named(scores: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped("llama")
    model.attribute(TASK, method="exact", out=tmp_path)
    (tmp_path / "circuit.json").unlink()
    lines = unsealed(journal_lines(tmp_path))
    step = json.loads(lines[2]) | {"scores": scores}
    (tmp_path / "journal.jsonl").write_bytes(b"".join([*lines[:2], json.dumps(step).encode() + b"\n"]))
    with pytest.raises(RunError, match=r"is damaged \(record 2 on line 3"):
        model.attribute(TASK, method="exact", out=tmp_path, resume=True)


def test_a_finished_attribution_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of an earlier version, whose header said less."""
    model = wrapped("gpt2")
    first = model.attribute(TASK, method="eap", topn=5, out=tmp_path)
    monkeypatch.setattr("pahq_hf.search.bench.make_gradient_runs", None)
    for _ in range(2):
        before = files_of(tmp_path)
        again = model.attribute(TASK, method="eap", topn=5, out=tmp_path, resume=True)
        assert np.array_equal(again.kept, first.kept) and np.array_equal(again.scores, first.scores)
        assert files_of(tmp_path) == before
        for changed in ({"topn": 6}, {"method": "hisp"}, {"ablation": "zero"}):
            with pytest.raises(RunError, match=r"holds another run: its (topn|search|ablation) is"):
                model.attribute(TASK, **({"method": "eap", "topn": 5} | changed), out=tmp_path, resume=True)
        document = json.loads((tmp_path / "discovery.json").read_text())
        document["header"] = {name: document["header"][name] for name in ("model", "task", "dtype")}
        document.pop("settings", None)
        (tmp_path / "discovery.json").write_text(json.dumps(document))


# -- command line ------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model")
    task = random_task(batch=3, seed=5)
    data = write_rows(tmp_path / "task.jsonl", id_rows(task))
    where = ["attribute", str(tmp_path / "model"), "--task", str(data), "--out", str(tmp_path / "out")]
    assert run_main(*where, "--method", "eap", "--metric", "kl") == 2
    assert "eap-ig" in capsys.readouterr().err and not (tmp_path / "out" / "circuit.json").exists()
    more = ["--method", "eap-ig", "--steps", "3", "--topn", "12", "--metric", "kl", "--precision", "fp32"]
    assert run_main(*where, *more, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "eap-ig" and facts["edges"]["kept"] == 12
    circuit = Circuit.from_pretrained(tmp_path / "out")
    model = wrapped("llama")
    ours = model.attribute(task, method="eap-ig", steps=3, topn=12, metric="kl")
    np.testing.assert_allclose(circuit.scores, ours.scores, atol=1e-6)
    assert run_main(*where, *more) == 2 and "holds a run already" in capsys.readouterr().err
    assert run_main("show", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "eap-ig" in shown and "12" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "integrated gradients (EAP-IG)" in card and "best 12 edges" in card and "ACDC" not in card


def test_acdcs_own_runs_name_their_method(tmp_path: Path) -> None:
    circuit = wrapped("gpt2").discover(TASK, threshold=0.1, out=tmp_path, progress=False)
    assert circuit.discovery["method"] == "acdc"
    assert "found by ACDC" in (tmp_path / "README.md").read_text()


# -- gradients of projections ------------------------------------------------------------------------------


def lowered(kind: Any, fmt: Any) -> tuple[Any, torch.Tensor]:
    """A projection in low precision, and its FP32 weight."""
    weight = weight_of(48, 32, seed=3)
    linear = kind(weight, torch.linspace(-1, 1, 48))
    linear.lower(fmt, spill_blocks({"it": linear})["it"])
    return linear, weight


@pytest.mark.parametrize("fmt", known_formats())
@pytest.mark.parametrize("kind", [PAHQLinear, EmbeddingMatrix])
def test_gradients_of_a_low_projection(kind: Any, fmt: Any) -> None:
    linear, _ = lowered(kind, fmt)
    x, y = weight_of(6, 32, seed=4).requires_grad_(), weight_of(6, 48, seed=5)
    made = linear(x)
    torch.testing.assert_close(made, F.linear(x, linear.dense(), linear.bias))
    (gradient,) = torch.autograd.grad(made, x, y)
    torch.testing.assert_close(gradient, y @ linear.dense())


@pytest.mark.parametrize("kind", [PAHQLinear, EmbeddingMatrix])
def test_an_exact_product_and_a_low_gradient(kind: Any) -> None:
    """The backward pass runs at the precision of its own time."""
    linear, weight = lowered(kind, "fp8")
    x, y = weight_of(6, 32, seed=4).requires_grad_(), weight_of(6, 48, seed=5)
    mode = linear.shared.mode
    with mode.full_precision() if kind is PAHQLinear else mode.exact_embeddings():
        made = linear(x)
        torch.testing.assert_close(made, F.linear(x, weight, linear.bias))
        (full,) = torch.autograd.grad(made, x, y, retain_graph=True)
    (low,) = torch.autograd.grad(made, x, y)
    torch.testing.assert_close(full, y @ weight)
    torch.testing.assert_close(low, y @ linear.dense())
    assert 1e-3 < (low - full).norm() / full.norm() < 0.1


def test_no_decoded_weight_waits_for_the_backward_pass() -> None:
    linear, _ = lowered(PAHQLinear, "fp8")
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(weight_of(6, 32, seed=4).requires_grad_())
        assert not kept
        F.linear(weight_of(6, 32, seed=4).requires_grad_(), linear.dense())
    assert 48 * 32 in kept  # what PyTorch's own would keep


def test_a_packed_product_has_gradients() -> None:
    linear, _ = lowered(PAHQLinear, "fp8")
    linear.hold_packed()
    x, y = weight_of(6, 32, seed=4).requires_grad_(), weight_of(6, 48, seed=5)
    (gradient,) = torch.autograd.grad(linear(x), x, y)
    torch.testing.assert_close(gradient, y @ linear.dense())
