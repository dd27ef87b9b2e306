"""Attribution: scores of all edges at once (docs/semantics.md, section 7)."""

from pahq_hf.attribution.scoring import edge_scores
from pahq_hf.attribution.selection import edges_from, top_edges

__all__ = ["edge_scores", "edges_from", "top_edges"]
