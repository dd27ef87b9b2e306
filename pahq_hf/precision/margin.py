"""How near to the threshold a score has to be to be tested again."""

from __future__ import annotations

from collections.abc import Collection

from pahq_hf.precision.formats.registry import find_format

_ERROR_IN_FP8 = 0.25  # of a score where FP8 weights multiply differences in FP8: SmolLM2, simulated
_TIMES = 2.0  # the error: what can flip is caught with room to spare
_LEAST = 0.2  # one test in two hundred; prompts and models differ more than the finer formats do


def default_margin(formats: Collection[str], compute: str) -> float:
    """The margin of a search, in shares of its threshold: by the coarsest of its formats and products.

    Args:
        formats: Formats that weights are kept in.
        compute: Dtype of products with differences, `auto` resolved.
    """
    error = max(find_format(fmt).error for fmt in formats)
    if compute == "fp8" and "fp8" in formats:
        error = max(error, _ERROR_IN_FP8)
    return max(_LEAST, _TIMES * error)
