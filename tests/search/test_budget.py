"""Search `budget`: every removal below tau, and all of them together within a bound."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pahq_hf import Circuit
from pahq_hf.circuit.graph import BoolArray
from pahq_hf.config import EngineConfig
from pahq_hf.engine.build import make_engine
from pahq_hf.engine.protocol import Engine, Trial
from pahq_hf.engine.setting import Setting
from pahq_hf.engine.sparse.engine import SparseEngine
from pahq_hf.errors import CircuitError, ConfigError, RunError
from pahq_hf.search.acdc import search
from pahq_hf.search.batches import AdaptiveBatch
from pahq_hf.search.budget import Bound, of_reader
from pahq_hf.search.budget_options import BudgetOptions
from pahq_hf.search.journal import Chain
from pahq_hf.search.state import Search
from tests.helpers import assert_same_circuit, files_of, journal_lines, run_main, unsealed, wrapped
from tests.models import random_task
from tests.search.runs import interrupted
from tests.tiers import exhaustive, quick

TASK = random_task(batch=2, length=7, padding="right", seed=11, metric="logit_diff")
TAU = {"kl": 0.15, "logit_diff": 0.4}


def discover(out: Path | None = None, name: str = "llama", regime: Any = "fp32", **options: Any) -> Circuit:
    """Run it on a tiny model."""
    chosen: dict[str, Any] = {"search": "budget", "metric": "kl", "progress": False}
    return wrapped(name, regime=regime).discover(TASK, out=out, **(chosen | options))


# -- a plain loop ----------------------------------------------------------------------------------------


@dataclass
class Plain:
    """What the rule of docs/searches.md finds, edge by edge, with a whole run for each."""

    kept: BoolArray
    scores: np.ndarray[Any, Any]
    tested: BoolArray
    gaps: list[float]  # as shares of the bound at that point
    refused: int = 0  # edges that only the budget kept


def plain(engine: Engine, options: BudgetOptions) -> Plain:
    graph, kept = engine.graph, engine.graph.all_edges.copy()
    found = Plain(kept, np.zeros(kept.shape), np.zeros_like(kept), [])
    full, empty = engine.metric_of(kept), engine.metric_of(np.zeros_like(kept))
    chosen = graph.match_readers(options.readers)
    total, decided, cur = int(graph.all_edges[chosen].sum()), 0, full
    for reader in graph.reader_order(options.order):
        for writer in graph.in_edges(reader) if chosen[reader] else ():
            decided += 1
            allowed = options.max_gap * abs(empty - full) * decided / total
            kept[reader, writer] = False
            if graph.has_out_edge(kept, reader):
                new = engine.metric_of(kept)
                score = new - cur
                found.scores[reader, writer], found.tested[reader, writer] = score, True
                small = (abs(score) if options.absolute else score) < options.threshold
                if small and abs(new - full) <= allowed:
                    cur = new
                else:
                    kept[reader, writer] = True
                    found.refused += small
            found.gaps.append(abs(cur - full) / allowed)
    assert decided == total
    return found


@cache
def plainly(name: str, options: BudgetOptions) -> Plain:
    model = wrapped(name)
    metric = options.metric or TASK.metric
    setting = Setting(model.patched, TASK, metric, options.ablation, model.pahq_config)
    return plain(make_engine(setting, EngineConfig("hooks")), options)


CASES = [
    ("gpt2", {"metric": "logit_diff", "max_gap": 0.3, "order": "head"}),
    ("llama", {"metric": "logit_diff", "threshold": TAU["logit_diff"], "absolute": True, "max_gap": 0.1}),
    ("llama", {"metric": "kl", "max_gap": 0.1, "readers": "logits,m*,a0.*<v>"}),
    ("llama_split", {"metric": "kl", "max_gap": 0.4, "ablation": "zero"}),
    ("gpt2", {"metric": "kl", "threshold": TAU["kl"], "max_gap": 0.2}),
    ("qwen3", {"metric": "logit_diff", "threshold": TAU["logit_diff"], "max_gap": 0.25}),
    ("gemma2", {"metric": "kl", "threshold": TAU["kl"], "max_gap": 0.1}),
    ("falcon_new", {"metric": "kl", "max_gap": 0.3, "order": "head"}),
]


@pytest.mark.parametrize("kind", ["sparse", "hooks"])
@pytest.mark.parametrize("case", quick(range(len(CASES)), 0, 1, 5))
def test_it_decides_as_a_plain_loop_does(case: int, kind: Any) -> None:
    """At every edge the gap is within its share of the bound, and at the end within all of it."""
    name, options = CASES[case]
    expected = plainly(name, BudgetOptions(**options))  # type: ignore[arg-type]
    assert max(expected.gaps) <= 1 + 1e-6 and expected.refused > 0
    ours = discover(name=name, engine=EngineConfig(kind), **options)
    assert np.array_equal(ours.kept, expected.kept)
    assert np.array_equal(ours.tested, expected.tested)
    assert np.abs(ours.scores - expected.scores).max() < 1e-4
    assert 0 < ours.edge_count < ours.graph.edge_count
    assert ours.verified
    assert_within(ours)
    assert ours.discovery["budget"]["kept_below_tau"] == expected.refused


def assert_within(circuit: Circuit) -> None:
    """Assert that by the hooks engine the circuit is within the bound, at its search's precision."""
    said, metric = circuit.discovery["budget"], circuit.record.metric
    share = circuit.discovery["arguments"]["max_gap"]
    assert said["bound"] == pytest.approx(share * abs(said["empty"] - said["full"]))
    assert metric.final_recomputed is not None
    assert abs(metric.final_recomputed - said["full"]) <= said["bound"] + 2e-5


