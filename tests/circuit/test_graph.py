"""The residual-stream graph: what exists, how it is named, in which order it is searched."""

from __future__ import annotations

import re

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    T5Config,
)

from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec, ReaderOrder, edge_list
from pahq_hf.errors import CircuitError, ConfigError, UnsupportedModelError
from pahq_hf.modeling.architectures.lookup import graph_spec
from tests.tiers import examples

GPT2_SMALL = GPT2Config()
ATTENTION_ONLY = GPT2Config(n_layer=4, n_head=8, n_embd=512, n_inner=0)
LLAMA_1B = LlamaConfig(num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, hidden_size=2048)
SMOLLM2 = LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576)

NODE = re.compile(r"(input|logits|[am](?P<layer>\d+))")


@st.composite
def specs(draw: st.DrawFn) -> GraphSpec:
    groups = draw(st.integers(1, 3))
    return GraphSpec(
        layers=draw(st.integers(1, 4)),
        heads=groups * draw(st.integers(1, 3)),
        kv_groups=groups,
        mlps=draw(st.booleans()),
        parallel=draw(st.booleans()),
        split_kv_groups=draw(st.booleans()),
    )


def writes_before(writer: str, reader: str, *, parallel: bool) -> bool:
    """Whether a writer has written when a reader reads, from their names alone."""
    if writer == "input" or reader == "logits":
        return True
    found = [NODE.match(name) for name in (writer, reader)]
    written, read = (int(match["layer"]) for match in found if match)
    return written < read or (written == read and writer[0] == "a" and reader[0] == "m" and not parallel)


def random_edges(graph: Graph, density: float, seed: int) -> BoolArray:
    kept: BoolArray = graph.all_edges & (np.random.default_rng(seed).random(graph.all_edges.shape) < density)
    return kept


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "split", "count"),
    [
        (GPT2_SMALL, False, 32_491),
        (GPT2_SMALL, True, 32_491),  # every head has keys and values of its own already
        (ATTENTION_ONLY, False, 1_281),
        (LLAMA_1B, False, 195_865),
        (LLAMA_1B, True, 386_713),
        (SMOLLM2, False, 70_651),
    ],
)
def test_edge_counts_from_the_config(config: PretrainedConfig, split: bool, count: int) -> None:
    spec = graph_spec(config, split_kv_groups=split)
    graph = Graph(spec)
    assert spec.edge_count == graph.edge_count == int(graph.all_edges.sum()) == count


