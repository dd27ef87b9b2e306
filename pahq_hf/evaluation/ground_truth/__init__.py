"""Circuits that are known: published ones, and those of models built by hand."""
