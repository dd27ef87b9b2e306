"""Anchors: inputs of a linear map whose exact outputs are known (docs/semantics.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Origin:
    """The anchor x0 of an input, shared by the linear maps that read it.

    Args:
        x: x0. [..., in]
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._last: tuple[Tensor, Tensor] | None = None

    def difference(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x - x0`, computed once for all maps that are given the same x. [..., in]"""
        if self._last is None or self._last[0] is not x or self._last[1].dtype != dtype:
            self._last = (x, (x - self.x).to(dtype))
        return self._last[1]


@dataclass(frozen=True)
class Anchor:
    """An input of a linear map and its exact output (docs/semantics.md, section 5).

    Attributes:
        origin: x0. [..., in]
        y: W x0 + b; None to get the difference from it. [..., out]
    """

    origin: Origin
    y: Tensor | None

    @property
    def x(self) -> Tensor:
        """x0. [..., in]"""
        return self.origin.x
