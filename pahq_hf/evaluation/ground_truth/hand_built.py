"""Five models whose circuit is known, because their weights were set by hand.

In each, most heads and all other MLPs are distractors: they compute functions of the prompt, but what they
add is read by nothing that matters. See `KnownModel` for what counts as an edge of the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pahq_hf.circuit.graph import BoolArray, Graph, GraphSpec
from pahq_hf.errors import ConfigError
from pahq_hf.evaluation.ground_truth.hand_builder import HandBuilder
from pahq_hf.tasks.base import Pair, Task, collate

_TOKENS = 12
_JUNK = 24
_POSITIONS = 16


@dataclass(frozen=True)
class KnownModel:
    """A model with its task and its circuit.

    An edge belongs to the truth when what it carries differs between clean and corrupted prompts and its
    reader reads that, on a path to the answer. Edges that carry the same in both (positions, biases) have no
    effect under the ablation `corrupted` and are no part of it; under `zero` or `mean` they may be needed.

    Attributes:
        name: What `load_known_model` calls it.
        says: What it computes, and how.
        model: The model, a `GPT2LMHeadModel`.
        task: Prompts and answers; the metric is `logit_diff`.
        edges: Names of the edges of the truth.
        redundant: Edges of the truth that can be removed one at a time without any effect, because another
            path does the same.
    """

    name: str
    says: str
    model: PreTrainedModel
    task: Task
    edges: tuple[str, ...]
    redundant: tuple[str, ...] = ()

    @cached_property
    def graph(self) -> Graph:
        """The model's graph."""
        config = self.model.config
        return Graph(GraphSpec(layers=config.n_layer, heads=config.n_head, kv_groups=config.n_head))

    @property
    def truth(self) -> BoolArray:
        """The edges of the truth. [readers, writers]"""
        kept = self.graph.no_edges()
        for name in self.edges:
            kept[self.graph.parse_edge(name)] = True
        return kept


# -- heads that several models have ---------------------------------------------------------------


def _shift(positions: int) -> Tensor:
    """Maps a position to the one before it. [positions, positions]"""
    return torch.eye(positions).roll(-1, dims=1)


def _previous_token(b: HandBuilder, layer: int, head: int, *, writes: str) -> None:
    positions = b.space["position"].shape[0]
    q = b.map("position", _shift(positions))
    b.head(layer, head, q=q, k=b.map("position"), v=b.map("token"), out=b.space[writes])


def _fetch(b: HandBuilder, layer: int, head: int, *, slot: int, v: Tensor, out: Tensor) -> None:
    """A head whose every query attends to one position."""
    positions = b.space["position"].shape[0]
    everywhere, there = torch.ones(positions, 1), torch.eye(positions)[:, [slot]]
    b.head(layer, head, q=b.map("position", everywhere), k=b.map("position", there), v=v, out=out)


def _constant_head(b: HandBuilder, layer: int, head: int) -> None:
    """A head that adds to the logits, but the same in every prompt: it reads positions only."""
    positions = b.space["position"].shape[0]
    v = b.map("position", b.noise(positions, 8))
    out = b.noise(8, b.space["out"].shape[0]) @ b.space["out"] / 8
    b.head(layer, head, q=b.map("position"), k=b.map("position"), v=v, out=out, sharp=1.0)


def _pick(generator: torch.Generator, count: int) -> list[int]:
    """Different tokens, at random."""
    return [int(token) for token in torch.randperm(_TOKENS, generator=generator)[:count]]


def _pairs(prompt: Callable[[], tuple[list[int], int]], n: int) -> list[Pair]:
    """Pairs of prompts that end differently and have different answers."""
    pairs: list[Pair] = []
    while len(pairs) < n:
        (clean, answer), (corrupted, other) = prompt(), prompt()
        if answer != other and clean[-1] != corrupted[-1]:
            pairs.append(Pair(clean, corrupted, (answer,), (other,)))
    return pairs


# -- the models -----------------------------------------------------------------------------------


def _induction(n: int, seed: int) -> KnownModel:
    length = 7
    b = HandBuilder(
        layers=3, vocab=_TOKENS, positions=_POSITIONS, spaces={"before": _TOKENS, "junk": _JUNK}, seed=1
    )
    _previous_token(b, 0, 1, writes="before")
    b.head(1, 2, q=b.map("token"), k=b.map("before"), v=b.map("token"), out=4 * b.space["out"])
    _constant_head(b, 2, 0)
    b.fill(reads=("token", "position", "before", "out", "junk"))
    generator = torch.Generator().manual_seed(seed)

    def prompt() -> tuple[list[int], int]:
        tokens = _pick(generator, length - 1)
        # Not the first: having none before it, that token counts itself as the one before.
        at = int(torch.randint(1, length - 2, (), generator=generator))
        return [*tokens, tokens[at]], tokens[at + 1]

    return KnownModel(
        name="induction",
        says="[a b ... a] -> b: a previous-token head and an induction head (K-composition), 3 layers",
        model=b.model,
        task=_task("induction", _pairs(prompt, n), seed),
        edges=(
            "input->a0.h1<v>",
            "a0.h1->a1.h2<k>",
            "input->a1.h2<q>",
            "input->a1.h2<v>",
            "a1.h2->logits",
        ),
    )


