"""Tiny random models and tasks that make every approximation visible.

Default initialisations are useless as test subjects: with weights of 0.02 attention is uniform, the MLPs
are linear, and norms and biases are identities, so a wrong engine can pass. Here every parameter is drawn
large enough that each of them matters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from pahq_hf.tasks.base import Task

Model = TypeVar("Model", bound=PreTrainedModel)

VOCAB = 53
HEADS = 4
KV_HEADS = 2
WIDTH = 32
LENGTH = 9

# Eager attention shows its masks and patterns to hooks; nothing ends a `generate` early.
COMMON: dict[str, Any] = {
    "attn_implementation": "eager",
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_gpt2(*, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT2LMHeadModel:
    """GPT-2: fused Conv1D projections, biases everywhere, learned positions, tied unembedding.

    Args:
        layers: Number of blocks.
        dtype: Type of the parameters; they are drawn in float32 whatever it is.
        seed: Determines every parameter. The global random state is left alone.

    Returns:
        The model, in eval mode.
    """
    config = GPT2Config(n_layer=layers, n_embd=WIDTH, n_head=HEADS, n_positions=64, **COMMON)
    return build_model(GPT2LMHeadModel, config, dtype, seed)


def tiny_attention_only(
    *, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> GPT2LMHeadModel:
    """GPT-2 whose MLPs have no neurons; arguments as `tiny_gpt2`. Its untouched forward does not run."""
    config = GPT2Config(n_layer=layers, n_embd=WIDTH, n_head=HEADS, n_positions=64, n_inner=0, **COMMON)
    return build_model(GPT2LMHeadModel, config, dtype, seed)


def tiny_llama(*, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Llama: grouped-query attention (4 heads, 2 groups), RoPE, untied; arguments as `tiny_gpt2`."""
    return build_model(LlamaForCausalLM, LlamaConfig(**llama_like(layers)), dtype, seed)


def tiny_mistral(
    *, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, window: int = 64
) -> MistralForCausalLM:
    """Mistral: as `tiny_llama`, but a token sees the `window` last ones only."""
    config = MistralConfig(**llama_like(layers), sliding_window=window)
    return build_model(MistralForCausalLM, config, dtype, seed)


def tiny_qwen2(*, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Qwen2ForCausalLM:
    """Qwen2: grouped-query attention with q, k, v biases, tied unembedding; arguments as `tiny_gpt2`."""
    config = Qwen2Config(**(llama_like(layers) | {"tie_word_embeddings": True}))
    return build_model(Qwen2ForCausalLM, config, dtype, seed)


# `mistral_window` looks back 4 tokens, fewer than a prompt has: its window does cut something off.
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "mistral_window": partial(tiny_mistral, window=4),
    "qwen2": tiny_qwen2,
}


# Where the padding of `padded_prompts` can be.
PADDINGS = ("none", "left", "right")


