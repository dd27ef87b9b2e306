"""Engines compute the metric of circuits; they know nothing of thresholds."""
