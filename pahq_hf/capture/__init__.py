"""Clean and corrupted runs of a model, and what stands in for removed edges."""
