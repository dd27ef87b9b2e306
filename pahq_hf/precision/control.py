"""Which component computes in FP32 right now (docs/semantics.md, section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from pahq_hf.errors import ConfigError
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.region import Region
from pahq_hf.precision.source import Staging

Component = str
Part = tuple[PAHQLinear, Region]


class PrecisionControl:
    """Raises one component at a time to FP32, or all of them.

    Args:
        parts: For every component (`a0.h1`, `m0`, ...) the weight blocks it owns, in the model's order.
        linears: Every projection of the model.
    """

    def __init__(self, parts: Mapping[Component, Sequence[Part]], linears: Sequence[PAHQLinear]) -> None:
        self._parts = parts
        self._linears = linears
        self._names = list(parts)
        self._order = {name: place for place, name in enumerate(self._names)}
        self._active: frozenset[Component] = frozenset()
        self.is_full = False  # inside `full_precision`
        self._staging = Staging()
        for linear in linears:
            linear.staging = self._staging

    @property
    def parts(self) -> Mapping[Component, Sequence[Part]]:
        """The weight blocks of every component."""
        return self._parts

    @property
    def active(self) -> frozenset[Component]:
        """Components that compute in FP32 now."""
        return self._active

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
        if wanted == self._active:
            return False
        self.deactivate()
        self._active = wanted
        try:
            for name in wanted:
                for linear, region in self._parts[name]:
                    linear.raise_region(region)
        except BaseException:
            self.deactivate()
            raise
        self._prefetch_next()
        return True

    def _prefetch_next(self) -> None:
        """Read ahead what the search turns to next: the component before, in the order of the model."""
        self._staging.forget()
        places = [self._order[name] for name in self._active]
        if places and min(places) > 0:
            for linear, region in self._parts[self._names[min(places) - 1]]:
                linear.prefetch(region)

    def deactivate(self) -> None:
        """Free the FP32 weights of the active components."""
        for name in self._active:
            for linear, _ in self._parts[name]:
                linear.drop_raised()
        self._active = frozenset()

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, every linear weight is FP32, streamed from the checkpoint product by product."""
        before, self.is_full = self.is_full, True
        try:
            with ExitStack() as stack:
                for linear in self._linears:
                    stack.enter_context(linear.full_precision())
                yield
        finally:
            self.is_full = before
            if not before:
                self.free_staging()

    def keep_full(self, limit: int) -> None:
        """Let FP32 weights that are read from the checkpoint stay for another use, within some bytes."""
        self._staging.kept.allow(limit)

    def free_staging(self) -> None:
        """Give back the memory through which FP32 weights pass."""
        self._staging.free()

    @property
    def nbytes(self) -> int:
        """Resident bytes of all linear weights now."""
        return sum(linear.nbytes for linear in self._linears)

    @property
    def nbytes_fp32(self) -> int:
        """Bytes the same weights take in FP32."""
        return sum(4 * linear.in_features * linear.out_features for linear in self._linears)