LOW = [
    ("llama", "pahq", "kl", TAU["kl"]),
    ("llama", "rtn", "logit_diff", math.inf),
    ("llama", "pahq-literal", "logit_diff", TAU["logit_diff"]),
    exhaustive("llama", "pahq", "logit_diff", math.inf),
    exhaustive("gpt2", "pahq", "kl", math.inf),
    exhaustive("gpt2", "rtn", "kl", TAU["kl"]),
    exhaustive("gpt2", "pahq-literal", "kl", math.inf),
]


@pytest.mark.parametrize(("name", "regime", "metric", "tau"), LOW)
def test_in_low_precision_the_bound_holds_too(name: str, regime: Any, metric: str, tau: float) -> None:
    options: dict[str, Any] = {"metric": metric, "threshold": tau, "max_gap": 0.2, "order": "head"}
    kinds: tuple[Any, ...] = ("sparse", "hooks")
    sparse, hooks = (discover(None, name, regime, engine=EngineConfig(kind), **options) for kind in kinds)
    for found in (sparse, hooks):
        assert found.verified and 0 < found.edge_count < found.graph.edge_count
        assert_within(found)
    assert np.array_equal(sparse.kept, hooks.kept)


def test_a_second_look_at_every_edge_gives_fp32s_decisions() -> None:
    exact = discover(max_gap=0.2)
    ours = discover(max_gap=0.2, regime="pahq", margin=math.inf)
    assert np.array_equal(ours.kept, exact.kept) and np.array_equal(ours.tested, exact.tested)
    assert np.abs(ours.scores - exact.scores).max() < 1e-5
    assert ours.discovery["second_looks"]["changed"] > 0
    assert ours.discovery["second_looks"]["margin"] == "inf"


# -- an engine that errs ---------------------------------------------------------------------------------


