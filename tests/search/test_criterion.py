"""By what of a removal searches decide: what it adds to the metric, how far it moves it, or the gap."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pahq_hf import Circuit
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.config import EngineConfig
from pahq_hf.engine.protocol import Trial
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import ConfigError, RunError
from pahq_hf.search.acdc import search
from pahq_hf.search.acdc_options import ACDCConfig
from pahq_hf.search.attribution.options import AttributionConfig
from pahq_hf.search.batches import AdaptiveBatch, FixedBatch
from pahq_hf.search.budget_options import BudgetOptions
from pahq_hf.search.journal import Chain
from pahq_hf.search.refine_options import RefineOptions
from pahq_hf.search.state import Search
from tests.helpers import (
    assert_same_circuit,
    assert_same_search,
    files_of,
    journal_lines,
    named,
    referee,
    run_main,
    unsealed,
    wrapped,
)
from tests.models import random_task
from tests.search.runs import interrupted
from tests.tiers import exhaustive, quick

TASK = random_task(batch=2, length=7, padding="right", seed=11, metric="logit_diff")
TAU = 0.1


def discover(out: Path | None = None, name: str = "llama", regime: Any = "fp32", **options: Any) -> Circuit:
    """Run ACDC by the gap on a tiny model."""
    chosen: dict[str, Any] = {"threshold": TAU, "criterion": "gap", "progress": False}
    return wrapped(name, regime=regime).discover(TASK, out=out, **(chosen | options))


@cache
def referees(
    name: str, criterion: str, order: str = "acdc", tau: float = TAU, metric: str = "logit_diff"
) -> Any:
    return referee(name, TASK, metric=metric).acdc(tau, order=order, criterion=criterion)


# -- what it decides -------------------------------------------------------------------------------------

FAMILIES = ["gpt2", "llama", "llama_split", "gpt_neox", "gemma2", "qwen3", "falcon_new"]


@pytest.mark.parametrize("kind", ["sparse", "hooks"])
@pytest.mark.parametrize("name", quick(FAMILIES, "gpt2", "qwen3"))
def test_it_decides_as_the_referee_does(name: str, kind: Any) -> None:
    """In double precision, edge by edge; the metric passes the full model's on the way."""
    theirs = referees(name, "gap")
    ours = wrapped(name, dtype=torch.float64).discover(
        TASK, threshold=TAU, criterion="gap", engine=EngineConfig(kind), progress=False
    )
    assert named(ours.graph, ours.kept) == theirs.kept
    assert named(ours.graph, ours.graph.all_edges & ~ours.tested) == theirs.untested
    for (writer, reader), score in theirs.scores.items():
        r, w = ours.graph.reader_index(reader), ours.graph.writer_index(writer)
        assert ours.scores[r, w] == pytest.approx(score, abs=1e-7)
    assert ours.verified and ours.record.metric.final == pytest.approx(theirs.final, abs=1e-7)
    assert ours.record.arguments.criterion == "gap"
    assert theirs.kept not in (referees(name, "signed").kept, referees(name, "absolute").kept)


def test_an_edge_that_overshoots_stays() -> None:
    """One that carries the metric below the full model's is let go by ACDC, and kept by the gap."""
    signed, gap = discover(criterion=None), discover()
    full = gap.record.metric.full
    assert full is not None and signed.record.metric.fp32 is not None and gap.record.metric.fp32 is not None
    assert signed.record.metric.fp32 < full - TAU
    assert abs(gap.record.metric.fp32 - full) < abs(signed.record.metric.fp32 - full)


def test_of_a_metric_that_is_a_distance_it_is_acdc() -> None:
    for options in ({}, {"regime": "pahq"}):
        signed, gap = (discover(criterion=c, metric="kl", threshold=0.03, **options) for c in (None, "gap"))
        assert np.array_equal(signed.kept, gap.kept) and np.array_equal(signed.tested, gap.tested)
        assert np.abs(signed.scores - gap.scores).max() < 1e-12


