"""Weights in low precision, and FP32 slices of them on demand. The only room that imports torchao."""

from pahq_hf.precision.anchor import Anchor, Origin
from pahq_hf.precision.control import Component, PrecisionControl
from pahq_hf.precision.linear import PAHQLinear, Region
from pahq_hf.precision.low import LowWeight, quantize
from pahq_hf.precision.product import COMPUTE_DTYPES, DifferenceProduct, Product, in_chunks, resolve_compute
from pahq_hf.precision.source import (
    CheckpointSource,
    MemorySource,
    SourceBlock,
    SpillSource,
    WeightSource,
)

__all__ = [
    "COMPUTE_DTYPES",
    "Anchor",
    "CheckpointSource",
    "Component",
    "DifferenceProduct",
    "LowWeight",
    "MemorySource",
    "Origin",
    "PAHQLinear",
    "PrecisionControl",
    "Product",
    "Region",
    "SourceBlock",
    "SpillSource",
    "WeightSource",
    "in_chunks",
    "quantize",
    "resolve_compute",
]
