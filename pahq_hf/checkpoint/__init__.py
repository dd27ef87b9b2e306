"""Checkpoints: finding, loading, streaming and telling them apart; the demo that comes with the package."""
