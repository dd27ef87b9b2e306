"""Models and data on which the referee is checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.referee import Edge, Referee

VOCAB, LENGTH, EXAMPLES = 50, 6, 4


def build(
    family: str,
    *,
    layers: int = 2,
    heads: int = 4,
    groups: int = 2,
    dh: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A tiny random model, every parameter (norm weights and biases too) randomised."""
    torch.manual_seed(0)
    d = heads * dh
    if family == "gpt2":
        config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=d, n_layer=layers, n_head=heads)
        config._attn_implementation = "eager"
        model: Any = GPT2LMHeadModel(config)
    else:
        common: dict[str, Any] = {
            "vocab_size": VOCAB, "hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 64,
            "attn_implementation": "eager", "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        }  # fmt: skip
        if family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
        elif family == "mistral":  # a head size of its own, a window that never bites
            model = MistralForCausalLM(MistralConfig(**common, head_dim=dh + 2, sliding_window=32))
        else:
            biased = family == "llama-biases"
            model = LlamaForCausalLM(LlamaConfig(**common, attention_bias=biased, mlp_bias=biased))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or ".ln_" in name
            parameter.copy_(
                torch.randn_like(parameter) * 0.25 + (1.0 if norm and "bias" not in name else 0.0)
            )
    return model.to(dtype).eval()


class Data:
    """Random clean and corrupted tokens, padded on one side, with two answer rows for the first example."""

    def __init__(self, padding: str = "none") -> None:
        generator = torch.Generator().manual_seed(1)
        self.clean, self.corrupted = torch.randint(VOCAB, (2, EXAMPLES, LENGTH), generator=generator)
        self.mask = torch.ones(EXAMPLES, LENGTH, dtype=torch.long)
        last = [LENGTH - 1] * EXAMPLES
        for i in range(1, EXAMPLES):
            if padding == "right":
                self.mask[i, LENGTH - i :] = 0
                last[i] = LENGTH - i - 1
            elif padding == "left":
                self.mask[i, :i] = 0
        self.rows = torch.tensor([0, *range(EXAMPLES)])
        self.columns = torch.tensor([LENGTH - 2, *last])
        self.answers = [[1], [2, 3], [4], [5], [6, 7]]
        self.distractors = [[8, 9], [10], [11], [12], [13]]
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def referee(self, model: Any, **options: Any) -> Referee:
        """A referee for these data."""
        return Referee(
            model, self.clean, self.corrupted, self.mask, self.rows, self.columns,
            self.answers, self.distractors, **options,
        )  # fmt: skip

    def hf_all(self, model: Any, ids: Tensor) -> Tensor:
        """The Hugging Face logits, [examples, positions, vocab]."""
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=self.mask, position_ids=self.positions).logits

    def hf(self, model: Any, ids: Tensor) -> Tensor:
        """The Hugging Face logits at the answer rows."""
        return self.hf_all(model, ids)[self.rows, self.columns]


def out_edges(referee: Referee, writer: str) -> set[Edge]:
    """All edges of a writer."""
    return {e for e in referee.edges if e[0] == writer}


def in_edges(referee: Referee, *readers: str) -> set[Edge]:
    """All edges into these readers."""
    return {e for e in referee.edges if e[1] in readers}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Assert equality in float64 up to a tolerance."""
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)
