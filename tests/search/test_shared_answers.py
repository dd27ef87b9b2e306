"""An engine that recalls: searches at other thresholds find, to the bit, what they find alone."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pahq_hf import PAHQConfig, PAHQModel, load_task
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.setting import Setting
from pahq_hf.errors import RunError
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.batches import AdaptiveBatch, BatchSize, FixedBatch
from pahq_hf.search.shared_answers import EngineCache, RecallingEngine
from pahq_hf.search.state import Search
from tests.helpers import random_edges, unsealed, wrapped
from tests.models import random_task
from tests.tiers import examples, exhaustive

TASK = random_task(batch=3, length=7, padding="right", seed=11)
TAUS = (0.15, 0.1, 0.03, 0.003)
HEADER = {"model": "m", "task": "t"}


def engine_of(name: str, regime: str, kind: str = "sparse", **options: Any) -> Any:
    model = wrapped(name, regime=regime, **options)
    setting = Setting(model.patched, TASK, "kl", "corrupted", model.pahq_config)
    return make_engine(setting, EngineConfig(kind))  # type: ignore[arg-type]


@cache
def shared_engine(name: str, regime: str) -> Any:
    return engine_of(name, regime)


def batch_of(kind: str) -> BatchSize:
    return AdaptiveBatch() if kind == "sparse" else FixedBatch(1)


def assert_same(ours: Search, theirs: Search) -> None:
    """Assert that two searches are the same to the bit: every decision, score and metric."""
    assert ours.records == theirs.records
    assert [list(r.scores) for r in ours.records] == [list(r.scores) for r in theirs.records]
    for name in ("kept", "scores", "tested"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.metric == theirs.metric


@pytest.mark.parametrize(
    ("name", "regime", "kind", "margin"),
    [
        ("llama", "fp32", "sparse", None),
        ("gpt2", "fp32", "hooks", None),
        exhaustive("llama", "rtn", "sparse", None),
        exhaustive("llama", "rtn", "hooks", None),
        ("gpt2", "pahq", "sparse", 0.2),
        exhaustive("llama", "pahq", "sparse", math.inf),
        ("llama", "pahq", "hooks", 0.5),
        ("llama", "pahq-literal", "sparse", None),
        exhaustive("gpt2", "pahq-literal", "hooks", None),
    ],
)
def test_a_recalling_search_is_the_one_that_recalls_nothing(
    name: str, regime: str, kind: str, margin: float | None
) -> None:
    engine, answers = engine_of(name, regime, kind), EngineCache()
    recalled = looks = 0
    for tau in TAUS if kind == "sparse" else TAUS[:2]:
        config = ACDCConfig(tau, margin=margin)
        alone = engine_of(name, regime, kind)
        before = alone.evaluations
        theirs = search(alone, config, batch=batch_of(kind))
        wanted = alone.evaluations - before
        recalling, before = RecallingEngine(engine, answers, "here"), engine.evaluations
        ours = search(recalling, config, batch=batch_of(kind))
        assert_same(ours, theirs)
        assert recalling.evaluations == engine.evaluations
        # Beginning and turning to a reader again measures the metric once or twice.
        caught_up = engine.evaluations - before + recalling.recalled - wanted
        assert caught_up >= 0
        if margin is None:  # with second looks they may part, find the same, and part again
            assert caught_up <= (2 if recalling.recalled else 0)
        assert engine.evaluations - before <= wanted
        recalled += recalling.recalled
        looks += sum(record.looks for record in ours.records)
        again = RecallingEngine(engine, answers, "here")
        before = engine.evaluations
        assert_same(search(again, config, batch=batch_of(kind)), theirs)
        assert engine.evaluations == before and again.recalled == wanted
        searched = [record for record in ours.records if record.scores]
        assert again.recalled_readers == len(searched)
    assert recalled > 0
    assert (looks > 0) == (margin is not None)


@pytest.mark.parametrize("regime", ["fp32", "pahq"])
def test_slopes_are_taken_of_the_circuit_that_was_recalled(regime: str) -> None:
    engine, alone = (engine_of("llama", regime, "hooks") for _ in range(2))
    graph, answers = engine.graph, EngineCache()
    reader, kept = graph.layer_readers(1, "mlp")[0], random_edges(graph, 0.8, 3)
    edges = list(graph.in_edges(reader))
    for number in range(3):  # the last two times all but slopes is known already
        recalling = RecallingEngine(engine, answers, "here")
        if number < 2:
            recalling.begin(kept)
            recalling.accept(recalling.try_(reader, [edges[:2]]), 0)
        else:  # nothing was asked of the reader, which comes into focus by itself
            recalling.begin(kept)
            recalling.cut(reader, edges[:2])
        ours = recalling.slopes(reader, [edges[:2], edges[:3]], edges)
        alone.begin(kept)
        if number < 2:
            alone.focus(reader)
        alone.cut(reader, edges[:2])
        theirs = alone.slopes(reader, [edges[:2], edges[:3]], edges)
        assert np.array_equal(ours.effects, theirs.effects) and ours.trial == theirs.trial
        assert recalling.evaluations == engine.evaluations
        assert recalling.try_(reader, [edges[:3]]).values == theirs.trial.values[1:]
        recalling.finish()
    alone.finish()


taus = st.floats(0.0005, 0.5).map(lambda value: round(value, 4))


@examples(10)
@given(
    thresholds=st.lists(taus, min_size=2, max_size=4, unique=True),
    regime=st.sampled_from(["fp32", "pahq", "pahq-literal"]),
    absolute=st.booleans(),
    order=st.sampled_from(["acdc", "head"]),
    margin=st.sampled_from([None, 0.0, 0.2, 1.0, 3.0, math.inf]),
    size=st.sampled_from([1, 3, None]),
)
def test_whatever_the_thresholds(
    thresholds: list[float], regime: str, absolute: bool, order: Any, margin: float | None, size: int | None
) -> None:
    engine, answers = shared_engine("llama", regime), EngineCache()
    batch: BatchSize = AdaptiveBatch() if size is None else FixedBatch(size)
    for tau in thresholds:
        margin = margin if regime == "pahq" else None
        config = ACDCConfig(tau, order=order, absolute=absolute, margin=margin)
        ours = search(RecallingEngine(engine, answers, "here"), config, batch=batch)
        assert_same(ours, search(engine, config, batch=batch))


def test_thresholds_between_the_same_scores_compute_nothing() -> None:
    engine, answers = engine_of("llama", "fp32"), EngineCache()
    first = search(RecallingEngine(engine, answers, "here"), ACDCConfig(0.1), batch=AdaptiveBatch())
    scores = np.sort(np.abs(first.scores[first.tested] - 0.1))
    second, before = RecallingEngine(engine, answers, "here"), engine.evaluations
    search(second, ACDCConfig(0.1 + float(scores[0]) / 2), batch=AdaptiveBatch())
    assert engine.evaluations == before and second.recalled > 0


def test_answers_of_another_source_do_not_count() -> None:
    engine, answers = engine_of("llama", "fp32"), EngineCache()
    search(RecallingEngine(engine, answers, "here"), ACDCConfig(0.1))
    elsewhere = RecallingEngine(engine, answers, "there")
    search(elsewhere, ACDCConfig(0.1))
    assert elsewhere.recalled == 0


# -- the file --------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    search(
        RecallingEngine(engine_of("llama", "fp32"), EngineCache.open(path, HEADER), "here"), ACDCConfig(0.1)
    )
    return path


def test_answers_survive_their_process_to_the_bit(written: Path) -> None:
    engine = engine_of("llama", "fp32")
    before = engine.evaluations
    found = search(RecallingEngine(engine, EngineCache.open(written, HEADER), "here"), ACDCConfig(0.1))
    assert engine.evaluations == before
    assert_same(found, search(engine, ACDCConfig(0.1)))


@pytest.mark.parametrize(
    "rest", [b"", b'["a', b'["a", [0.5]', b"\x00\x00\x00\n\x00", b'{"a": 1}\n["b", [1]]\n']
)
def test_what_a_crash_tore_off_is_dropped(written: Path, rest: bytes) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:10]) + rest)
    answers = EngineCache.open(written, HEADER)
    assert len(answers) == 9
    assert written.read_bytes() == b"".join(lines[:10])
    answers.add("key", (0.1, 1 / 3))
    assert list(EngineCache.open(written, HEADER).get("key") or ()) == [0.1, 1 / 3]
    assert EngineCache.open(written, HEADER).get("other") is None


@pytest.mark.parametrize("torn", [b"", b'{"model"'])
def test_without_a_header_they_start_anew(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(torn)
    assert len(EngineCache.open(path, HEADER)) == 0
    assert json.loads(unsealed([path.read_bytes()])[0]) == HEADER


def test_an_altered_answer_is_named(written: Path) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    for number in (1, len(lines) - 1):
        entry = json.loads(lines[number])
        changed = [entry[0], [value + 1 for value in entry[1]], *entry[2:]]
        for wrong in (changed, entry[:2]):
            text = json.dumps(wrong).encode() + b"\n"
            written.write_bytes(b"".join([*lines[:number], text, *lines[number + 1 :]]))
            with pytest.raises(RunError, match=rf"damaged \(the answer on line {number + 1} .*; remove it"):
                EngineCache.open(written, HEADER)


def test_answers_of_an_earlier_version_are_computed_again(
    written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, *rest = written.read_bytes().splitlines()
    older = [json.dumps(json.loads(line)[:2]).encode() + b"\n" for line in rest]
    written.write_bytes(b"".join([*unsealed([first]), *older]))
    assert len(EngineCache.open(written, HEADER)) == 0
    assert "answers.jsonl has no checksums, an earlier version wrote it" in caplog.text
    assert written.read_bytes().splitlines() == [first]


def test_a_file_of_other_searches_is_refused(written: Path) -> None:
    with pytest.raises(RunError, match="its prompts are others"):
        EngineCache.open(written, HEADER | {"task": "u"})
    written.write_bytes(b"[1]\n")
    with pytest.raises(RunError, match="damaged"):
        EngineCache.open(written, HEADER)
    written.unlink()
    written.mkdir()
    with pytest.raises(RunError, match="cannot read"):
        EngineCache.open(written, HEADER)


def test_what_an_earlier_version_computed_is_not_computed_again(tmp_path: Path) -> None:
    """Written at commit 0f3f08b: of a screened search, in which a second look changed a decision."""
    path = tmp_path / "answers.jsonl"
    shutil.copy(Path(__file__).parents[1] / "earlier/before_rooms/answers-with-second-looks.jsonl", path)
    model = PAHQModel.from_pretrained("demo", PAHQConfig("pahq", "mx"))
    task = load_task("greater_than", model.tokenizer, n=6)
    setting = Setting(model.patched, task, "kl", "corrupted", model.pahq_config)
    engine, graph = make_engine(setting, EngineConfig("sparse")), model.graph
    survivors = graph.all_edges & (np.random.default_rng(0).random(graph.all_edges.shape) < 0.8)
    recalling = RecallingEngine(engine, EngineCache.open(path, {"x": "pahq-0.9"}), "there")
    config = ACDCConfig(0.002, margin=0.9, order="head")
    found = search(recalling, config, batch=AdaptiveBatch(), survivors=survivors)
    assert engine.evaluations == 0 and recalling.recalled == 364
    assert sum(record.changed for record in found.records) == 1 and found.kept.sum() == 57
