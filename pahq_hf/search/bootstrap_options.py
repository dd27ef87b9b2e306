"""What is asked of a search with a bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pahq_hf.config import JsonConfig, check_number
from pahq_hf.errors import ConfigError, describe

if TYPE_CHECKING:
    from pahq_hf.search.kind import SearchKind

_MOST = 10_000  # resamples


@dataclass(frozen=True)
class BootstrapConfig(JsonConfig):
    """Searches on resamples of the prompts, beside the one on the prompts as they are.

    Attributes:
        resamples: How many; each is a whole search.
        consensus: Share of the resamples that must keep an edge for it to be in the consensus circuit.
        seed: What the resamples are drawn by; the first of more are those of fewer.
    """

    resamples: int
    consensus: float = 0.5
    seed: int = 0

    def validate(self) -> None:
        """Raise `ConfigError` when a value is out of range."""
        check_number("bootstrap", self.resamples, whole=True)
        check_number("consensus", self.consensus)
        check_number("bootstrap seed", self.seed, whole=True)
        if not 2 <= self.resamples <= _MOST:
            raise ConfigError(
                f"bootstrap is a number of resamples, each a whole search, from 2 to {_MOST:,}; "
                f"got {self.resamples}"
            )
        if not 0 < self.consensus <= 1:
            raise ConfigError(
                f"consensus is a share of the resamples, above 0 and up to 1; got {self.consensus}"
            )

    @classmethod
    def of(cls, value: int | BootstrapConfig) -> BootstrapConfig:
        """From a number of resamples, or what was asked in full.

        Raises:
            ConfigError: If it is neither.
        """
        given: Any = value
        if isinstance(given, BootstrapConfig):
            return given
        if isinstance(given, bool) or not hasattr(given, "__index__"):
            raise ConfigError(
                f"bootstrap takes a number of resamples or a BootstrapConfig; got {describe(given)}"
            )
        return cls(int(given))


def check_search(kind: SearchKind[Any], options: Any) -> None:
    """Check that a search can find other circuits of other prompts.

    Raises:
        ConfigError: If it cannot.
    """
    if kind.command == "attribute":
        raise ConfigError(f"a bootstrap takes a search that chooses its edges; {kind.name} scores them all")
    if getattr(options, "curve", False) is True:
        raise ConfigError(
            "a bootstrap counts how often each edge is kept, and curve keeps all: ask for edges or max_gap"
        )


def check_pairs(examples: int | None) -> None:
    """Check that there are prompts to draw from.

    Args:
        examples: How many pairs the task has; None if that is not known yet.

    Raises:
        ConfigError: If there is one pair.
    """
    if examples is not None and examples < 2:
        raise ConfigError("a bootstrap draws from the task's pairs, and there is but one: give two or more")
