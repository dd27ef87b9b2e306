"""Hugging Face models with PAHQ attention and projections in place of their own."""