@pytest.mark.parametrize("kind", ["sparse", "hooks"])
def test_within_a_budget_it_decides_as_a_plain_loop_does(kind: Any) -> None:
    options = {"threshold": TAU, "max_gap": 0.2, "criterion": "gap"}
    ours = discover(search="budget", engine=EngineConfig(kind), **options)
    kept, scores, below = _plain_budget(BudgetOptions(**options))  # type: ignore[arg-type]
    assert np.array_equal(ours.kept, kept) and below > 0
    assert np.abs(ours.scores - scores).max() < 1e-5
    assert ours.discovery["budget"]["kept_below_tau"] == below
    free = discover(search="budget", max_gap=math.inf)
    assert_same_decisions(free, discover())


def _plain_budget(options: BudgetOptions) -> tuple[BoolArray, Any, int]:
    engine = SparseEngine(wrapped("llama").patched, TASK, "logit_diff")
    graph, kept, below, decided = engine.graph, engine.graph.all_edges.copy(), 0, 0
    scores = np.zeros(kept.shape)
    full = engine.metric_of(kept)
    total, gap = abs(engine.metric_of(graph.no_edges()) - full), 0.0
    for reader in graph.reader_order("acdc"):
        for writer in graph.in_edges(reader):
            decided += 1
            kept[reader, writer] = False
            if not graph.has_out_edge(kept, reader):
                continue
            new = abs(engine.metric_of(kept) - full)
            scores[reader, writer] = new - gap
            if new - gap < options.threshold and new <= options.max_gap * total * decided / graph.edge_count:
                gap = new
                continue
            below += new - gap < options.threshold
            kept[reader, writer] = True
    return kept, scores, below


def assert_same_decisions(ours: Circuit, exact: Circuit) -> None:
    assert np.array_equal(ours.kept, exact.kept) and np.array_equal(ours.tested, exact.tested)
    assert np.abs(ours.scores - exact.scores).max() < 1e-5


def test_a_screen_goes_before_it() -> None:
    """What it passes over is gone when a reader's turn comes, and gaps grow from there."""
    ours = discover(screen="eap-ig:0.4")
    engine = SparseEngine(wrapped("llama").patched, TASK, "logit_diff")
    graph, kept = engine.graph, engine.graph.all_edges.copy()
    full = engine.metric_of(kept)
    for reader in graph.reader_order("acdc"):
        alive = graph.has_out_edge(kept, reader)
        kept[reader] &= ours.tested[reader]
        cur = abs(engine.metric_of(kept) - full)
        for writer in graph.in_edges(reader) if alive else ():
            if not ours.tested[reader, writer]:
                continue
            kept[reader, writer] = False
            new = abs(engine.metric_of(kept) - full)
            assert ours.scores[reader, writer] == pytest.approx(new - cur, abs=1e-5)
            kept[reader, writer] = new - cur >= TAU
            cur = cur if kept[reader, writer] else new
    assert np.array_equal(kept, ours.kept) and 0 < ours.tested.sum() < graph.edge_count / 2


# -- low precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(["llama", "gpt2"], "llama"))
@pytest.mark.parametrize("regime", ["pahq", "rtn", "pahq-literal"])
def test_engines_agree_in_low_precision(name: str, regime: Any) -> None:
    sparse, hooks = (
        discover(None, name, regime, engine=EngineConfig(kind), order="head") for kind in ("sparse", "hooks")
    )
    assert sparse.verified and hooks.verified
    assert np.array_equal(sparse.kept, hooks.kept)
    assert np.abs(sparse.scores - hooks.scores).max() < 0.1 * TAU
    full = sparse.record.metric.full
    assert full is not None and sparse.record.metric.fp32 is not None
    assert abs(sparse.record.metric.fp32 - full) < 1


@pytest.mark.parametrize("name", quick(["gpt2", "llama", "qwen3"], "llama"))
def test_low_precision_decides_as_fp32_does(name: str) -> None:
    exact, ours = discover(name=name), discover(name=name, regime="pahq")
    assert np.array_equal(ours.kept, exact.kept) and np.array_equal(ours.tested, exact.tested)
    looks = ours.record.second_looks
    assert looks["tests"] < ours.tested.sum() / 2


def test_a_second_look_at_every_edge_gives_fp32s_decisions() -> None:
    exact, ours = discover(), discover(regime="pahq", margin=math.inf)
    assert_same_decisions(ours, exact)
    assert ours.discovery["second_looks"]["margin"] == "inf"


