"""Weights set by hand: a plain GPT-2 whose heads and MLPs compute what they are told, and nothing else.

Two tricks make the circuit provable:

* The stream is a direct sum of named *spaces*. Their basis is random, orthonormal and orthogonal to the
  vector of ones, so that weights are dense (low precision has something to round), and LayerNorm's mean is
  zero.
* LayerNorm is the identity to about 1e-8: its epsilon is huge and its weight the root of that.

A component reads and writes what it is told to; an edge from a writer into a space that its reader does not
read has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

EPSILON = 1e8  # of LayerNorm; activations are of order 1


class HandBuilder:
    """Sets the weights of a GPT-2.

    Args:
        layers: Number of layers.
        heads: Heads per layer.
        head_width: Width of a head; the model's is `heads * head_width`.
        neurons: Neurons of an MLP.
        vocab: Number of tokens.
        positions: Longest prompt.
        spaces: Widths of the stream's spaces beside `token`, `position` and `out`.
        seed: Of the bases.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int = 4,
        head_width: int = 32,
        neurons: int = 64,
        vocab: int,
        positions: int,
        spaces: Mapping[str, int],
        seed: int = 0,
    ) -> None:
        self.layers, self.heads, self.head_width, self.neurons = layers, heads, head_width, neurons
        self._random = torch.Generator().manual_seed(seed)
        self.width = heads * head_width
        widths = {"token": vocab, "position": positions, "out": vocab, **spaces}
        if sum(widths.values()) >= self.width:
            raise ValueError(f"spaces of {sum(widths.values())} dimensions need more than {self.width}")
        seeds = self.noise(self.width, self.width)
        seeds[:, 0] = 1  # the first basis vector is the one of ones, which no space has
        basis = torch.linalg.qr(seeds)[0].T[1:]
        self.space = dict(
            zip(widths, basis[: sum(widths.values())].split(list(widths.values())), strict=True)
        )
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab,
                n_positions=positions,
                n_embd=self.width,
                n_layer=layers,
                n_head=heads,
                n_inner=neurons,
                activation_function="relu",
                layer_norm_epsilon=EPSILON,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                is_norm = ".ln_" in name and name.endswith("weight")
                parameter.fill_(EPSILON**0.5 if is_norm else 0.0)
            self.model.transformer.wte.weight.copy_(self.space["token"])
            self.model.transformer.wpe.weight.copy_(self.space["position"])
            self.model.lm_head.weight.copy_(self.space["out"])
        self.model.requires_grad_(False)

    def noise(self, rows: int, columns: int) -> Tensor:
        """Random numbers of unit variance. [rows, columns]"""
        return torch.randn(rows, columns, generator=self._random)

    def rotation(self, size: int) -> Tensor:
        """A random orthogonal matrix. [size, size]"""
        return torch.linalg.qr(self.noise(size, size))[0]

    def map(self, reads: str, matrix: Tensor | None = None) -> Tensor:
        """What reads one space: its coordinates, or a matrix of them. [d_model, columns]"""
        return self.space[reads].T if matrix is None else self.space[reads].T @ matrix

    def head(
        self, layer: int, head: int, *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sharp: float = 8.0
    ) -> None:
        """Set a head.

        Args:
            layer: Its layer.
            head: Its number in the layer.
            q: Reads the query. [d_model, m]
            k: Reads the key, for scores `sharp * q.k`. [d_model, m]
            v: Reads the value. [d_model, n]
            out: Writes it. [n, d_model]
            sharp: Factor of the scores.
        """
        width = self.head_width
        attention = self.model.transformer.h[layer].attn
        inner = self.rotation(width)
        root = (sharp * width**0.5) ** 0.5  # shared by q and k
        columns = slice(head * width, (head + 1) * width)
        for part, read in enumerate((q * root, k * root)):
            fused = attention.c_attn.weight[:, part * self.width : (part + 1) * self.width]
            fused[:, columns] = read @ inner[: read.shape[1]]
        inner = self.rotation(width)
        attention.c_attn.weight[:, 2 * self.width :][:, columns] = v @ inner[: v.shape[1]]
        attention.c_proj.weight[columns] = inner[: out.shape[0]].T @ out

    def mlp(self, layer: int, *, read: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """Set an MLP, `relu(x read + bias) out`.

        Args:
            layer: Its layer.
            read: [d_model, used neurons]
            out: [used neurons, d_model]
            bias: Of the neurons; zero by default. [used neurons]
        """
        mlp, used = self.model.transformer.h[layer].mlp, read.shape[1]
        mlp.c_fc.weight[:, :used] = read
        mlp.c_proj.weight[:used] = out
        if bias is not None:
            mlp.c_fc.bias[:used] = bias

    def fill(self, *, reads: tuple[str, ...], writes: str = "junk") -> None:
        """Make distractors of all heads and MLPs that are not set.

        Distractors read random directions of some spaces, so that what they add differs between prompts, and
        write to a space that nothing of the circuit reads.

        Args:
            reads: The spaces they read.
            writes: The space they write to.
        """
        seen = torch.cat([self.space[name] for name in reads]).T  # [d_model, read width]

        def read(columns: int) -> Tensor:
            return seen @ self.noise(seen.shape[1], columns) / seen.shape[1] ** 0.5

        target = self.space[writes]
        for layer, block in enumerate(self.model.transformer.h):
            for head in range(self.heads):
                columns = slice(head * self.head_width, (head + 1) * self.head_width)
                if not block.attn.c_proj.weight[columns].any():
                    out = self.noise(8, target.shape[0]) @ target / 8**0.5
                    self.head(layer, head, q=read(8), k=read(8), v=read(8), out=out, sharp=1.0)
            if not block.mlp.c_proj.weight.any():
                out = self.noise(self.neurons, target.shape[0]) @ target / self.neurons**0.5
                self.mlp(layer, read=read(self.neurons), out=out)
