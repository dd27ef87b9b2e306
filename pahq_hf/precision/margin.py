"""How near to the threshold a score has to be to be tested again."""

from __future__ import annotations

from collections.abc import Mapping

from pahq_hf.config import Format, PAHQConfig

# The error of a score, relative, below which 99 % stay: docs/precision.md. In BF16 or FP32 products ...
_ERRORS: Mapping[Format, float] = {
    "fp8": 0.10,  # SmolLM2
    "int8": 0.05,  # SmolLM2
    "fp8-e5m2": 0.064,  # these three: the demo checkpoint, where fp8 has .022 and int8 .005
    "mx": 0.035,
    "bf16": 0.003,
}
_ERROR_IN_FP8 = 0.25  # ... and where FP8 weights multiply differences in FP8: SmolLM2, simulated
_TIMES = 2.0  # the error: what can flip is caught with room to spare
_LEAST = 0.2  # one test in two hundred; prompts and models differ more than the finer formats do


def default_margin(config: PAHQConfig) -> float:
    """The margin of a search, in shares of its threshold: by the coarsest of its formats and products.

    Args:
        config: The precision, `auto` resolved.
    """
    formats: set[Format] = {config.format, *config.policy.values()}
    error = max(_ERRORS[fmt] for fmt in formats)
    if config.compute == "fp8" and "fp8" in formats:
        error = max(error, _ERROR_IN_FP8)
    return max(_LEAST, _TIMES * error)
