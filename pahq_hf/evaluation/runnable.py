"""`RunnableModel`: a patched model that circuits of it run in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from pahq_hf.capture.mean_activations import Means
from pahq_hf.capture.preparation import Prepared, resolved
from pahq_hf.checkpoint.wrapped import WrappedModel
from pahq_hf.circuit.ablation import notice
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import Graph
from pahq_hf.config import EngineConfig
from pahq_hf.engine.hooks.apply import applied, substitute_of
from pahq_hf.engine.memory_plan import MemoryReport, report
from pahq_hf.errors import AblationWarning, ConfigError, describe
from pahq_hf.evaluation.fits import fit
from pahq_hf.modeling.guard import evaluating
from pahq_hf.modeling.originals import unpatched
from pahq_hf.precision.device_memory import memory_for
from pahq_hf.precision.flags import exact_products
from pahq_hf.precision.products import COMPUTE_DTYPES

RunnableT = TypeVar("RunnableT", bound="RunnableModel")


class RunnableModel(WrappedModel):
    """A patched model, in the precision it was prepared for.

    Args:
        model: The model inside.
        name: The name by which it was loaded.
        prepared: The model, patched and checked.
    """

    def __init__(self, model: PreTrainedModel, name: str, prepared: Prepared) -> None:
        super().__init__(model, name, prepared.config, prepared.identity)
        self.patched = prepared.patched
        self._asked, self._guard = prepared.asked, prepared.guard
        self._settled = self.patched.device

    @property
    def graph(self) -> Graph:
        """The residual-stream graph."""
        return self.patched.graph

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Inside, the model computes what its circuits are about: in eval mode, with the weights it had."""
        self._settle()
        self._guard.check(self.base_model)
        with evaluating(self.base_model):
            yield

    @contextmanager
    def _at_work(self, what: str) -> Iterator[None]:
        """The same; memory that runs out is an error of ours, which names the work."""
        with memory_for(what, self.patched.device), self._guarded():
            yield

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What `pickle`, `torch.save` and other processes ask.

        Raises:
            ConfigError: Always: open files, hooks and classes that are made at load stay in a process.
        """
        raise ConfigError(
            "a PAHQModel cannot be pickled: keep its configuration with save_pretrained, and load it with "
            "PAHQModel.from_pretrained where it is wanted, in every process"
        )

    def __copy__(self) -> RunnableModel:
        """A copy that shares everything, as of any module."""
        twin = self._blank()
        twin.__setstate__(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> RunnableModel:
        """A copy that shares nothing but the checkpoint.

        Raises:
            ConfigError: While a circuit is applied: the copy would be restricted to it for ever.
        """
        twin = memo[id(self)] = self._blank()
        twin.__setstate__(deepcopy(self.__dict__, memo))
        return twin

    def _blank(self) -> RunnableModel:
        """Another one with nothing in it yet."""
        if self.patched.is_applied:
            raise ConfigError("a circuit is applied to this model: leave that block before you copy it")
        return type(self).__new__(type(self))

    def unload(self) -> PreTrainedModel:
        """The model as it was before it was wrapped, as PEFT's `unload` gives it back.

        Returns:
            Another model of the same class, in full precision and with weights of its own; this one can be
            used on.

        Raises:
            ConfigError: While a circuit is applied.
            UnsupportedModelError: If the original weights cannot be told any more.
        """
        if self.patched.is_applied:
            raise ConfigError("a circuit is applied to this model: leave that block before you unload it")
        return unpatched(self.patched)

    # -- precision --------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> RunnableModel:
        """What `to`, `cuda` and `cpu` do; products then run in what suits the new device."""
        super()._apply(fn, recurse)
        self._settle()
        return self

    def _settle(self) -> None:
        """See to it that weights which were moved, however they were, are used where they are now.

        What was packed for the old device goes, and `compute="auto"` means what it means on the new one; what
        was asked for by name stays.
        """
        device, precision = self.patched.device, self.patched.precision
        if device == self._settled:
            return
        active = precision.active
        precision.deactivate()
        precision.release()
        if self._asked.compute == "auto":
            self.pahq_config = resolved(self._asked, device)
        named = self.pahq_config.compute
        assert named != "auto"  # it is resolved
        self.patched.compute_in(COMPUTE_DTYPES[named])
        precision.activate(*active)
        self._settled = device

    def activate(self, *components: str) -> bool:
        """Compute exactly these components (`a3.h1`, `m0`) in FP32. Returns whether anything changed."""
        return self.patched.precision.activate(*components)

    def deactivate(self) -> None:
        """Free the FP32 weights of the active components."""
        self.patched.precision.deactivate()

    def memory_report(
        self, *, n: int = 16, length: int = 16, engine: EngineConfig | None = None
    ) -> MemoryReport:
        """Bytes of this model by part and format, and of a run on it.

        Args:
            n: Prompt pairs of the run.
            length: Tokens of a prompt.
            engine: Its limits.

        Returns:
            The report; `print(report.to_dict())`, or `pahq info` for a table.
        """
        limits = engine or EngineConfig()
        return report(
            self.patched,
            self.pahq_config,
            n=n,
            length=length,
            budget=limits.memory_budget,
            stored=limits.activation_store,
        )

    # -- circuits ---------------------------------------------------------------------------------

    def apply(  # type: ignore[override]
        self: RunnableT,
        circuit: Circuit,
        *,
        corrupted: Tensor | Mapping[str, Any] | None = None,
        corrupted_mask: Tensor | None = None,
        means: Means | None = None,
        exact: bool = True,
        any_weights: bool = False,
    ) -> AbstractContextManager[RunnableT]:
        """Run the model as a circuit: inside, forward, generate and pipelines use nothing but its edges.

        Removed edges carry what the corrupted prompts write. Without them they carry what is kept with the
        circuit: the ablation it was found under if that needs no prompts (`mean`, `mean-corrupted`, `zero`),
        else means of its corrupted prompts. How well it answers so was measured when it was found; an
        `AblationWarning` tells when this is another ablation than it was found under, or when it is poor.

        Corrupted prompts run along as the circuit's partner, with a cache of their own where it has one.
        Beyond their end it reads the tokens that the circuit reads: what is generated continues both.

        Args:
            circuit: A circuit of this model.
            corrupted: Token ids of corrupted prompts, laid out as the prompts are, or what a tokenizer
                returns for them (`tokenizer(prompts, return_tensors="pt")`), with its mask. [batch, pos]
            corrupted_mask: Which of them are real; the prompts' own mask by default. [batch, pos]
            means: Other mean activations (`pahq_hf.capture.mean_activations.means_of`).
            exact: Compute in FP32; False computes at the model's precision, faster.
            any_weights: Accept a circuit that was found on other weights of the same shape.

        Returns:
            A context that gives this model.

        Raises:
            ConfigError: If `circuit` is none, if one is applied already, if nothing says what removed edges
                carry, or the corrupted prompts are no token ids.
            TaskError: If a token id is outside the vocabulary.
            CircuitError: If the circuit, or the means, are of another model.
        """
        if not isinstance(circuit, Circuit):
            if not callable(circuit):  # type: ignore[unreachable]
                raise ConfigError(
                    f"apply takes a Circuit (Circuit.from_pretrained(...)); got {describe(circuit)}"
                )
            return super().apply(circuit)  # `nn.Module.apply`, which calls a function on every module
        return self._applied(circuit, corrupted, corrupted_mask, means, exact, any_weights)

    @contextmanager
    def _applied(
        self: RunnableT,
        circuit: Circuit,
        corrupted: Tensor | Mapping[str, Any] | None,
        corrupted_mask: Tensor | None,
        means: Means | None,
        exact: bool,
        any_weights: bool,
    ) -> Iterator[RunnableT]:
        circuit = fit(circuit, self.patched, self.identity, any_weights=any_weights)
        with self._guarded(), exact_products():
            substitute, ablation = substitute_of(self.patched, circuit, corrupted, corrupted_mask, means)
            text = notice(circuit.record, ablation)
            if text is not None:
                warnings.warn(text, AblationWarning, stacklevel=3)  # of the caller's `with`
            with applied(self.patched, circuit.kept, substitute, exact=exact):
                yield self