class Erring(SparseEngine):
    """FP32, but tests move the metric by a share too much from where the reader's began."""

    def __init__(self, share: float) -> None:
        super().__init__(wrapped("llama").patched, TASK, "logit_diff")
        self.share, self.start = share, 0.0

    def focus(self, reader: int) -> float | None:
        super().focus(reader)
        gone = np.flatnonzero(self.graph.all_edges[reader] & ~self._kept[reader]).tolist()
        (self.start,) = super().try_(reader, [gone]).values
        return self.start

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        values = super().try_(reader, candidates).values
        return Trial.of(reader, candidates, [v + self.share * (v - self.start) for v in values])


def searched(share: float, tau: float, margin: float | None, size: int = 3) -> Search:
    config = ACDCConfig(tau, criterion="gap", margin=margin)
    return search(Erring(share), config, batch=FixedBatch(size) if size else AdaptiveBatch())


@pytest.mark.parametrize(("tau", "share"), [(0.1, -0.1), (0.1, 0.15), (0.2, -0.15), (0.3, 0.15)])
def test_second_looks_see_where_the_metric_passes_the_full_models(tau: float, share: float) -> None:
    """There errors of two tests add up, and are as large as what the metric moved by, however near to tau.

    What lies within a margin of tau, and no more, is not enough in these cases.
    """
    exact, blind = searched(0.0, tau, None), searched(share, tau, None)
    assert not np.array_equal(blind.kept, exact.kept)
    for size in (1, 3, 0):
        looked = searched(share, tau, 0.2, size)
        assert np.array_equal(looked.kept, exact.kept) and np.array_equal(looked.tested, exact.tested)
    assert sum(record.changed for record in looked.records) > 0


# -- runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"regime": "pahq"}, *map(exhaustive, [{}, {"screen": "eap-ig:0.5"}])], ids=str
)
def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = discover(tmp_path / "whole", **options)
    lines = journal_lines(tmp_path / "whole")
    assert len(lines) == 2 + len(whole.graph.readers)
    for records in (0, 1, 7, len(lines) - 1):
        folder = interrupted(tmp_path / "whole", tmp_path / str(records), records, b'{"reader": ')
        screen = tmp_path / "whole" / "screen.safetensors"
        if screen.exists():
            (folder / screen.name).write_bytes(screen.read_bytes())
        assert_same_circuit(discover(folder, resume=True, **options), whole)
        assert journal_lines(folder) == lines
    before = files_of(tmp_path / "whole")
    assert_same_circuit(discover(tmp_path / "whole", resume=True, **options), whole)
    assert files_of(tmp_path / "whole") == before
    with pytest.raises(RunError, match="its criterion is gap there"):
        discover(tmp_path / "7", resume=True, **(options | {"criterion": None}))


def test_steps_that_are_none_of_it_are_named(tmp_path: Path) -> None:
    discover(tmp_path / "whole")
    entries = [json.loads(line) for line in unsealed(journal_lines(tmp_path / "whole"))]

    def refused(change: Any, message: str) -> None:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        changed = json.loads(json.dumps(entries))
        change(changed)
        chain = Chain()
        (folder / "journal.jsonl").write_bytes(b"".join(chain.seal(entry) for entry in changed))
        with pytest.raises(RunError, match=message):
            discover(folder, resume=True)

    refused(lambda lines: lines.pop(1), "record 1 on line 2: it does not have the metric of all edges")
    refused(lambda lines: lines[1].update(full=True), "record 1 on line 2: it does not have the metric")
    refused(lambda lines: lines[1].update(full=lines[1]["full"] + 1), "its gap is")
    refused(lambda lines: lines[4].update(metric=lines[4]["metric"] + 1), "its gap is")


def test_absolute_has_two_names(tmp_path: Path) -> None:
    """Runs of the one go on by the other: their journals are the same."""
    old = discover(tmp_path / "run", criterion=None, absolute=True)
    lines = journal_lines(tmp_path / "run")
    folder = interrupted(tmp_path / "run", tmp_path / "part", 3)
    ours = discover(folder, criterion="absolute", resume=True)
    assert_same_circuit(ours, old)
    assert journal_lines(folder) == lines
    assert b"criterion" not in lines[0]
    assert ours.record.arguments.criterion == "absolute"
    assert ACDCConfig(criterion="absolute").to_dict() == ACDCConfig(absolute=True).to_dict()
    assert ACDCConfig(criterion="signed").to_dict() == ACDCConfig().to_dict()


