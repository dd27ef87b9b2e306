"""Weights in low precision, and FP32 slices of them on demand. The only room that imports torchao."""

from pahq_hf.precision.control import Component, PrecisionControl
from pahq_hf.precision.linear import PAHQLinear, Region
from pahq_hf.precision.low import LowWeight, quantize
from pahq_hf.precision.product import Product, in_chunks
from pahq_hf.precision.source import (
    CheckpointSource,
    MemorySource,
    SourceBlock,
    SpillSource,
    WeightSource,
)

__all__ = [
    "CheckpointSource",
    "Component",
    "LowWeight",
    "MemorySource",
    "PAHQLinear",
    "PrecisionControl",
    "Product",
    "Region",
    "SourceBlock",
    "SpillSource",
    "WeightSource",
    "in_chunks",
    "quantize",
]
