"""Fingerprints of earlier versions: runs and circuits that carry one stay usable."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pahq_hf.circuit.json_reader import OWN_BYTES, parse_json, read_regular
from pahq_hf.modeling.originals import original_tensors
from pahq_hf.modeling.patched_model import PatchedModel

logger = logging.getLogger(__name__)
LEGACY_NOTE = (
    "{} carries a fingerprint of an earlier version, which fits this model but does not tell weights apart "
    "whose values are in another order"
)
_ROWS = 4096  # of a weight that are summed at once
_LEGACY = re.compile(r"[0-9a-f]{32}")
_RECORDS = ("journal.jsonl", "answers.jsonl", "discovery.json", "sweep.json")  # hold a run's header


def is_legacy(mark: object) -> bool:
    """Whether a fingerprint is of an earlier version, which did not see the order within a row."""
    return isinstance(mark, str) and _LEGACY.fullmatch(mark) is not None


def legacy_fingerprint(model_type: str, weights: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """The fingerprint as earlier versions made it: each row enters as the sum of its FP32 bit patterns.

    Args:
        model_type: The model's family.
        weights: Names, shapes and values, in the model's order.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(model_type.encode())
    for name, shape, values in weights:
        digest.update(repr((name, shape)).encode())
        for rows in values.split(_ROWS):
            bits = rows.to(torch.float32).contiguous().view(torch.int32)
            digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def recorded_fingerprint(folder: Path) -> str | None:
    """The fingerprint in the header of a run or sweep; None where none can be read.

    What is damaged is for its own reader to say.
    """
    for name in _RECORDS:
        try:
            raw = read_regular(folder / name, OWN_BYTES)
            document = parse_json(raw.partition(b"\n")[0] if name.endswith("l") else raw)
            header = document if name.endswith("l") else document["header"]
            return str(header["model"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def legacy_fingerprint_of(model: PatchedModel) -> str:
    """The fingerprint that earlier versions gave a model."""
    reads = original_tensors(model)
    buffers = {name for name, _ in model.hf.named_buffers()}
    names = [name for name in model.original_shapes if name not in buffers]
    weights = ((name, model.original_shapes[name], reads[name]()) for name in names)
    return legacy_fingerprint(model.hf.config.model_type, weights)


def known_fingerprint(folder: Path, model: PatchedModel, mark: str) -> str:
    """The fingerprint by which a run's folder knows a model: one of an earlier version stays what it was.

    Args:
        folder: The folder of a run or sweep.
        model: The model.
        mark: Its fingerprint.

    Returns:
        The earlier version's, where the folder has that and it is this model's; else the model's.
    """
    found = recorded_fingerprint(folder)
    if found is None or not is_legacy(found) or legacy_fingerprint_of(model) != found:
        return mark
    logger.warning("%s", LEGACY_NOTE.format(folder))
    return found
