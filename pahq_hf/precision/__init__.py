"""Weights in low precision, and FP32 slices of them on demand. The only room that imports torchao."""
