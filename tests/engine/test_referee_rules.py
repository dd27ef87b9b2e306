"""The referee's graph, metrics, orders and searches, by what semantics says of them."""

from __future__ import annotations

import pytest
import torch

from tests.engine.referee_data import Data, build, close, in_edges
from tests.families import ALL_FAMILIES
from tests.referee import Edge

pytestmark = pytest.mark.crossing


def test_split_groups() -> None:
    """Removing both heads' split edges is removing the group's; removing one alone is not."""
    model, data = build("llama"), Data()
    native, split = data.referee(model), data.referee(model, split_kv_groups=True)
    for kind in "kv":
        whole = native.circuit_logits(in_edges(native, f"a1.kv1<{kind}>"))
        both = in_edges(split, f"a1.h2<{kind}>", f"a1.h3<{kind}>")
        close(split.circuit_logits(both), whole)
        assert not torch.allclose(split.circuit_logits(in_edges(split, f"a1.h2<{kind}>")), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "layers", "heads", "groups", "split", "count"),
    [
        ("gpt2", 12, 12, 12, False, 32_491),
        ("llama", 16, 32, 8, False, 195_865),
        ("llama", 16, 32, 8, True, 386_713),
        ("llama", 30, 9, 3, False, 70_651),
    ],
)
def test_edge_count(family: str, layers: int, heads: int, groups: int, split: bool, count: int) -> None:
    """Semantics 1 quotes these figures; the closed formula agrees."""
    referee = Data().referee(
        build(family, layers=layers, heads=heads, groups=groups, dh=2), split_kv_groups=split
    )
    before = [1 + i * (heads + 1) for i in range(layers)]
    per_layer = heads + 2 * (heads if split else groups)
    assert len(referee.edges) == len(set(referee.edges)) == count
    assert count == sum(b * per_layer + b + heads for b in before) + 1 + layers * (heads + 1)


def test_names() -> None:
    """Names and model order of a small grouped graph (semantics 1)."""
    referee = Data().referee(build("llama", layers=1))
    assert referee.writers == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
    q = [f"a0.h{h}<q>" for h in range(4)]
    assert referee.readers == [*q, "a0.kv0<k>", "a0.kv1<k>", "a0.kv0<v>", "a0.kv1<v>", "m0", "logits"]
    assert ("m0", "logits") in referee.edges
    assert ("m0", "m0") not in referee.edges
    assert ("a0.h3", "m0") in referee.edges


def test_metrics() -> None:
    """Semantics 4, written out from the logits; two rows of the first example weigh half each."""
    model, data = build("qwen2"), Data("left")
    weights = torch.tensor([0.125, 0.125, 0.25, 0.25, 0.25], dtype=torch.float64)
    referee = data.referee(model)
    removed = set(referee.edges[::3])
    logits, full = referee.circuit_logits(removed), referee.circuit_logits(set())
    p, p_full = logits.softmax(-1), full.softmax(-1)
    good, bad = data.answers, data.distractors
    expected = {
        "kl": (p_full * (p_full / p).log()).sum(-1),
        "logit_diff": torch.stack(
            [-(logits[i, g].mean() - logits[i, bad[i]].mean()) for i, g in enumerate(good)]
        ),
        "nll": torch.stack([-p[i, g].sum().log() for i, g in enumerate(good)]),
        "prob_diff": torch.stack([-(p[i, g].sum() - p[i, bad[i]].sum()) for i, g in enumerate(good)]),
    }
    for name, values in expected.items():
        got = data.referee(model, metric=name).metric(removed)
        assert got == pytest.approx(float((values * weights).sum()), abs=1e-12)


def test_reader_order() -> None:
    """Both orders of semantics 3, grouped and with every head its own keys and values."""
    model = build("llama", layers=1)
    grouped, split = Data().referee(model), Data().referee(model, split_kv_groups=True)
    q = ["a0.h3<q>", "a0.h2<q>", "a0.h1<q>", "a0.h0<q>"]
    assert grouped.reader_order() == ["logits", "m0", "a0.kv1<v>", "a0.kv0<v>", "a0.kv1<k>", "a0.kv0<k>", *q]
    assert grouped.reader_order("head") == [
        "logits", "m0", *q[:2], "a0.kv1<k>", "a0.kv1<v>", *q[2:], "a0.kv0<k>", "a0.kv0<v>",
    ]  # fmt: skip
    assert split.reader_order("head") == [
        "logits",
        "m0",
        *(f"a0.h{h}<{x}>" for h in (3, 2, 1, 0) for x in "qkv"),
    ]
    for referee in (grouped, split):
        assert (
            sorted(referee.reader_order()) == sorted(referee.reader_order("head")) == sorted(referee.readers)
        )


