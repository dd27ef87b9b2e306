"""Checks that a circuit belongs to a model."""

from __future__ import annotations

import logging

from pahq_hf.checkpoint.legacy_fingerprint import LEGACY_NOTE, is_legacy, legacy_fingerprint_of
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.fitting import fitted
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.errors import CircuitError
from pahq_hf.modeling.patched_model import PatchedModel

logger = logging.getLogger(__name__)


def fit(
    circuit: Circuit, model: PatchedModel, identity: ModelIdentity, *, any_weights: bool = False
) -> Circuit:
    """A circuit as a circuit of a model: in its graph, if that only divides keys and values otherwise.

    Args:
        circuit: The circuit.
        model: The patched model.
        identity: What identifies the model.
        any_weights: Accept a model of the same shape with other weights, such as a fine-tuned one.

    Returns:
        The circuit in the model's graph.

    Raises:
        CircuitError: If it belongs to another model.
    """
    found = fitted(circuit, model.spec)
    check_fits(found, model, identity, any_weights=any_weights)
    return found


def check_shape(circuit: Circuit, model: PatchedModel) -> None:
    """Check that a circuit's graph is a model's.

    Args:
        circuit: The circuit.
        model: The patched model.

    Raises:
        CircuitError: Naming the first difference.
    """
    ours, theirs = model.spec, circuit.graph.spec
    for name in ("layers", "heads", "kv_groups", "mlps", "parallel", "coupled", "split_kv_groups"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        if mine != its:
            raise CircuitError(
                f"this circuit is of another model: it has {name}={its}, the model has {name}={mine}"
            )
    identity = circuit.identity
    family, mine = identity.model_type, model.hf.config.model_type
    if family is not None and family != mine:
        raise CircuitError(f"this circuit is of another model: its family is {family}, the model's is {mine}")
    width, mine = identity.d_model, model.hf.config.hidden_size
    if width is not None and width != mine:
        raise CircuitError(f"this circuit is of another model: its d_model is {width}, the model's is {mine}")


def check_fits(
    circuit: Circuit, model: PatchedModel, identity: ModelIdentity, *, any_weights: bool = False
) -> None:
    """Check that a circuit belongs to a model.

    Args:
        circuit: The circuit.
        model: The patched model.
        identity: What identifies the model.
        any_weights: Accept a model of the same shape with other weights, such as a fine-tuned one.

    Raises:
        CircuitError: Naming the first difference.
    """
    check_shape(circuit, model)
    its, mine = circuit.identity.fingerprint, identity.fingerprint
    if any_weights or its is None or its == mine:
        return
    if is_legacy(its) and its == legacy_fingerprint_of(model):
        logger.warning("%s", LEGACY_NOTE.format("this circuit"))
    else:
        found = circuit.identity
        name, revision = (str(text)[:80] for text in (found.base_model, found.revision))
        if found.adapter is not None:
            name += f" with the adapter {found.adapter[:80]}"
        raise CircuitError(
            f"this circuit was found on other weights ({name}, revision {revision}): load those, or allow "
            "any weights of this shape (--any-weights, any_weights=True)"
        )
