"""The hooks engine: the whole model with forward hooks, for any edge set."""