def _chain(n: int, seed: int) -> KnownModel:
    step = 5
    b = HandBuilder(
        layers=4,
        head_width=40,
        vocab=_TOKENS,
        positions=_POSITIONS,
        spaces={"before": _TOKENS, "hop": _TOKENS, "next": _TOKENS, "junk": _JUNK},
        seed=2,
    )
    _previous_token(b, 0, 3, writes="before")
    b.head(1, 0, q=b.map("token"), k=b.map("before"), v=b.map("token"), out=b.space["hop"])
    b.mlp(1, read=b.map("hop"), out=b.space["next"].roll(-step, dims=0))
    b.head(2, 1, q=b.map("next"), k=b.map("before"), v=b.map("token"), out=4 * b.space["out"])
    _constant_head(b, 3, 2)
    b.fill(reads=("token", "position", "before", "hop", "next", "out", "junk"))
    generator = torch.Generator().manual_seed(seed)

    def prompt() -> tuple[list[int], int]:
        while True:
            one, two = _pick(generator, 2), _pick(generator, 2)
            link = (one[1] + step) % _TOKENS
            rest = [token for token in _pick(generator, _TOKENS) if token not in (*one, link, two[1])]
            if len({*one, link, two[1]}) == 4:
                blocks = [one, [link, two[1]], rest[:2]]
                order = torch.randperm(3, generator=generator).tolist()
                return [rest[2], *(token for i in order for token in blocks[i]), one[0]], two[1]

    return KnownModel(
        name="chain",
        says="two lookups, x -> y and y + 5 -> z, an MLP adding 5 between them (K-, Q-composition), 4 layers",
        model=b.model,
        task=_task("chain", _pairs(prompt, n), seed),
        edges=(
            "input->a0.h3<v>",
            "a0.h3->a1.h0<k>",
            "input->a1.h0<q>",
            "input->a1.h0<v>",
            "a1.h0->m1",
            "m1->a2.h1<q>",
            "a0.h3->a2.h1<k>",
            "input->a2.h1<v>",
            "a2.h1->logits",
        ),
    )


def _xor(n: int, seed: int) -> KnownModel:
    length = 5
    b = HandBuilder(
        layers=3, vocab=_TOKENS, positions=_POSITIONS, spaces={"left": 1, "right": 1, "junk": _JUNK}, seed=3
    )
    odd = (torch.arange(_TOKENS) % 2).float()[:, None]  # [vocab, 1]
    _fetch(b, 0, 2, slot=1, v=b.map("token", odd), out=b.space["left"])
    _fetch(b, 1, 1, slot=3, v=b.map("token", odd), out=b.space["right"])
    difference = b.map("left") - b.map("right")  # [d_model, 1]
    # |left - right| says odd (token 1); its complement would be a constant, so token 0 is the other answer.
    yes = 4 * (b.space["out"][1] - b.space["out"][0])
    b.mlp(1, read=torch.cat([difference, -difference], 1), out=torch.stack([yes, yes]))
    _constant_head(b, 2, 3)
    b.fill(reads=("token", "position", "left", "right", "out", "junk"))
    # Half of the examples are answered 0: the last MLP's bias takes half of what `yes` adds.
    b.model.transformer.h[2].mlp.c_proj.bias.copy_(-yes / 2)
    generator = torch.Generator().manual_seed(seed)
    pairs: list[Pair] = []
    for index in range(n):
        clean = torch.randint(_TOKENS, (length,), generator=generator).tolist()
        corrupted = torch.randint(_TOKENS, (length,), generator=generator).tolist()
        flipped, same = (1, 3) if index % 2 else (3, 1)
        corrupted[same] ^= (corrupted[same] ^ clean[same]) & 1  # of the same parity
        corrupted[flipped] ^= (corrupted[flipped] ^ clean[flipped] ^ 1) & 1  # of the other
        answer = (clean[1] + clean[3]) % 2
        pairs.append(Pair(clean, corrupted, (answer,), (1 - answer,)))
    return KnownModel(
        name="xor",
        says="are the tokens at positions 1 and 3 of unequal parity? two heads, and an MLP takes their XOR",
        model=b.model,
        task=_task("xor", pairs, seed),
        edges=("input->a0.h2<v>", "input->a1.h1<v>", "a0.h2->m1", "a1.h1->m1", "m1->logits"),
    )


