"""Which component computes in FP32 right now (docs/semantics.md, section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from pahq_hf.errors import ConfigError
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.mode import Mode
from pahq_hf.precision.weight_block import WeightBlock
from pahq_hf.precision.weights import Shared

Component = str
Part = tuple[PAHQLinear, WeightBlock]


class ActiveComponents:
    """Raises one component at a time to FP32, or all of them, for whoever uses the model now.

    Args:
        parts: For every component (`a0.h1`, `m0`, ...) the weight blocks it owns, in the model's order.
        linears: Every projection of the model.
    """

    def __init__(self, parts: Mapping[Component, Sequence[Part]], linears: Sequence[PAHQLinear]) -> None:
        self._parts = parts
        self._linears = linears
        self._names = list(parts)
        self._order = {name: place for place, name in enumerate(self._names)}
        self.shared = Shared()
        for linear in linears:
            linear.shared = self.shared

    @property
    def parts(self) -> Mapping[Component, Sequence[Part]]:
        """The weight blocks of every component."""
        return self._parts

    @property
    def mode(self) -> Mode:
        """How the projections compute at present."""
        return self.shared.mode

    @property
    def active(self) -> frozenset[Component]:
        """Components that compute in FP32 now."""
        return self.mode.holding.active

    @property
    def is_low(self) -> bool:
        """Whether any weight is kept in low precision."""
        return any(linear.low is not None for linear in self._linears)

    def activate(self, *components: Component) -> bool:
        """Make exactly these components FP32; their weights are read from the checkpoint.

        Args:
            components: Node names.

        Returns:
            Whether anything changed.

        Raises:
            ConfigError: If a name is not a component of this model.
            ModelLoadError: If the checkpoint is gone or changed; then no component is active.
        """
        for name in components:
            if name not in self._parts:
                raise ConfigError(f"{name!r} is not a component of this model; they are named like a0.h1, m0")
        wanted = frozenset(components)
        if wanted == self.active:
            return False
        self.deactivate()
        self.mode.holding.active = wanted
        try:
            for name in wanted:
                for linear, block in self._parts[name]:
                    linear.raise_block(block)
        except BaseException:
            self.deactivate()
            raise
        self._prefetch_next()
        return True

    def _prefetch_next(self) -> None:
        """Read ahead what the search turns to next: the component before, in the order of the model."""
        self.shared.staging.forget()
        places = [self._order[name] for name in self.active]
        if places and min(places) > 0:
            for linear, block in self._parts[self._names[min(places) - 1]]:
                linear.prefetch(block)

    def deactivate(self) -> None:
        """Free the FP32 weights of the active components."""
        for name in self.active:
            for linear, _ in self._parts[name]:
                linear.drop_raised()
        self.mode.holding.active = frozenset()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, every linear weight is FP32, streamed from the checkpoint product by product."""
        try:
            with self.mode.full_precision():
                yield
        finally:
            if not self.mode.is_full:
                self.free_staging()

    def streamed(self, linears: Sequence[PAHQLinear]) -> AbstractContextManager[None]:
        """In full precision: read the FP32 weights of some projections once for all products inside."""
        low = [linear for linear in linears if linear.low is not None] if self.mode.is_full else []
        products = {linear: linear.full_product(linear.whole, linear.bias) for linear in low}
        return self.mode.streaming(products)

    def allow(self, *, held: int, full: int) -> None:
        """Say how many bytes weights may take that stay for another use.

        Args:
            held: Decoded and packed ones.
            full: FP32 ones that are read from the checkpoint.
        """
        self.shared.cache.allow(held)
        self.shared.full.allow(full)

    def release(self) -> None:
        """Free the weights that stayed for another use."""
        self.mode.holding.release()

    def free_staging(self) -> None:
        """Give back the memory through which FP32 weights pass."""
        self.shared.staging.free()

    @property
    def nbytes(self) -> int:
        """Resident bytes of all linear weights now."""
        return sum(linear.nbytes for linear in self._linears)

    @property
    def nbytes_fp32(self) -> int:
        """Bytes the same weights take in FP32."""
        return sum(4 * linear.in_features * linear.out_features for linear in self._linears)
