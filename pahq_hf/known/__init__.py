"""Models whose circuit is known by construction: test beds for anything that finds circuits."""

from pahq_hf.known.models import KNOWN_MODELS, KnownModel, load_known_model

__all__ = ["KNOWN_MODELS", "KnownModel", "load_known_model"]
