"""How engines share a model: each has it as it left it, inside its calls and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from pahq_hf.engine.regime_rule import RegimeRule
from pahq_hf.modeling.patched_model import PatchedModel
from pahq_hf.precision.holding import Holding

P = ParamSpec("P")
T = TypeVar("T")


class Session:
    """An engine's use of a model that others use too.

    What is raised to FP32, decoded and packed for an engine belongs to the engine, which holds it from call
    to call; inside a call the model computes with that, whatever mode it was in. Between calls it is as if
    there were no engine.

    Args:
        model: The patched model.
        rule: How low precision is used.

    Attributes:
        holding: What the engine holds of the weights.
    """

    def __init__(self, model: PatchedModel, rule: RegimeRule) -> None:
        self.holding = Holding()
        self._model = model
        self._rule = rule

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the model is the engine's.

        Raises:
            ConfigError: If a circuit is applied to the model.
        """
        with self._model.used_by(self.holding), self._rule.always(self._model):
            yield

    def end(self) -> None:
        """Hold nothing any more; another call begins anew."""
        self.holding.clear()


class HasSession(Protocol):
    """An engine."""

    @property
    def session(self) -> Session:
        """How the engine uses the model."""


EngineT = TypeVar("EngineT", bound=HasSession)


def in_session(method: Callable[Concatenate[EngineT, P], T]) -> Callable[Concatenate[EngineT, P], T]:
    """Let a method of an engine compute with the model as the engine has it."""

    @wraps(method)
    def within(self: EngineT, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.session():
            return method(self, *args, **kwargs)

    return within