@pytest.mark.parametrize("order", ["acdc", "head"])
def test_acdc_replay(order: str) -> None:
    """A run's record is consistent: scores replay, decisions follow, dead readers go."""
    data = Data("left")
    referee = data.referee(build("llama"))
    result = referee.acdc(0.05, order=order)
    assert set(result.tested) | result.untested == set(result.scores) == set(referee.edges)
    assert not set(result.tested) & result.untested
    assert result.kept and result.untested
    assert len(result.kept) < len(result.tested)
    removed: set[Edge] = set()
    for reader in referee.reader_order(order):
        mine = [e for e in result.tested if e[1] == reader]
        if not mine:  # dead: nothing these heads or this MLP write is kept, so dropping changes nothing
            before = referee.metric(removed)
            removed |= in_edges(referee, reader)
            assert in_edges(referee, reader) <= result.untested - result.kept
            assert referee.metric(removed) == pytest.approx(before, abs=1e-13)
        else:
            assert mine == [e for e in reversed(referee.edges) if e[1] == reader]
        for edge in mine:
            score = referee.metric(removed | {edge}) - referee.metric(removed)
            assert result.scores[edge] == pytest.approx(score, abs=1e-12)
            assert (edge in result.kept) == (score >= 0.05)
            removed |= set() if edge in result.kept else {edge}
    assert result.kept == set(referee.edges) - removed
    assert result.final == pytest.approx(referee.metric(removed), abs=1e-12)


def test_acdc_thresholds_and_restriction() -> None:
    """Extreme thresholds, the absolute rule, and a search restricted to some readers (semantics 3)."""
    data = Data()
    referee = data.referee(build("gpt2"), metric="logit_diff")
    nothing = referee.acdc(-1e9)
    assert nothing.kept == set(referee.edges) and not nothing.untested
    everything = referee.acdc(1e9)
    assert not everything.kept
    assert set(everything.tested) == in_edges(referee, "logits")
    strict = referee.acdc(0.0, criterion="absolute")  # |score| < 0 never holds
    assert strict.kept == set(referee.edges) and min(strict.scores.values()) < 0
    some = {"m1", "a1.h3<v>"}
    restricted = referee.acdc(1e9, readers=some)
    assert set(restricted.tested) == in_edges(referee, *some)
    assert restricted.kept == restricted.untested == set(referee.edges) - in_edges(referee, *some)


@pytest.mark.parametrize("order", ["acdc", "head"])
def test_dead_group_needs_all_heads_dead(order: str) -> None:
    """A group's reader is searched while any of its heads is kept, dropped when none is (semantics 3)."""
    referee = Data("left").referee(build("llama"), metric="kl")
    partly, dead = 0, 0
    for threshold in (0.05, 0.1, 0.2, 0.3):
        result = referee.acdc(threshold, order=order)
        kept_writers = {writer for writer, _ in result.kept}
        for reader in set(referee.readers) - {"logits"}:
            layer, _, name = reader.partition(".")
            group = name[:3]  # h0<, kv0 or nothing for an MLP
            heads = {"kv0": ["h0", "h1"], "kv1": ["h2", "h3"]}.get(group, [name[:2]])
            nodes = {f"{layer}.{h}" if h else layer for h in heads}
            alive = nodes & kept_writers
            assert in_edges(referee, reader) <= (set(result.tested) if alive else result.untested)
            partly += group.startswith("kv") and len(alive) == 1
            dead += group.startswith("kv") and not alive
    assert partly
    assert dead


def test_graphs_of_other_families() -> None:
    """Parallel blocks have no edge from heads to their own MLP; shared scales tie a layer's heads."""
    for family, parallel in (("gpt_neox", True), ("gpt_neox_sequential", False), ("falcon", True)):
        referee = Data().referee(ALL_FAMILIES[family]())
        assert (("a1.h0", "m1") in referee.edge_set) != parallel
        assert {("a0.h0", "m1"), ("m0", "m1"), ("a1.h0", "logits")} <= referee.edge_set
        assert referee.writers[1:6] == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0"]
        assert referee.nodes["a1.h2<q>"] == ["a1.h2"]
    assert "a1.kv0<k>" in Data().referee(ALL_FAMILIES["falcon"]()).readers
    for family in ("gemma2", "olmo2"):
        referee = Data().referee(ALL_FAMILIES[family]())
        for reader in ("a1.h2<q>", "a1.kv0<k>", "a1.kv1<v>"):
            assert referee.nodes[reader] == ["a1.h0", "a1.h1", "a1.h2", "a1.h3"]


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_coupled_heads_live_and_die_together(family: str) -> None:
    """Where heads share a scale, a layer's readers are searched while any of its heads is kept."""
    referee = Data("left").referee(ALL_FAMILIES[family]())
    lone = 0  # readers of dead heads searched for the sake of others
    for threshold in (0.1, 0.3):
        result = referee.acdc(threshold)
        kept = {writer for writer, _ in result.kept}
        for reader in referee.readers:
            if reader.startswith("a"):
                alive = kept & {f"{reader[:2]}.h{h}" for h in range(4)}
                mine = in_edges(referee, reader)
                assert mine <= (set(result.tested) if alive else result.untested)
                lone += bool(alive) and reader.endswith("<q>") and reader[:5] not in alive
    assert lone