def padded_prompts(padding: str = "none", *, batch: int = 3, length: int = LENGTH) -> dict[str, Tensor]:
    """Random prompts of different lengths as keyword arguments of a Hugging Face forward.

    Args:
        padding: `"none"`, `"right"` or `"left"`.
        batch: Number of prompts.
        length: Padded length.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, counted from the first real token. [batch, pos]
    """
    arrays = random_task_arrays(batch=batch, length=length, padding=padding)
    positions = (arrays.attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {
        "input_ids": arrays.clean_ids,
        "attention_mask": arrays.attention_mask,
        "position_ids": positions,
    }


def word_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word `w{i}`; token 0 is the padding, on the left."""
    words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, vocab)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", padding_side="left")


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value of `theirs`; NaN when either holds one."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def llama_like(layers: int) -> dict[str, Any]:
    return COMMON | {
        "num_hidden_layers": layers,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }


def build_model(
    family: Callable[[Any], Model], config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(config)
        randomize_parameters(model)
    for parameter in model.parameters():  # the rotary table stays float32, as `from_pretrained` leaves it
        parameter.data = parameter.data.to(dtype)
    model.eval()
    return model


@torch.no_grad()
def randomize_parameters(model: PreTrainedModel) -> None:
    """Redraw every parameter in place, from the global generator, at a scale where it matters.

    Matrices keep the variance of a unit-variance input, times a gain; so scores reach the bend of the
    softmax, and MLP inputs the bend of the nonlinearity, while the logits stay well away from one-hot.
    Norms' gains spread around 1, whatever their shape; Gemma stores how far they are from it.

    Args:
        model: Any causal language model; tied parameters are drawn once.
    """
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    drawn: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in drawn:
                continue
            drawn.add(id(parameter))
            if id(parameter) in embeddings:
                parameter.normal_(std=0.35)
            elif isinstance(module, torch.nn.Embedding) or name.endswith("bias"):  # learned positions, biases
                parameter.normal_(std=0.2)
            elif "Norm" in (kind := type(module).__name__):
                parameter.normal_(mean=0.0 if kind.startswith("Gemma") else 1.0, std=0.2)
            else:  # a matrix, or a stack of experts' matrices
                fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
                parameter.normal_(std=1.5 / max(1, fan_in) ** 0.5)


class TaskArrays(NamedTuple):
    """The data fields of a `Task`, under the same names."""

    clean_ids: Tensor
    corrupted_ids: Tensor
    attention_mask: Tensor
    answer_rows: Tensor
    answer_positions: Tensor
    answers: tuple[tuple[int, ...], ...]
    distractors: tuple[tuple[int, ...], ...]


def random_task_arrays(
    vocab: int = VOCAB,
    batch: int = 3,
    length: int = LENGTH,
    padding: str = "none",
    seed: int = 0,
    *,
    rows: int = 1,
) -> TaskArrays:
    """Draw random prompt pairs in which clean and corrupted part ways at a different token per example.

    Example i differs first at its token 1 + i (wrapping round), and after that at about every second
    token. With padding, lengths run from half of `length` up to `length`, and the first example is full.

    Args:
        vocab: Number of token ids; at least 8.
        batch: Number of examples.
        length: Padded length; at least 4.
        padding: `"none"`, `"right"` or `"left"`.
        seed: Determines everything.
        rows: Scored positions per example: its last `rows` tokens. Rows name one or two answers and
            one or two distractors, all different.

    Returns:
        The arrays, with token id 0 in the padding and nowhere else.
    """
    if padding not in ("none", "right", "left"):
        raise ValueError(f"padding must be 'none', 'right' or 'left', not {padding!r}")
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = torch.full((batch,), length)
    if padding != "none":
        lengths[1:] = draw(max(3, length // 2), length, (batch - 1,))
    first_column = length - lengths if padding == "left" else torch.zeros_like(lengths)
    index = torch.arange(length)[None, :] - first_column[:, None]  # [batch, pos], from the first real token
    mask = (index >= 0) & (index < lengths[:, None])

    clean = draw(1, vocab, (batch, length))
    # A shift of 1 … vocab - 2 within the ids 1 … vocab - 1 never gives the same token back.
    other = (clean - 1 + draw(1, vocab - 1, (batch, length))) % (vocab - 1) + 1
    first_difference = (1 + torch.arange(batch) % (lengths - 2))[:, None]
    differs = (index > first_difference) & (torch.rand(batch, length, generator=generator) < 0.5)
    differs |= index == first_difference
    corrupted = torch.where(differs, other, clean)

    last = first_column + lengths - 1
    answer_positions = (last[:, None] - torch.arange(rows - 1, -1, -1)[None, :]).reshape(-1)
    answers, distractors = [], []
    for row in range(batch * rows):
        tokens = torch.randperm(vocab, generator=generator)[:4].tolist()
        answers.append(tuple(tokens[: 1 + row % 2]))
        distractors.append(tuple(tokens[2 : 3 + (row // 2) % 2]))
    return TaskArrays(
        clean_ids=clean * mask,
        corrupted_ids=corrupted * mask,
        attention_mask=mask.long(),
        answer_rows=torch.arange(batch).repeat_interleave(rows),
        answer_positions=answer_positions,
        answers=tuple(answers),
        distractors=tuple(distractors),
    )


def random_task(
    vocab: int = VOCAB,
    batch: int = 3,
    length: int = LENGTH,
    padding: str = "none",
    seed: int = 0,
    *,
    rows: int = 1,
    metric: str = "kl",
) -> Task:
    """`random_task_arrays` as a `Task` scored with `metric`; the other arguments are the same."""
    arrays = random_task_arrays(vocab, batch, length, padding, seed, rows=rows)
    return Task(name="random", metric=metric, **arrays._asdict())
