"""Attribution: scores of all edges at once (docs/semantics.md, section 7)."""