class Short(SparseEngine):
    """FP32, but in tests every edge that goes seems to cost less than it does, or more."""

    def __init__(self, error: float) -> None:
        super().__init__(wrapped("llama").patched, TASK, "kl")
        self.error = error

    def focus(self, reader: int) -> float | None:
        super().focus(reader)
        return super().try_(reader, [self._gone(reader)]).values[0]

    def _gone(self, reader: int) -> list[int]:
        return np.flatnonzero(self.graph.all_edges[reader] & ~self._kept[reader]).tolist()  # type: ignore[no-any-return]

    def try_(self, reader: int, candidates: Sequence[Sequence[int]]) -> Trial:
        values = super().try_(reader, candidates).values
        lengths = [len(candidate) for candidate in candidates]
        return Trial.of(
            reader, candidates, [v + self.error * n for v, n in zip(values, lengths, strict=True)]
        )


def searched(engine: Engine, options: BudgetOptions, regime: Any) -> tuple[Search, Bound]:
    graph = engine.graph
    full, empty = engine.metric_of(graph.all_edges), engine.metric_of(graph.no_edges())
    edges = int(graph.all_edges[graph.match_readers(options.readers)].sum())
    bound = Bound(full, empty, options.max_gap, edges)
    decider = partial(of_reader, bound=bound, regime=regime)
    return search(engine, options, batch=AdaptiveBatch(), decider=decider), bound


@pytest.mark.parametrize(("error", "threshold"), [(-0.05, math.inf), (0.05, 0.1)])
def test_second_looks_find_what_the_budget_allows(error: float, threshold: float) -> None:
    """Later edges are decided again with what is left of it then."""
    exact, _ = searched(Short(0.0), BudgetOptions(threshold, max_gap=0.2), "fp32")
    blind, _ = searched(Short(error), BudgetOptions(threshold, max_gap=0.2), "fp32")
    assert not np.array_equal(blind.kept, exact.kept)
    looked, _ = searched(Short(error), BudgetOptions(threshold, max_gap=0.2, margin=math.inf), "pahq")
    assert np.array_equal(looked.kept, exact.kept) and np.array_equal(looked.tested, exact.tested)
    assert sum(record.changed for record in looked.records) > 0


@pytest.mark.parametrize("readers", ["logits", None])
def test_what_tests_let_go_too_much_comes_back(readers: str | None) -> None:
    """Without second looks, the circuit of a reader is still measured exactly once it is decided."""
    options, engine = BudgetOptions(max_gap=0.1, readers=readers), Short(-0.05)
    blind, bound = searched(engine, options, "fp32")
    assert bound.gap(engine.metric_of(blind.kept)) > 1.1 * bound.total
    held, _ = searched(engine, options, "pahq")
    decided, at = 0, held.graph.all_edges.copy()
    for record in held.records:
        at[record.reader] = held.kept[record.reader]
        if record.searched:
            decided += int(held.graph.all_edges[record.reader].sum())
        assert bound.gap(engine.metric_of(at)) <= bound.allowed(decided) + 1e-6
    assert decided == bound.edges and np.array_equal(at, held.kept)
    assert 0 < held.kept.sum() < held.graph.edge_count


# -- the ends of the range -------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", quick(["fp32", "pahq", "rtn", "pahq-literal"], "fp32", "pahq"))
def test_without_a_bound_it_is_acdc(regime: Any) -> None:
    for options in ({"threshold": 0.05, "metric": "kl"}, {"threshold": 0.1, "metric": "logit_diff"}):
        acdc = discover(search="acdc", regime=regime, **options)
        ours = discover(max_gap=math.inf, regime=regime, **options)
        assert np.array_equal(ours.kept, acdc.kept) and np.array_equal(ours.scores, acdc.scores)
        assert np.array_equal(ours.tested, acdc.tested)
        assert ours.discovery["metric"] == acdc.discovery["metric"]
        assert ours.discovery["second_looks"] == acdc.discovery["second_looks"]
        assert ours.discovery["arguments"]["max_gap"] == "inf"
        assert ours.discovery["budget"]["kept_below_tau"] == 0 and ours.discovery["budget"]["bound"] == "inf"


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
def test_with_no_budget_only_what_changes_nothing_goes(metric: str) -> None:
    """The first example differs at token 1: what the clean and corrupted runs share there costs nothing."""
    ours = discover(max_gap=0, metric=metric, readers="logits,m1,a1.*")
    full = ours.record.metric.full
    assert ours.record.metric.final == pytest.approx(full, abs=1e-6)
    removed = ours.tested & ~ours.kept
    assert (ours.scores[removed] == 0).all()
    assert (ours.scores[ours.tested & ours.kept] != 0).all()


