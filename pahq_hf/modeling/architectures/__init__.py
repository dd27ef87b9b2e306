"""Where each family keeps its layers, norms and projections: one row a family."""
