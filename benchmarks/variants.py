"""Precision regimes with their options, as benchmarks name them."""

from __future__ import annotations

from dataclasses import dataclass

from pahq_hf.config import PAHQConfig


@dataclass(frozen=True)
class Variant:
    """A row: how weights are kept and used.

    Attributes:
        name: As given.
        pahq: The regime.
        margin: Of the second look.
        once: Anchor to the clean run only.
    """

    name: str
    pahq: PAHQConfig
    margin: float | None = None
    once: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read `pahq:fp8:margin=0.2:once`; `tables` quantises embedding and unembedding too."""
        regime, *options = text.split(":")
        values: dict[str, str | bool] = {}
        once, margin = False, None
        for option in options:
            key, _, value = option.partition("=")
            if option == "once":
                once = True
            elif option == "tables":
                values["quantize_embeddings"] = True
            elif key == "margin":
                margin = float(value)
            elif value:
                values[key] = value
            else:
                values["format"] = option
        return cls(text, PAHQConfig.from_dict({"regime": regime, **values}), margin, once)
