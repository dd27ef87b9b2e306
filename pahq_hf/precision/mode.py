"""How the projections of a model compute at present."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from pahq_hf.precision.anchors import Anchor
from pahq_hf.precision.holding import Holding
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
        holding: What whoever uses the model now holds of its weights.
    """

    def __init__(self) -> None:
        self.holding = Holding()
        self.is_full = False
        self.has_exact_embeddings = False
        self.anchors: dict[Hashable, Anchor] = {}
        self.records: dict[Hashable, list[Anchor]] = {}
        self.streamed: dict[Hashable, Product] = {}

    def full_precision(self) -> AbstractContextManager[None]:
        """Inside, every product reads the FP32 weight from the checkpoint and drops it again."""
        return self._with(is_full=True)

    def exact_embeddings(self) -> AbstractContextManager[None]:
        """Inside, embedding and unembedding are FP32 whatever they are kept in."""
        return self._with(has_exact_embeddings=True)

    def anchored(self, anchors: Mapping[Projection, Anchor]) -> AbstractContextManager[None]:
        """Inside, `y = y0 + W_low (x - x0)`: these projections' weights multiply differences only."""
        return self._with(anchors=self.anchors | dict(anchors.items()))

    @contextmanager
    def recording(self, projections: Iterable[Projection]) -> Iterator[dict[Projection, list[Anchor]]]:
        """Inside, every product of these projections is noted down with its input."""
        records: dict[Projection, list[Anchor]] = {projection: [] for projection in projections}
        with self._with(records=self.records | dict(records.items())):
            yield records

    def streaming(self, products: Mapping[Projection, Product]) -> AbstractContextManager[None]:
        """Inside full precision: let these serve for every product of their projections."""
        return self._with(streamed=self.streamed | dict(products.items()))

    def using(self, holding: Holding) -> AbstractContextManager[None]:
        """Inside, projections compute with what someone holds, in low precision, whatever the mode is now."""
        plain = Mode()
        return self._with(**(vars(plain) | {"holding": holding}))

    @contextmanager
    def _with(self, **attributes: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in attributes}
        vars(self).update(attributes)
        try:
            yield
        finally:
            vars(self).update(before)
