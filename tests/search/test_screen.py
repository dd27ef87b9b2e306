"""ACDC behind a screen: only the edges that attribution scores highest are tested."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pahq_hf import ACDCConfig, Circuit, EngineConfig, PAHQConfig, PAHQModel
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.engine.hooks.engine import HooksEngine
from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import ConfigError, MetricError, RunError
from pahq_hf.search.acdc import search
from pahq_hf.search.attribution.options import parse_screen
from pahq_hf.search.attribution.selection import top_edges
from pahq_hf.search.batches import AdaptiveBatch, FixedBatch
from pahq_hf.search.state import Search
from tests.families import ALL_FAMILIES
from tests.helpers import (
    assert_same_circuit,
    id_rows,
    journal_lines,
    random_edges,
    run_main,
    save_tiny,
    unsealed,
    wrapped,
    write_rows,
)
from tests.models import FAMILIES, random_task
from tests.tiers import examples, quick

TASK = random_task(batch=3, length=7, padding="right", seed=11)
TAU = 0.02


# -- the search --------------------------------------------------------------------------------------------


@cache
def judge(name: str) -> HooksEngine:
    return HooksEngine(wrapped(name, dtype=torch.float64).patched, TASK, "kl")


def plain_search(name: str, survivors: BoolArray) -> tuple[BoolArray, dict[tuple[int, int], float]]:
    """The definition: one loop, and a whole forward pass for every metric."""
    engine = judge(name)
    graph, kept, scores = engine.graph, engine.graph.all_edges.copy(), {}
    for reader in graph.reader_order("acdc"):
        if not graph.has_out_edge(kept, reader):
            kept[reader] = False
            continue
        kept[reader] &= survivors[reader]
        cur = engine.metric_of(kept)
        for writer in graph.in_edges(reader):
            if not survivors[reader, writer]:
                continue
            kept[reader, writer] = False
            new = engine.metric_of(kept)
            scores[reader, writer] = new - cur
            if new - cur < TAU:
                cur = new
            else:
                kept[reader, writer] = True
    return kept, scores


@given(st.sampled_from(["gpt2", "llama_split", "gpt_neox", "gemma2"]), st.floats(0, 1), st.integers(0, 99))
@examples(12)
def test_the_search_is_the_plain_loop(name: str, share: float, seed: int) -> None:
    model = wrapped(name, dtype=torch.float64).patched
    survivors = random_edges(model.graph, share, seed)
    kept, scores = plain_search(name, survivors)
    for engine, batch in ((SparseEngine, AdaptiveBatch()), (HooksEngine, FixedBatch(3))):
        made: Any = engine(model, TASK, "kl")
        found = search(made, ACDCConfig(TAU, "kl"), batch=batch, survivors=survivors)
        assert np.array_equal(found.kept, kept)
        assert {(int(r), int(w)) for r, w in np.argwhere(found.tested)} == set(scores)
        assert not found.scores[~found.tested].any()
        for edge, score in scores.items():
            assert abs(found.scores[edge] - score) < 1e-6
        assert abs(found.metric - judge(name).metric_of(kept)) < 1e-6


@pytest.mark.crossing
@pytest.mark.parametrize("engine", [SparseEngine, HooksEngine])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_looks_at_every_edge_decide_as_fp32_does(engine: Any, share: float) -> None:
    """A second look holds exactly the edges of the screened circuit."""
    survivors = random_edges(wrapped("llama").graph, share, 3)

    def run(model: PAHQModel, config: ACDCConfig) -> Search:
        rule = RegimeRule.of(model.pahq_config, model.patched.device)
        return search(
            engine(model.patched, TASK, "kl", rule=rule), config, batch=AdaptiveBatch(), survivors=survivors
        )

    exact = run(wrapped("llama"), ACDCConfig(TAU, "kl"))
    low = run(PAHQModel(FAMILIES["llama"](), PAHQConfig()), ACDCConfig(TAU, "kl", margin=math.inf))
    assert np.array_equal(low.kept, exact.kept) and np.array_equal(low.tested, exact.tested)
    np.testing.assert_allclose(low.scores, exact.scores, atol=1e-5)
    assert sum(record.looks for record in low.records) >= int(low.tested.sum())


# -- runs --------------------------------------------------------------------------------------------------


@cache
def low(family: str, regime: Any) -> PAHQModel:
    return PAHQModel(ALL_FAMILIES[family](), PAHQConfig(regime))


def run(model: PAHQModel, screen: str | None, engine: Any = "sparse", **options: Any) -> Circuit:
    limits = EngineConfig(engine)
    return model.discover(
        TASK, threshold=TAU, metric="kl", screen=screen, engine=limits, progress=False, **options
    )


@pytest.mark.parametrize("regime", quick(["fp32", "pahq", "rtn", "pahq-literal"], "fp32", "pahq"))
def test_a_screen_that_everything_passes_changes_nothing(regime: Any) -> None:
    plain, screened = (run(low("llama", regime), screen) for screen in (None, "eap-ig:1"))
    for field in ("kept", "tested", "scores"):
        assert np.array_equal(getattr(plain, field), getattr(screened, field))
    assert plain.discovery["metric"] == screened.discovery["metric"]
    assert "screen" not in plain.discovery and "screen" not in plain.discovery["arguments"]


@pytest.mark.crossing
@pytest.mark.parametrize("regime", quick(["fp32", "pahq", "rtn", "pahq-literal"], "fp32", "pahq"))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_engines_agree_behind_a_screen(family: str, regime: Any) -> None:
    model = low(family, regime)
    sparse, hooks = (run(model, "eap-ig:0.4", engine) for engine in ("sparse", "hooks"))
    assert np.array_equal(sparse.kept, hooks.kept) and np.array_equal(sparse.tested, hooks.tested)
    scores = model.attribute(TASK, method="eap-ig", metric="kl").scores
    count = round(0.4 * sparse.graph.edge_count)
    survivors = top_edges(sparse.graph, scores, count, absolute=True)
    assert not (sparse.tested & ~survivors).any() and not (sparse.kept & ~survivors).any()
    assert not sparse.scores[~sparse.tested].any()
    facts = sparse.discovery["screen"]
    assert (facts["method"], facts["fraction"], facts["survivors"]) == ("eap-ig", 0.4, count)
    assert facts["seconds"] > 0 and sparse.discovery["seconds"]["screen"] > 0
    assert sparse.discovery["edges"]["tested"] == int(sparse.tested.sum()) > 0


def test_readers_outside_the_search_keep_what_the_screen_would_take() -> None:
    circuit = run(low("llama", "fp32"), "eap-ig:0.1", readers="logits")
    graph = circuit.graph
    assert np.array_equal(circuit.kept[:-1], graph.all_edges[:-1])
    assert 0 < circuit.tested.sum() == circuit.tested[graph.logits_reader].sum() < graph.prefix[-1]


# -- folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screened") / "whole"
    run(low("llama", "pahq"), "eap-ig:0.5", out=folder)
    return folder


def cut(whole: Path, folder: Path, lines: int) -> Path:
    """The folder of the same run, interrupted after some readers."""
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(b"".join(journal_lines(whole)[: 1 + lines]))
    (folder / "screen.safetensors").write_bytes((whole / "screen.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("lines", [0, 1, 5])
def test_a_resumed_run_has_the_same_survivors(
    whole: Path, tmp_path: Path, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut(whole, tmp_path / "cut", lines)
    monkeypatch.setattr("pahq_hf.search.acdc_run.make_screen", None)  # it must not be made again
    resumed = run(low("llama", "pahq"), "eap-ig:0.5", out=folder, resume=True)
    first = Circuit.from_pretrained(whole)
    assert_same_circuit(resumed, first)
    assert resumed.discovery["screen"] == first.discovery["screen"]
    assert journal_lines(folder) == journal_lines(whole)


@pytest.mark.parametrize("regime", ["fp32", "pahq"])
def test_a_run_resumes_behind_readers_that_lost_all_edges_to_the_screen(regime: Any, tmp_path: Path) -> None:
    """Their metric is measured afresh, though none of their edges is tested."""
    first = run(low("llama", regime), "eap-ig:0.2", out=tmp_path / "whole")
    steps = [json.loads(line) for line in journal_lines(tmp_path / "whole")[1:]]
    lost = [
        number
        for number, (before, step) in enumerate(pairwise(steps), start=2)
        if not step["scores"] and step["metric"] != before["metric"]
    ]
    assert lost
    folder = cut(tmp_path / "whole", tmp_path / "cut", lost[0] + 1)
    assert_same_circuit(run(low("llama", regime), "eap-ig:0.2", out=folder, resume=True), first)


def test_another_screen_is_another_run(whole: Path, tmp_path: Path) -> None:
    for folder in (whole, cut(whole, tmp_path / "cut", 2)):
        for other in ("eap-ig:0.4", "random:0.5", None):
            with pytest.raises(RunError, match="another run"):
                run(low("llama", "pahq"), other, out=folder, resume=True)


def test_a_run_without_a_screen_is_another_run(whole: Path, tmp_path: Path) -> None:
    header = json.loads(unsealed(journal_lines(whole)[:1])[0])
    del header["acdc"]["screen"]
    (tmp_path / "journal.jsonl").write_text(json.dumps(header) + "\n")
    with pytest.raises(RunError, match=r"another run: its screen is none there, eap-ig:0\.5 now"):
        run(low("llama", "pahq"), "eap-ig:0.5", out=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign", "altered"])
def test_a_lost_screen_is_refused(whole: Path, tmp_path: Path, damage: str) -> None:
    folder = cut(whole, tmp_path / "cut", 2)
    path = folder / "screen.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif damage == "foreign":
        path.write_bytes((whole / "scores.safetensors").read_bytes())
    else:
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    with pytest.raises(RunError, match="screen"):
        run(low("llama", "pahq"), "eap-ig:0.5", out=folder, resume=True)


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["eap-ig", "eap-ig:", "eap-ig:0", "eap-ig:1.1", "eap-ig:-1", "eap-ig:nan", "acdc:0.1", ":0.1", ""]
)
def test_what_is_no_screen(text: str) -> None:
    with pytest.raises(ConfigError, match="METHOD:FRACTION"):
        ACDCConfig(screen=text)


def test_a_screen_in_the_configuration() -> None:
    assert parse_screen("eap:0.25") == ("eap", 0.25)
    config = ACDCConfig(screen="hisp:0.5", margin=math.inf)
    assert ACDCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "screen" not in ACDCConfig().to_dict()  # so that older journals go on


def test_eap_cannot_screen_for_kl(tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="use eap-ig"):
        run(wrapped("gpt2"), "eap:0.5", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model")
    data = write_rows(tmp_path / "task.jsonl", id_rows(random_task(batch=3, seed=11)))
    where = ["discover", str(tmp_path / "model"), "--task", str(data), "--out", str(tmp_path / "out")]
    assert run_main(*where, "--screen", "eap:0.1", "--metric", "kl") == 2
    assert "eap-ig" in capsys.readouterr().err
    assert run_main(*where, "--screen", "eap-ig:0.3", "--metric", "kl", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["arguments"]["screen"] == "eap-ig:0.3" and facts["screen"]["survivors"] == round(0.3 * 82)
    assert "eap-ig:0.3" in (tmp_path / "out" / "README.md").read_text()
    assert run_main("show", str(tmp_path / "out")) == 0
    assert "eap-ig:0.3" in capsys.readouterr().out
