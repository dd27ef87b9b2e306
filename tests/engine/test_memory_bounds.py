"""What keeps a run's memory bounded: activation stores, micro-batches, budgets of weights, accounting."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.capture.activations import Activations
from pahq_hf.capture.recording import capture
from pahq_hf.capture.store import DiskStore, MemoryStore, stored
from pahq_hf.checkpoint.load import load_config
from pahq_hf.config import EngineConfig
from pahq_hf.engine.hooks import passes
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.memory_plan import empty_model, report
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.precision.holding import Holding
from pahq_hf.precision.products import Product
from pahq_hf.precision.weight_cache import WeightCache
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.tasks.base import Task
from tests.helpers import GRAPHS, assert_same_circuit, random_edges, save_tiny, small_disk, wrapped
from tests.models import PADDINGS, random_task, relative_error
from tests.tiers import quick

pytestmark = pytest.mark.crossing

graphs = pytest.mark.parametrize("name", GRAPHS)
TASK = random_task(batch=5, seed=3, rows=2)


def tensors(run: Activations) -> list[Tensor]:
    """All that was written and read."""
    return [run.embedding, *run.z, *run.mlp, *run.attention_in, *run.mlp_in, run.final_in, run.logits]


# -- stores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_file_gives_back_what_is_put_in(dtype: torch.dtype) -> None:
    store = DiskStore()
    values = [torch.randn(shape).to(dtype) for shape in ((3, 5, 7), (1,), (0, 4), (64, 3))]
    rooms = [stored(store, value) for value in values]
    for room, value in zip(rooms, values, strict=True):
        assert torch.equal(room, value) and room.dtype == dtype
    rooms[0][1] = 0  # rooms do not overlap
    assert not rooms[0][1].any() and torch.equal(rooms[3], values[3])


def test_a_file_is_nameless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the process, nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = stored(DiskStore(), torch.ones(1000))
    assert not list(tmp_path.iterdir()) and float(room.sum()) == 1000


def test_a_full_disk_is_an_error_of_ours() -> None:
    store = DiskStore()
    with small_disk(10_000), pytest.raises(RunError, match=r"cannot keep 80000 bytes.*TMPDIR"):
        store.empty((20_000,), torch.empty(0))


def test_a_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(RunError, match="cannot keep activations"):
        DiskStore()


@pytest.mark.parametrize("engine", ["sparse", "hooks"])
@pytest.mark.parametrize("regime", ["fp32", "pahq", "rtn"])
def test_decisions_are_the_same_from_a_file(regime: str, engine: str) -> None:
    model = wrapped("llama", regime=regime)
    runs = [
        model.discover(
            TASK,
            threshold=0.02,
            metric="kl",
            progress=False,
            engine=EngineConfig(engine=engine, activation_store=store),  # type: ignore[arg-type]
        )
        for store in ("ram", "disk")
    ]
    assert_same_circuit(*runs)
    assert runs[0].discovery["metric"] == runs[1].discovery["metric"]


def test_an_unknown_store() -> None:
    with pytest.raises(ConfigError, match="activation_store must be one of ram, disk"):
        EngineConfig(activation_store="tape")  # type: ignore[arg-type]


# -- a few examples at a time -----------------------------------------------------------------------


@graphs
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("store", [MemoryStore, DiskStore])
def test_captured_in_parts_is_captured_at_once(
    name: str, padding: str, store: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = wrapped(name).patched, random_task(batch=5, seed=4, padding=padding)
    whole = capture(model, task, task.clean_ids)
    monkeypatch.setattr("pahq_hf.capture.recording._TOKENS", 2 * task.length)
    parts = capture(model, task, task.clean_ids, store())
    for ours, theirs in zip(tensors(parts), tensors(whole), strict=True):
        assert relative_error(ours, theirs) < 1e-5
    for ours, theirs in zip(parts.masks, whole.masks, strict=True):
        assert ours is not None and theirs is not None
        assert torch.equal(ours, theirs.expand(ours.shape))
    assert len({id(mask) for mask in parts.masks}) == len({id(mask) for mask in whole.masks})


@pytest.mark.parametrize("regime", quick(["fp32", "pahq", "pahq-literal"], "fp32", "pahq"))
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hooks_in_parts(name: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every circuit's logits and the whole search are those of one forward pass for all."""
    model = wrapped(name, regime=regime, compute="fp32")
    edges = [random_edges(model.graph, share, seed) for seed, share in enumerate((0.1, 0.5, 0.9))]

    def run() -> tuple[list[Tensor], dict[str, float]]:
        engine = HooksEngine(model.patched, TASK, "kl")
        circuit = model.discover(
            TASK,
            threshold=0.03,
            metric="kl",
            readers="logits,m*",  # of a slow engine
            progress=False,
            engine=EngineConfig(engine="hooks"),
        )
        return [engine.logits(kept) for kept in edges], circuit.discovery["metric"]

    whole, metric = run()
    monkeypatch.setattr(passes, "BUFFER_BYTES", 1)
    parts, metric_of_parts = run()
    for ours, theirs in zip(parts, whole, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert metric_of_parts["final"] == pytest.approx(metric["final"], abs=1e-5)


def test_rows_in_any_order_come_back_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order = torch.randperm(len(TASK.answers), generator=torch.Generator().manual_seed(1))
    mixed = Task(
        name="mixed", clean_ids=TASK.clean_ids, corrupted_ids=TASK.corrupted_ids,
        attention_mask=TASK.attention_mask, answer_rows=TASK.answer_rows[order],
        answer_positions=TASK.answer_positions[order],
        answers=tuple(TASK.answers[i] for i in order.tolist()),
        distractors=tuple(TASK.distractors[i] for i in order.tolist()),
    )  # fmt: skip
    model = wrapped("llama").patched
    monkeypatch.setattr("pahq_hf.capture.recording._TOKENS", 2 * TASK.length)
    ours = capture(model, mixed, mixed.clean_ids).logits
    assert torch.equal(ours, capture(model, TASK, TASK.clean_ids).logits[order])


# -- weights under a budget -------------------------------------------------------------------------


@pytest.mark.parametrize("regime", quick(["fp32", "pahq", "rtn", "pahq-literal"], "fp32", "pahq"))
def test_a_budget_changes_memory_and_nothing_else(regime: str) -> None:
    model = wrapped("llama", regime=regime)
    free = model.discover(TASK, threshold=0.02, metric="kl", progress=False)
    tight = model.discover(
        TASK, threshold=0.02, metric="kl", progress=False, engine=EngineConfig(memory_budget=20_000)
    )
    assert np.array_equal(tight.kept, free.kept) and np.array_equal(tight.tested, free.tested)
    assert np.allclose(tight.scores, free.scores, rtol=1e-4, atol=1e-5)  # other batches round otherwise


@pytest.mark.parametrize("kind", [SparseEngine, HooksEngine])
def test_a_search_leaves_nothing_behind(kind: type[SparseEngine] | type[HooksEngine]) -> None:
    model = wrapped("llama", regime="pahq")
    engine = kind(model.patched, TASK, "kl", rule=RegimeRule.of(model.pahq_config, model.patched.device))
    holdings = engine.session.holding, model.patched.precision.mode.holding
    held: list[int] = []
    config = ACDCConfig(threshold=0.02, metric="kl", readers="logits,m1")
    search(engine, config, on_reader=lambda *_: held.append(nbytes(holdings[0])))
    assert max(held) > 0 and [nbytes(holding) for holding in holdings] == [0, 0]


def nbytes(holding: Holding) -> int:
    """Bytes of what stays for another use, and blocks in FP32."""
    raised = [block.size for blocks in holding.raised.values() for block, _ in blocks]
    return holding.cache.nbytes + holding.full.nbytes + sum(raised)


def test_what_weights_are_packed_as_stays_within_the_budget() -> None:
    model = wrapped("llama", regime="pahq")
    linears, control = list(model.patched.linears()), model.patched.precision
    size = 4 * linears[0].in_features * linears[0].out_features  # of the product of one query projection
    control.allow(held=size + 1, full=0)
    for linear in linears:
        linear.hold_difference()
        linear.piece(slice(0, 4), linear.whole.cols)
        assert 0 < control.shared.cache.nbytes == sum(linear.held_bytes for linear in linears) <= size + 1
    control.allow(held=0, full=0)
    assert control.shared.cache.nbytes == 0
    control.allow(held=1 << 30, full=0)
    control.release()


def uses(cache: WeightCache, keys: Sequence[int], *, turns: bool) -> list[int]:
    """What is made when values of 64 bytes are used in this order; each in a turn of its own, or in one."""
    made: list[int] = []

    def make(number: int) -> Product:
        made.append(number)
        return Product(torch.ones(4, 4))

    for number in keys:
        if turns:
            cache.turn()
        cache.get((number,), lambda number=number: make(number))  # type: ignore[misc]
    return made


def test_the_least_recently_used_goes_first() -> None:
    cache = WeightCache(2 * 64)
    assert uses(cache, (1, 2, 1, 3, 1, 2), turns=True) == [1, 2, 3, 2]  # 3 pushes 2 out
    assert cache.nbytes == 128
    cache.allow(0)
    assert cache.nbytes == 0
    assert uses(cache, (1, 1), turns=True) == [1, 1] and cache.nbytes == 0


def test_of_one_turn_the_newest_goes_first() -> None:
    cache = WeightCache(2 * 64)
    assert uses(cache, (1, 2, 3) * 3, turns=False) == [1, 2, 3, 3, 3]  # else nothing would be found again
    cache.turn()
    assert uses(cache, (4, 5, 4, 5), turns=False) == [4, 5]  # those of the turn before make room
    assert cache.nbytes == 128


def test_what_does_not_fit_pushes_nothing_out() -> None:
    cache = WeightCache(64)
    assert uses(cache, (1,), turns=True) == [1]
    cache.turn()
    cache.get((2,), lambda: torch.ones(17))
    assert cache.peek((2,)) is None and uses(cache, (1,), turns=True) == []


def test_values_are_dropped_by_the_beginning_of_their_keys() -> None:
    cache = WeightCache()
    for key in (("a",), ("a", "b"), ("a", "b", 1), ("a", "c"), ("ab",)):
        cache.get(key, lambda: torch.ones(1))
    assert cache.bytes_of("a") == 16 and cache.bytes_of("a", "b") == 8
    cache.drop("a", "b")
    assert cache.nbytes == 12 and cache.peek(("a", "b", 1)) is None and cache.peek(("a", "c")) is not None
    cache.clear()
    assert cache.nbytes == 0 and cache.peek(("ab",)) is None


# -- accounting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", ["fp8", "fp8-e5m2", "int8", "bf16", "mx"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_accounts_before_loading_are_the_bytes_after(
    name: str, fmt: str, dtype: torch.dtype, tables: bool, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", name, dtype=dtype)
    config = PAHQConfig("pahq", fmt, policy={"m0": "bf16"}, quantize_embeddings=tables)  # type: ignore[arg-type]
    model = PAHQModel.from_pretrained(folder, config)
    source = model.patched.linears().__next__().source_block.source
    planned = report(empty_model(load_config(str(folder))), config, n=2, length=3, source=source)  # type: ignore[arg-type]
    assert planned.shares == model.memory_report(n=2, length=3).shares
    linears = [share for share in planned.shares if share.part in ("attention", "mlp")]
    assert sum(share.bytes for share in linears) == model.patched.precision.nbytes
    assert sum(share.bytes_fp32 for share in linears) == model.patched.precision.nbytes_fp32
    held = sum(table.nbytes for table in model.patched.embedding_matrices)
    if held:
        assert sum(s.bytes for s in planned.shares if "embedding" in s.part) == held
    json.dumps(planned.to_dict())


def test_activations_are_what_an_engine_captures() -> None:
    model = wrapped("llama")
    planned = model.memory_report(n=len(TASK), length=TASK.length).activations
    run = capture(model.patched, TASK, TASK.clean_ids)
    twice = 2 * sum(t.nbytes for t in tensors(run)[:-1])
    assert twice < planned < 2 * twice
    assert (
        model.memory_report(n=10, length=7).activations == 10 * model.memory_report(n=1, length=7).activations
    )