def test_a_circuit_says_what_bounds_it(tmp_path: Path) -> None:
    ours = discover(tmp_path / "run", max_gap=0.2)
    again = Circuit.from_pretrained(tmp_path / "run")
    assert_same_circuit(again, ours)
    assert again.record.method == "budget" and again.record.ranks_kept_first
    assert again.discovery["arguments"]["threshold"] == "inf"
    assert again.record == ours.record
    faithfulness = (ours.record.metric.fp32 - ours.record.metric.empty) / (  # type: ignore[operator]
        ours.record.metric.full - ours.record.metric.empty  # type: ignore[operator]
    )
    assert abs(1 - faithfulness) <= 0.2 + 1e-6
    with pytest.raises(CircuitError, match="found by 'budget'"):
        wrapped("llama").evaluate(again, TASK, audit=5)


# -- interrupted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", quick(["fp32", "pahq", "pahq-literal", "rtn"], "fp32", "pahq"))
def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, regime: Any) -> None:
    """From any record of its journal, or none, with a torn line behind: the same bytes."""
    run = partial(discover, regime=regime, max_gap=0.2, threshold=0.3)
    whole = run(tmp_path / "whole")
    lines = journal_lines(tmp_path / "whole")
    assert len(lines) == 2 + len(whole.graph.readers)
    for records in (0, 1, 7, len(lines) - 1) if regime == "fp32" else (1, 7):
        folder = interrupted(tmp_path / "whole", tmp_path / str(records), records, b'{"reader": ')
        ours = run(folder, resume=True)
        assert ours.discovery["resumed_readers"] == max(0, records - 1)
        assert_same_circuit(ours, whole)
        assert ours.discovery["budget"] == whole.discovery["budget"]
        assert journal_lines(folder) == lines
        for name in ("circuit.json", "scores.safetensors", "means.safetensors"):
            assert files_of(folder).get(name) == files_of(tmp_path / "whole").get(name)
    before = files_of(tmp_path / "whole")
    assert_same_circuit(run(tmp_path / "whole", resume=True), whole)  # only read
    assert files_of(tmp_path / "whole") == before
    with pytest.raises(RunError, match=r"its max gap is 0\.2 there, 0\.3 now"):
        run(tmp_path / "7", resume=True, max_gap=0.3)
    with pytest.raises(RunError, match="its search is budget there, acdc now"):
        discover(tmp_path / "7", search="acdc", regime=regime, resume=True)


def sealed(folder: Path, entries: Sequence[Any]) -> None:
    """Write a journal that has checksums."""
    chain = Chain()
    (folder / "journal.jsonl").write_bytes(b"".join(chain.seal(entry) for entry in entries))


