"""Weights in low precision, and FP32 slices of them on demand. The only room that imports torchao."""

from pahq_hf.precision.anchor import Anchor, Origin
from pahq_hf.precision.control import Component, PrecisionControl
from pahq_hf.precision.flags import exact_products, product_flags
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.low import LowWeight, quantize, stored_bytes
from pahq_hf.precision.mode import Mode
from pahq_hf.precision.policy import layouts
from pahq_hf.precision.product import COMPUTE_DTYPES, DifferenceProduct, Product, in_chunks, resolve_compute
from pahq_hf.precision.region import Layout, Region
from pahq_hf.precision.source import (
    CheckpointSource,
    SourceBlock,
    SpillSource,
    WeightSource,
    stored_name,
)
from pahq_hf.precision.table import PAHQTable, exact_block, exact_rows, patch_embedding
from pahq_hf.precision.weight_cache import WeightCache
from pahq_hf.precision.weights import WeightMatrix

__all__ = [
    "COMPUTE_DTYPES",
    "Anchor",
    "CheckpointSource",
    "Component",
    "DifferenceProduct",
    "Layout",
    "LowWeight",
    "Mode",
    "Origin",
    "PAHQLinear",
    "PAHQTable",
    "PrecisionControl",
    "Product",
    "Region",
    "SourceBlock",
    "SpillSource",
    "WeightCache",
    "WeightMatrix",
    "WeightSource",
    "exact_block",
    "exact_products",
    "exact_rows",
    "in_chunks",
    "layouts",
    "patch_embedding",
    "product_flags",
    "quantize",
    "resolve_compute",
    "stored_bytes",
    "stored_name",
]
