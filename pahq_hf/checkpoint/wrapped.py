"""`WrappedModel`: a Hugging Face model with something around it, used like the model itself."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn
from transformers import PreTrainedModel

from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.naming import shared_name
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import ConfigError

if TYPE_CHECKING:
    from pahq_hf.circuit.hub import PushOptions


class WrappedModel(nn.Module):
    """A thin wrapper, as PEFT's: attribute access falls through to the model inside.

    Args:
        model: The model.
        name: The name by which it was loaded.
        config: How it is patched.
        identity: What identifies it, stored with circuits.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, config: PAHQConfig, identity: ModelIdentity
    ) -> None:
        super().__init__()
        self.base_model = model
        self.pahq_config = config
        self.identity = identity
        self._loaded_from = name

    def __getattr__(self, name: str) -> Any:
        """Fall through to the wrapped model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: no wrapped model to ask
                raise
            return getattr(super().__getattr__("base_model"), name)

    @property
    def _wrapped(self) -> Any:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        return self._wrapped(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's generate."""
        return self._wrapped.generate(*args, **kwargs)

    def can_generate(self) -> bool:
        """Whether the wrapped model can generate.

        A pipeline asks this before it looks whether it knows the name of the model's class, and lists all
        names it knows if it does not. Those of wrappers are in a table, PEFT's among them.
        """
        pipelines: Any = sys.modules.get("transformers.pipelines.base")
        table = {} if pipelines is None else vars(pipelines).get("SUPPORTED_PEFT_TASKS", {})
        known = table.get("text-generation")
        if isinstance(known, list) and type(self).__name__ not in known:
            known.append(type(self).__name__)
        return bool(self._wrapped.can_generate())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pahq_config.json`: the base model's name and how it is patched, no weights.

        As with PEFT, `PAHQModel.from_pretrained` of that folder loads the base model again; where that is a
        folder too, its path is in the file, so share it with `push_to_hub`, which writes none.

        Args:
            folder: Created if needed.

        Raises:
            RunError: If it cannot be written.
        """
        self._reloading().save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Publish `pahq_config.json` on the Hub.

        Args:
            repo_id: `owner/name`, or a name for the token's owner.
            **options: As for `PAHQConfig.push_to_hub`.

        Returns:
            Where the commit can be seen.

        Raises:
            ConfigError: If the base model is a local folder, and nobody said what it is on the Hub.
            HubError: If the Hub refuses.
        """
        if self.identity.adapter is not None:
            config = self._reloading()
            if os.path.exists(self._loaded_from):
                raise ConfigError(
                    f"nobody else has the adapter's folder, {self.identity.adapter}: publish it first"
                )
            return config.push_to_hub(repo_id, **options)
        if self.identity.local or self.identity.base_model == "unknown":
            raise ConfigError(
                f"nobody else has the base model's folder, {self.identity.base_model}: say which model "
                "it is on the Hub, base_model='owner/name'"
            )
        name, revision = self.identity.base_model, self.identity.revision
        return replace(self.pahq_config, base_model=name, revision=revision).push_to_hub(repo_id, **options)

    def _reloading(self) -> PAHQConfig:
        """The configuration that reloads this model on this machine."""
        name, own = self._loaded_from, self.identity
        revision = own.revision if own.adapter is None else own.adapter_revision
        if own.adapter is not None and shared_name(name)["base_model"] != own.adapter:
            raise ConfigError(
                f"this model has the adapter {own.adapter!r} merged, which was given with the model: save "
                "the adapter by PEFT, and load the model by the adapter's name"
            )
        if name != "demo" and os.path.exists(name):
            name, revision = os.path.abspath(name), None
        return replace(self.pahq_config, base_model=name, revision=revision)
