"""`BootstrapFacts`: how far a search finds the same circuit when its prompts are drawn again."""

from __future__ import annotations

from dataclasses import dataclass

from pahq_hf.circuit.sections import Section


def of_resamples(share: float, *, at_least: bool = False) -> str:
    """A share of the resamples in words.

    Args:
        share: From 0 to 1.
        at_least: Whether it may be more.
    """
    if share >= 1:
        return "all resamples"
    return f"{100 * share:.4g} % of the resamples{' or more' if at_least else ''}"


@dataclass(frozen=True, kw_only=True)
class BootstrapFacts(Section):
    """What the searches on resamples of the prompts came to.

    Attributes:
        resamples: How many there were.
        seed: What they were drawn by.
        between: Mean Jaccard index of the circuits of two resamples.
        with_circuit: Mean Jaccard index of a resample's circuit and that of the prompts as they are.
        share: Share of the resamples that keep an edge of the consensus.
        consensus: Edges of the consensus.
        faithfulness: Of the consensus, on the prompts as they are.
        always: Edges that every resample kept.
        ever: Edges that some resample kept.
        unconfirmed: Resamples whose circuit the hooks engine did not confirm.
        consensus_verified: Whether it confirmed the consensus; None where nothing was compared.
        seconds: What the searches on the resamples took.
        evaluations: Values of the metric that they computed.
        unparted: Resamples whose masks were learned too little to mean much: what is alike then is chance.
        units: `node`, where the above counts whole nodes and not edges.
    """

    resamples: int | None = None
    seed: int | None = None
    between: float | None = None
    with_circuit: float | None = None
    share: float | None = None
    consensus: int | None = None
    faithfulness: float | None = None
    always: int | None = None
    ever: int | None = None
    unconfirmed: int | None = None
    consensus_verified: bool | None = None
    seconds: float | None = None
    evaluations: int | None = None
    unparted: int | None = None
    units: str | None = None

    @property
    def doubt(self) -> str | None:
        """What a user is told, on one line, of circuits that the hooks engine did not confirm; else None."""
        parts = []
        if self.unconfirmed:
            parts.append(f"{self.unconfirmed:,} of {self.resamples or self.unconfirmed:,} resamples")
        if self.consensus_verified is False:
            parts.append("the consensus")
        told = " and ".join(parts)
        return f"the result is kept, but not verified: {told}; please report it" if parts else None

    @property
    def texts(self) -> dict[str, str]:
        """What people are told, by name; nothing without a bootstrap."""
        found: dict[str, str] = {}
        if self.resamples is None:
            return found
        of = "nodes" if self.units == "node" else "edges"
        if self.between is not None and self.with_circuit is not None:
            found["stability"] = (
                f"Jaccard {self.between:.3g} between two of {self.resamples:,} resamples, "
                f"{self.with_circuit:.3g} of one with the circuit of all prompts"
            )
        if self.unparted:
            found["masks"] = (
                f"did not part in {self.unparted:,} of {self.resamples:,} resamples, whose edges are mostly "
                "chance; raise --steps"
            )
        if self.unconfirmed:
            found["resamples not verified"] = f"{self.unconfirmed:,} of {self.resamples:,}"
        if self.always is not None and self.ever is not None:
            found[f"{of} of resamples"] = f"{self.always:,} in all, {self.ever:,} in any"
        if self.consensus is not None and self.share is not None:
            value = "undefined" if self.faithfulness is None else f"{self.faithfulness:.4g}"
            share = of_resamples(self.share, at_least=True)
            found["consensus"] = f"{self.consensus:,} {of}, in {share}: faithfulness {value}"
        if self.seconds is not None:
            found["seconds of resamples"] = f"{self.seconds:.6g}"
        return found
