"""The sparse engine: only what an edge can change is computed."""