def _backup(n: int, seed: int) -> KnownModel:
    length = 5
    b = HandBuilder(
        layers=3, vocab=_TOKENS, positions=_POSITIONS, spaces={"copy": _TOKENS, "junk": _JUNK}, seed=4
    )
    for layer, head in ((0, 0), (1, 3)):
        _fetch(b, layer, head, slot=2, v=b.map("token"), out=2 * b.space["copy"])
    copy, out = b.map("copy"), 4 * b.space["out"]
    # relu(x - .5) - relu(x - 1.5): 1 as soon as one head says 2, and 0 for what attention leaks, so that one
    # head more or less makes no difference at all
    bias = torch.cat([torch.full((_TOKENS,), -0.5), torch.full((_TOKENS,), -1.5)])
    b.mlp(1, read=torch.cat([copy, copy], 1), out=torch.cat([out, -out]), bias=bias)
    _constant_head(b, 2, 1)
    b.fill(reads=("token", "position", "copy", "out", "junk"))
    generator = torch.Generator().manual_seed(seed)
    pairs: list[Pair] = []
    for _ in range(n):
        answer, other, third = _pick(generator, 3)
        clean = torch.randint(_TOKENS, (length,), generator=generator).tolist()
        corrupted = torch.randint(_TOKENS, (length,), generator=generator).tolist()
        clean[2], corrupted[2] = answer, other
        pairs.append(
            Pair(clean, corrupted, (answer,), (third,))
        )  # a third: one path's corruption is harmless
    paths = ("input->a0.h0<v>", "a0.h0->m1", "input->a1.h3<v>", "a1.h3->m1")
    return KnownModel(
        name="backup",
        says="the token at position 2, copied by two heads, either of which is enough: an MLP takes their OR",
        model=b.model,
        task=_task("backup", pairs, seed),
        edges=(*paths, "m1->logits"),
        redundant=paths,
    )


def _votes(n: int, seed: int) -> KnownModel:
    voters = [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    length = len(voters) + 2
    b = HandBuilder(layers=3, vocab=_TOKENS, positions=_POSITIONS, spaces={"junk": _JUNK}, seed=5)
    sign = 1 - 2 * (torch.arange(_TOKENS) % 2).float()[:, None]  # [vocab, 1]
    even = (b.space["out"][0] - b.space["out"][1])[None]
    for place, (layer, head) in enumerate(voters):
        _fetch(b, layer, head, slot=place + 1, v=b.map("token", sign), out=even / 4**place)
    _constant_head(b, 2, 1)
    b.fill(reads=("token", "position", "out", "junk"))
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(n):
        answer = int(torch.randint(2, (), generator=generator))
        halves = torch.randint(_TOKENS // 2, (2, length), generator=generator)
        clean, corrupted = (2 * halves[0] + answer).tolist(), (2 * halves[1] + 1 - answer).tolist()
        pairs.append(Pair(clean, corrupted, (answer,), (1 - answer,)))
    names = [f"a{layer}.h{head}" for layer, head in voters]
    return KnownModel(
        name="votes",
        says="is the prompt of even tokens? six heads say so, each a quarter as loud as the one before",
        model=b.model,
        task=_task("votes", pairs, seed),
        edges=(*(f"input->{name}<v>" for name in names), *(f"{name}->logits" for name in names)),
    )


def _task(name: str, pairs: list[Pair], seed: int) -> Task:
    source: dict[str, object] = {"generator": f"known model {name}", "seed": seed, "n": len(pairs)}
    return collate(pairs, name=name, metric="logit_diff", source=source)


_MAKERS: dict[str, Callable[[int, int], KnownModel]] = {
    "induction": _induction,
    "chain": _chain,
    "xor": _xor,
    "backup": _backup,
    "votes": _votes,
}
KNOWN_MODELS = tuple(_MAKERS)


def load_known_model(name: str, *, n: int = 32, seed: int = 0) -> KnownModel:
    """Build a model whose circuit is known.

    Args:
        name: One of `KNOWN_MODELS`.
        n: Number of prompt pairs.
        seed: Of the prompts; the weights do not depend on it.

    Returns:
        The model with its task and truth.

    Raises:
        ConfigError: If the name is unknown or there would be no prompts.
    """
    if name not in _MAKERS:
        raise ConfigError(f"unknown known model {name!r}; known: {', '.join(KNOWN_MODELS)}")
    if n < 1:
        raise ConfigError(f"n must be at least 1; got {n}")
    with torch.no_grad():
        return _MAKERS[name](n, seed)
