"""The table of families: where each Hugging Face family keeps its layers, norms and projections.

Its parts, `gpt_line.py` and `llama_line.py`, are the only files that name attribute paths of Hugging
Face models. A row is a function of the config, because some families have variants.
"""

from __future__ import annotations

from typing import Any

from pahq_hf.modeling.architectures.architecture import RowOf
from pahq_hf.modeling.architectures.gpt_line import GPT_LINE
from pahq_hf.modeling.architectures.llama_line import LLAMA_LINE

TABLE: dict[str, RowOf] = GPT_LINE | LLAMA_LINE

# The default configs of some families name tokens that they do not have, and say so when made.
_IN_VOCABULARY = {"bos_token_id": 0, "eos_token_id": 0}

_GRANITE = {"residual_multiplier": 0.22, "logits_scaling": 8.0}

# Configs that make another row of a family than its default, for the documentation.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "arcee": {"": _IN_VOCABULARY},
    "cohere": {"": {}, "R+": {"use_qk_norm": True}},
    "falcon": {
        "7B": {},
        "40B, 11B": {"new_decoder_architecture": True},
        "RW": {"alibi": True, "multi_query": False, "parallel_attn": False},
    },
    "gpt_bigcode": {"": {}, "not multi-query": {"multi_query": False}},
    "gpt_neox": {"": {}, "sequential": {"use_parallel_residual": False}},
    "granite": {"": _GRANITE},
    "granitemoe": {"": _GRANITE},
    "phi": {"": {}, "with q/k norm": {"qk_layernorm": True}},
    "stablelm": {
        "": _IN_VOCABULARY,
        "parallel": {"use_parallel_residual": True, "qk_layernorm": True} | _IN_VOCABULARY,
    },
    "starcoder2": {"": _IN_VOCABULARY},
}
