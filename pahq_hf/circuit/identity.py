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
        revision: The model's commit on the Hub.
        base_model: The model's id on the Hub, or the name of its folder without the path.
        local: Whether `base_model` is the name of a folder.
        model_type: The model's family, as transformers calls it.
        d_model: Width of the residual stream.
        fingerprint: Hash of the weights.
        license: License, as the model's card on the Hub has it.
        adapter: Name of the adapter that is merged into its weights, as `base_model` is one.
        adapter_revision: The adapter's commit on the Hub.
    """

    revision: str | None = None
    base_model: str | None = None
    local: bool | None = None
    model_type: str | None = None
    d_model: int | None = None
    fingerprint: str | None = None
    license: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModelIdentity:
        """Read a circuit's `cfg`; of a path that earlier versions kept only the folder's name is read."""
        return super().from_json(without_place(document))

    def to_json(self) -> dict[str, Any]:
        """The model in a circuit's `cfg`; that there is no revision is said too."""
        return {"revision": self.revision, **super().to_json()}

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