def test_a_sweep_finds_what_runs_do(tmp_path: Path) -> None:
    model, taus = wrapped("llama", regime="pahq"), (0.05, 0.1, 0.3)
    sweep = model.sweep(TASK, thresholds=taus, criterion="gap", out=tmp_path / "sweep", progress=False)
    for tau in taus:
        assert_same_circuit(sweep[tau], discover(regime="pahq", threshold=tau))
    again = model.sweep(
        TASK, thresholds=taus, criterion="gap", out=tmp_path / "sweep", resume=True, progress=False
    )
    assert {tau: c.edge_count for tau, c in again.items()} == {tau: c.edge_count for tau, c in sweep.items()}


def test_an_audit_takes_the_same_decisions_again() -> None:
    ours = discover()
    report = wrapped("llama").evaluate(ours, TASK, audit=10**6)["audit"]
    assert report["audited"] == report["removed"] > 30 and report["wrong"] == 0
    signed = discover(criterion=None)
    signed.discovery["arguments"]["criterion"] = "gap"
    assert wrapped("llama").evaluate(signed, TASK, audit=10**6)["audit"]["wrong"] > 0


# -- other searches, and what is refused -----------------------------------------------------------------


def test_attribution_chooses_by_size() -> None:
    """Alone removed from the full model, an edge makes the gap as large as its score."""
    model = wrapped("llama")
    gap, size, signed = (
        model.attribute(TASK, method="exact", topn=20, criterion=criterion, progress=False)
        for criterion in ("gap", "absolute", "signed")
    )
    assert np.array_equal(gap.kept, size.kept) and not np.array_equal(gap.kept, signed.kept)
    assert np.array_equal(gap.scores, signed.scores)
    assert np.abs(gap.scores[gap.kept]).min() >= np.abs(gap.scores[~gap.kept]).max()
    assert [c.record.arguments.criterion for c in (gap, size, signed)] == ["gap", "absolute", "signed"]
    same = AttributionConfig(criterion="absolute").to_dict()
    assert same == AttributionConfig(absolute=True).to_dict() and "criterion" not in same


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ACDCConfig(criterion="size"), "criterion must be one of signed, absolute, gap; got 'size'"),  # type: ignore[arg-type]
        (lambda: ACDCConfig(absolute=True, criterion="gap"), "leave it out, or criterion gap"),
        (lambda: ACDCConfig(tests="verified", criterion="gap"), "criterion gap needs tests all"),
        (lambda: AttributionConfig(method="random", criterion="gap"), "means nothing for method random"),
        (lambda: AttributionConfig(absolute=True, criterion="signed"), "leave it out, or criterion signed"),
        (lambda: RefineOptions(criterion="signed"), "its criterion is gap, not signed"),
        exhaustive(lambda: BudgetOptions(absolute=True, criterion="gap"), "leave it out"),
    ],
)
def test_what_means_nothing_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_refine_takes_its_own() -> None:
    assert RefineOptions(edges=9, criterion="gap").to_dict() == RefineOptions(edges=9).to_dict()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["demo", "--task", "sva", "--n", "2", "--precision", "fp32"]
    out = str(tmp_path / "run")
    readers = ["--readers", "logits,m3", "--threshold", "0.05"]
    assert run_main("discover", *common, *readers, "--criterion", "gap", "--out", out) == 0
    assert Circuit.from_pretrained(out).record.arguments.criterion == "gap"
    assert "| criterion | gap |" in (tmp_path / "run" / "README.md").read_text()
    capsys.readouterr()
    assert run_main("show", out) == 0
    assert "criterion" in capsys.readouterr().out
    bad = ["--criterion", "gap", "--tests", "verified", "--out", str(tmp_path / "bad")]
    assert run_main("discover", *common, *bad) == 2
    assert "criterion gap needs tests all" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
    best = ["--topn", "9", "--criterion", "gap", "--out", str(tmp_path / "best")]
    assert run_main("attribute", *common, "--method", "eap", *best) == 0
    assert Circuit.from_pretrained(tmp_path / "best").record.arguments.criterion == "gap"


def test_searches_of_tests_agree() -> None:
    """The engine of this file's own errs by nothing where its share is nothing."""
    assert_same_search(searched(0.0, TAU, None), referees("llama", "gap"), 1e-5)
