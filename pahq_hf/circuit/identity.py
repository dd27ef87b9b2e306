"""`ModelIdentity`: what tells the model of a circuit from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pahq_hf.circuit.naming import hub_id_of, with_base_model, without_place
from pahq_hf.circuit.sections import Section


@dataclass(frozen=True, kw_only=True)
class ModelIdentity(Section):
    """What identifies a base model, stored with its circuits (`cfg` in circuit.json).

    Attributes:
        base_model: Its id on the Hub, or the name of its folder without the path.
        revision: Its commit on the Hub.
        model_type: Its family, as transformers calls it.
        d_model: Width of its residual stream.
        fingerprint: Of its weights.
        license: As its card on the Hub has it.
        local: Whether `base_model` is the name of a folder.
    """

    base_model: str | None = None
    revision: str | None = None
    model_type: str | None = None
    d_model: int | None = None
    fingerprint: str | None = None
    license: str | None = None
    local: bool | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModelIdentity:
        """Read a circuit's `cfg`; of a path that earlier versions kept only the folder's name is read."""
        return super().from_json(without_place(document))

    @property
    def hub_id(self) -> str | None:
        """The model's id on the Hub; None where it has none that is known."""
        return hub_id_of(self.to_json())

    def with_base_model(self, hub_id: str) -> ModelIdentity:
        """The same model, of which somebody says what it is on the Hub.

        Raises:
            ConfigError: If that can be no model's id.
        """
        return self.from_json(with_base_model(self.to_json(), hub_id))
