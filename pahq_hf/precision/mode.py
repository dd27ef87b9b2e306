"""How the projections of a model compute at present."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from pahq_hf.precision.anchors import Anchor
from pahq_hf.precision.products import Product

Projection = TypeVar("Projection", bound=Hashable)


class Mode:
    """The present mode of all projections of one model, which share this object.

    Projections compute with low-precision weights unless `full_precision` or `exact_embeddings` says
    otherwise. Besides, some may start from anchors, and some may note down what they compute.

    Attributes:
        is_full: Whether projections compute in FP32.
        has_exact_embeddings: Whether embedding and unembedding do.
        anchors: Where projections start from.
        records: Where projections note down their products.
        streamed: FP32 products that were read for all that comes until their mode ends.
    """

    def __init__(self) -> None:
        self.is_full = False
        self.has_exact_embeddings = False
        self.anchors: dict[Hashable, Anchor] = {}
        self.records: dict[Hashable, list[Anchor]] = {}
        self.streamed: dict[Hashable, Product] = {}

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, every product reads the FP32 weight from the checkpoint and drops it again."""
        before, self.is_full = self.is_full, True
        try:
            yield
        finally:
            self.is_full = before

    @contextmanager
    def exact_embeddings(self) -> Iterator[None]:
        """Inside, embedding and unembedding are FP32 whatever they are kept in."""
        before, self.has_exact_embeddings = self.has_exact_embeddings, True
        try:
            yield
        finally:
            self.has_exact_embeddings = before

    @contextmanager
    def anchored(self, anchors: Mapping[Projection, Anchor]) -> Iterator[None]:
        """Inside, `y = y0 + W_low (x - x0)`: these projections' weights multiply differences only."""
        before, self.anchors = self.anchors, self.anchors | dict(anchors.items())
        try:
            yield
        finally:
            self.anchors = before

    @contextmanager
    def recording(self, projections: Iterable[Projection]) -> Iterator[dict[Projection, list[Anchor]]]:
        """Inside, every product of these projections is noted down with its input."""
        records: dict[Projection, list[Anchor]] = {projection: [] for projection in projections}
        before, self.records = self.records, self.records | dict(records.items())
        try:
            yield records
        finally:
            self.records = before

    @contextmanager
    def streaming(self, products: Mapping[Projection, Product]) -> Iterator[None]:
        """Inside full precision: let these serve for every product of their projections."""
        before, self.streamed = self.streamed, self.streamed | dict(products.items())
        try:
            yield
        finally:
            self.streamed = before