def test_steps_that_are_none_of_this_search_are_named(tmp_path: Path) -> None:
    whole = discover(tmp_path / "whole", max_gap=0.2)
    entries = [json.loads(line) for line in unsealed(journal_lines(tmp_path / "whole"))]
    first = next(n for n, e in enumerate(entries) if e.get("kept") and len(e["kept"]) < len(e["scores"]))

    def refused(change: Any, message: str) -> None:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        changed = json.loads(json.dumps(entries))
        change(changed)
        sealed(folder, changed)
        with pytest.raises(RunError, match=message):
            discover(folder, max_gap=0.2, resume=True)

    def keep_more(lines: Any) -> None:
        gone = next(w for w in lines[first]["scores"] if int(w) not in lines[first]["kept"])
        lines[first]["kept"] = sorted([*lines[first]["kept"], int(gone)])

    def keep_less(lines: Any) -> None:
        lines[first]["kept"].remove(max(lines[first]["kept"], key=lambda w: lines[first]["scores"][str(w)]))

    refused(keep_more, f"record {first} on line {first + 1}.*budget lets go")
    refused(keep_less, f"record {first} on line {first + 1}.*budget does not allow")
    refused(lambda lines: lines[1].update(full="0"), "record 1 on line 2: it does not have the metric")
    refused(lambda lines: lines.pop(1), "record 1 on line 2: it does not have the metric")
    # And a circuit that is another one than its journal's.
    other = Circuit(
        whole.graph, whole.graph.all_edges, whole.scores, whole.tested, whole.model, whole.discovery
    )
    other.save_pretrained(tmp_path / "whole")
    with pytest.raises(RunError, match="not the one its journal"):
        discover(tmp_path / "whole", max_gap=0.2, resume=True)


# -- what is asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gap": -0.1}, "max_gap must be a share >= 0, such as 0.1, or inf; got -0.1"),
        ({"max_gap": math.nan}, "max_gap must be a share >= 0, such as 0.1, or inf; got nan"),
        ({"max_gap": "10%"}, "max_gap must be a number; got '10%'"),
        ({"threshold": -1.0}, "threshold must be a number >= 0 or inf; got -1.0"),
        ({"threshold": math.nan}, "threshold must be a number >= 0 or inf; got nan"),
        ({"margin": 0.2}, "a margin needs precision pahq"),
        ({"screen": "eap-ig:0.1"}, "search 'budget' of discover has no option 'screen'"),
        ({"readers": "m7"}, "no reader matches 'm7'"),
        ({"readers": 3}, "readers must be globs such as 'logits,m"),
    ],
    ids=str,
)
def test_bad_values_are_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="^" + message.replace("(", r"\(")) as caught:
        discover(tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_go_to_json_and_back() -> None:
    for options in (BudgetOptions(), BudgetOptions(0.1, margin=math.inf, max_gap=math.inf)):
        values = options.to_dict()
        assert json.loads(json.dumps(values, allow_nan=False)) == values
        assert BudgetOptions.from_dict(values) == options


# -- the command line ------------------------------------------------------------------------------------


def test_the_command_line_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["discover", "demo", "--task", "ioi", "--n", "4", "--search", "budget", "--max-gap", "0.1"]
    assert run_main(*command, "--out", str(out), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "budget" and facts["verified"] is True
    metric = facts["metric"]
    gap = abs(metric["fp32"] - metric["full"])
    assert gap <= facts["budget"]["bound"] + 1e-5
    assert facts["budget"]["bound"] == pytest.approx(0.1 * abs(metric["empty"] - metric["full"]), rel=1e-4)
    circuit = Circuit.from_pretrained(out)
    assert 0 < circuit.edge_count < circuit.graph.edge_count
    # A circuit that falls short is told to try with less to spend.
    command[-1] = "0.9"
    assert run_main(*command, "--out", str(out.with_name("poor")), "--json") == 0
    following = json.loads(capsys.readouterr().out)["next"]
    assert "--max-gap 0.3" in following and str(out.with_name("poor-lower")) in following


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--search", "budget", "--max-gap", "-0.1"], "max_gap must be a share >= 0, such as 0.1, or inf"),
        (["--search", "budget", "--max-gap", "nan"], "max_gap must be a share >= 0, such as 0.1, or inf"),
        (["--search", "budget", "--screen", "eap:0.1"], "search 'budget' takes no --screen"),
        (["--search", "budget", "--tests", "verified"], "search 'budget' takes no --tests"),
        (["--max-gap", "0.1"], "search 'acdc' takes no --max-gap"),
    ],
)
def test_what_the_command_line_refuses_is_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("discover", "demo", "--task", "ioi", "--out", str(tmp_path / "out"), *more) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()
