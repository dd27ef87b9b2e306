"""Circuits made visible."""