@pytest.mark.parametrize("config", [MistralConfig(), Qwen2Config()])
def test_config_gives_every_size(config: PretrainedConfig) -> None:
    spec = graph_spec(config)
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert (spec.layers, spec.heads, spec.kv_groups) == sizes
    assert spec.mlps and not spec.parallel


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (BertConfig(), "'bert' is not supported; `pahq families` lists"),
        (MambaConfig(), "state-space"),
        (T5Config(), "encoder-decoder"),
    ],
)
def test_other_families_are_refused_with_a_reason(config: PretrainedConfig, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        graph_spec(config)


def test_cross_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        graph_spec(GPT2Config(add_cross_attention=True))


@pytest.mark.parametrize(("layers", "heads", "groups"), [(0, 4, 4), (2, 0, 1), (2, 4, 0), (2, 4, 3)])
def test_impossible_sizes_are_refused(layers: int, heads: int, groups: int) -> None:
    with pytest.raises(ConfigError):
        GraphSpec(layers=layers, heads=heads, kv_groups=groups)


# -- edges ----------------------------------------------------------------------------------------


@given(spec=specs())
@examples(60)
def test_edges_are_those_whose_writer_writes_first(spec: GraphSpec) -> None:
    graph = Graph(spec)
    expected = [
        [writes_before(writer.name, reader.name, parallel=spec.parallel) for writer in graph.writers]
        for reader in graph.readers
    ]
    np.testing.assert_array_equal(graph.all_edges, expected)
    assert spec.edge_count == graph.edge_count == int(np.sum(expected))
    assert not graph.no_edges().any()


@given(spec=specs())
@examples(60)
def test_every_component_is_written_and_read_once(spec: GraphSpec) -> None:
    graph = Graph(spec)
    heads = [f"a{layer}.h{head}" for layer in range(spec.layers) for head in range(spec.heads)]
    mlps = [f"m{layer}" for layer in range(spec.layers)] if spec.mlps else []
    assert sorted(writer.name for writer in graph.writers) == sorted(["input", *heads, *mlps])
    per_head = spec.split_kv_groups or spec.kv_groups == spec.heads
    shared = heads if per_head else [f"a{i}.kv{g}" for i in range(spec.layers) for g in range(spec.kv_groups)]
    readers = [f"{name}<q>" for name in heads] + [f"{name}<{kind}>" for name in shared for kind in "kv"]
    assert sorted(reader.name for reader in graph.readers) == sorted([*readers, *mlps, "logits"])
    # Every head is computed from exactly one query, one key and one value reader, an MLP from its own.
    kinds: dict[str, list[str]] = {writer.name: [] for writer in graph.writers}
    for reader in graph.readers:
        for node in reader.nodes:
            kinds[graph.writers[node].name].append(reader.kind)
            if reader.kind == "q":
                assert reader.name == f"{graph.writers[node].name}<q>"
    assert kinds.pop("input") == []
    assert all(sorted(k) == (["mlp"] if name[0] == "m" else ["k", "q", "v"]) for name, k in kinds.items())


@given(spec=specs())
@examples(40)
def test_heads_and_their_key_value_readers_agree(spec: GraphSpec) -> None:
    graph = Graph(spec)
    used = {head: kv for kv in range(spec.kv_readers) for head in graph.heads_of_kv(kv)}
    assert used == {head: graph.kv_of_head(head) for head in range(spec.heads)}
    assert list(used) == list(range(spec.heads))  # groups are runs of neighbours
    for readers in (graph.layer_readers(0, "k"), graph.layer_readers(0, "v")):
        for kv, reader in enumerate(readers):
            heads = tuple(graph.head_writer(0, head) for head in graph.heads_of_kv(kv))
            assert (graph.readers[reader].index, graph.readers[reader].nodes) == (kv, heads)


@given(spec=specs())
@examples(40)
def test_edge_names_round_trip(spec: GraphSpec) -> None:
    graph = Graph(spec)
    edges = edge_list(graph.all_edges)
    names = [graph.edge_name(reader, writer) for reader, writer in edges]
    assert len(set(names)) == len(names) == spec.edge_count
    assert [graph.parse_edge(name) for name in names] == edges
    for reader, writer in edges[:: max(1, len(edges) // 20)]:
        assert graph.reader_index(graph.readers[reader].name) == reader
        assert graph.writer_index(graph.writers[writer].name) == writer


def test_edge_names_are_those_of_eap_ig() -> None:
    graph = Graph(GraphSpec(layers=3, heads=4, kv_groups=2))
    for name in ("a0.h1->a2.h3<q>", "m1->a2.kv1<k>", "a2.h3->m2", "m2->logits", "input->a0.kv0<v>"):
        assert graph.edge_name(*graph.parse_edge(name)) == name
    Graph(graph_spec(GPT2_SMALL)).parse_edge("a9.h6->a11.h2<v>")  # every head has its own values


@pytest.mark.parametrize(
    "name",
    [
        "a2.h0->a1.h0<q>",  # written too late
        "a1.h0->a1.h1<q>",  # the same layer's heads read before any of them writes
        "m1->m1",
        "a0.h9->logits",
        "a0.h0->a1.h0<k>",  # keys belong to groups here
        "logits->m1",
        "a0.h0",
        "a0.h0->",
        "",
    ],
)
def test_parse_edge_refuses_what_is_no_edge(name: str) -> None:
    with pytest.raises(CircuitError, match="is not an edge"):
        Graph(GraphSpec(layers=3, heads=4, kv_groups=2)).parse_edge(name)


def test_parallel_blocks_have_no_edge_from_heads_to_their_own_mlp() -> None:
    sequential = GraphSpec(layers=2, heads=3, kv_groups=3)
    parallel = GraphSpec(layers=2, heads=3, kv_groups=3, parallel=True)
    assert sequential.edge_count - parallel.edge_count == 2 * 3
    Graph(sequential).parse_edge("a1.h2->m1")
    with pytest.raises(CircuitError):
        Graph(parallel).parse_edge("a1.h2->m1")


# -- traversal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["acdc", "head"])
@given(spec=specs())
@examples(40)
def test_reader_order_visits_all_readers_from_output_to_input(order: ReaderOrder, spec: GraphSpec) -> None:
    graph = Graph(spec)
    visit = graph.reader_order(order)
    assert sorted(visit) == list(range(len(graph.readers)))
    # When a reader's turn comes, everyone who reads its node has had theirs.
    turn = {reader: i for i, reader in enumerate(visit)}
    for reader in graph.readers:
        for node in reader.nodes:
            mine = graph.reader_index(reader.name)
            assert all(turn[int(r)] < turn[mine] for r in np.flatnonzero(graph.all_edges[:, node]))


@pytest.mark.parametrize(
    ("order", "split", "expected"),
    [
        ("acdc", False, "logits m1 kv1<v> kv0<v> kv1<k> kv0<k> h3<q> h2<q> h1<q> h0<q>"),
        (
            "acdc",
            True,
            "logits m1 h3<v> h2<v> h1<v> h0<v> h3<k> h2<k> h1<k> h0<k> h3<q> h2<q> h1<q> h0<q>",
        ),
        ("head", False, "logits m1 h3<q> h2<q> kv1<k> kv1<v> h1<q> h0<q> kv0<k> kv0<v>"),
        (
            "head",
            True,
            "logits m1 h3<q> h3<k> h3<v> h2<q> h2<k> h2<v> h1<q> h1<k> h1<v> h0<q> h0<k> h0<v>",
        ),
    ],
)
def test_reader_order_is_the_documented_one(order: ReaderOrder, split: bool, expected: str) -> None:
    graph = Graph(GraphSpec(layers=2, heads=4, kv_groups=2, split_kv_groups=split))
    names = [graph.readers[reader].name.removeprefix("a1.") for reader in graph.reader_order(order)]
    first = expected.split()
    assert names[: len(first)] == first
    below = [name.replace("m1", "m0") for name in first[1:]]
    assert [name.removeprefix("a0.") for name in names[len(first) :]] == below


def test_unknown_reader_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="sideways"):
        Graph(GraphSpec(layers=1, heads=1, kv_groups=1)).reader_order("sideways")  # type: ignore[arg-type]


def test_in_edges_come_latest_first() -> None:
    graph = Graph(GraphSpec(layers=2, heads=2, kv_groups=1))

    def writers(reader: str) -> list[str]:
        return [graph.writers[writer].name for writer in graph.in_edges(graph.reader_index(reader))]

    below = ["m0", "a0.h1", "a0.h0", "input"]
    assert writers("logits") == ["m1", "a1.h1", "a1.h0", *below]
    assert writers("m1") == ["a1.h1", "a1.h0", *below]
    assert writers("a1.h0<q>") == writers("a1.kv0<v>") == below
    assert writers("a0.kv0<k>") == ["input"]


@given(spec=specs())
@examples(40)
def test_in_edges_are_a_readers_edges(spec: GraphSpec) -> None:
    graph = Graph(spec)
    for reader in range(len(graph.readers)):
        writers = list(graph.in_edges(reader))
        assert sorted(writers) == np.flatnonzero(graph.all_edges[reader]).tolist()
        assert writers == sorted(writers, reverse=True) and writers[-1] == 0


@given(spec=specs(), density=st.sampled_from([0.0, 0.03, 0.1, 0.3]), seed=st.integers(0, 2**32 - 1))
@examples(60)
def test_has_out_edge_asks_whether_anyone_reads_the_node(spec: GraphSpec, density: float, seed: int) -> None:
    graph = Graph(spec)
    kept = random_edges(graph, density, seed)
    heard = {graph.writers[writer].name for _, writer in edge_list(kept)}
    for index, reader in enumerate(graph.readers):
        expected = reader.name == "logits" or any(graph.writers[n].name in heard for n in reader.nodes)
        assert graph.has_out_edge(kept, index) == expected


@given(spec=specs(), density=st.sampled_from([0.02, 0.1, 0.3, 1.0]), seed=st.integers(0, 2**32 - 1))
@examples(100)
def test_live_edges_equal_brute_force_reachability(spec: GraphSpec, density: float, seed: int) -> None:
    graph = Graph(spec)
    kept = random_edges(graph, density, seed)
    links = nx.DiGraph()
    links.add_nodes_from(["writer input", "reader logits"])
    for reader in graph.readers:  # a reader feeds the nodes computed from it
        links.add_edges_from(
            (f"reader {reader.name}", f"writer {graph.writers[n].name}") for n in reader.nodes
        )
    edges = [tuple(graph.edge_name(r, w).split("->")) for r, w in edge_list(kept)]
    links.add_edges_from((f"writer {writer}", f"reader {reader}") for writer, reader in edges)
    fed = nx.descendants(links, "writer input") | {"writer input"}
    needed = nx.ancestors(links, "reader logits") | {"reader logits"}
    expected = {(w, r) for w, r in edges if f"writer {w}" in fed and f"reader {r}" in needed}
    live = graph.live_edges(kept)
    assert {tuple(graph.edge_name(r, w).split("->")) for r, w in edge_list(live)} == expected


def test_live_edges_drop_both_kinds_of_dead_end() -> None:
    graph = Graph(GraphSpec(layers=2, heads=2, kv_groups=2))

    def edges(*names: str) -> BoolArray:
        mask: BoolArray = graph.no_edges()
        for name in names:
            mask[graph.parse_edge(name)] = True
        return mask

    path = edges("input->a0.h1<v>", "a0.h1->m1", "m1->logits")
    unread = edges("input->a0.h0<q>", "a0.h0->a1.h0<k>")  # nobody reads a1.h0
    unfed = edges("a1.h1->logits")  # nothing reaches a1.h1
    np.testing.assert_array_equal(graph.live_edges(path | unread | unfed), path)


# -- choosing readers -----------------------------------------------------------------------------


def test_match_readers() -> None:
    graph = Graph(GraphSpec(layers=2, heads=2, kv_groups=1))

    def matched(pattern: str | None) -> set[str]:
        return {graph.readers[i].name for i in np.flatnonzero(graph.match_readers(pattern))}

    assert matched(None) == {reader.name for reader in graph.readers}
    assert matched("logits") == {"logits"}
    assert matched("logits, m*") == {"logits", "m0", "m1"}
    assert matched("a1.*<q>,a0.kv?<v>") == {"a1.h0<q>", "a1.h1<q>", "a0.kv0<v>"}


@pytest.mark.parametrize("pattern", ["a9.*", "logits,M1", "", "logits,,m0"])
def test_match_readers_refuses_a_glob_without_readers(pattern: str) -> None:
    with pytest.raises(ConfigError, match="no reader matches"):
        Graph(GraphSpec(layers=2, heads=2, kv_groups=1)).match_readers(pattern)
