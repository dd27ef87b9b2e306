"""`Circuit`: the artefact of a discovery, and its files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pahq_hf.circuit import hub
from pahq_hf.circuit.ablation import plain_ablation
from pahq_hf.circuit.confirmation import Confirmation
from pahq_hf.circuit.extras import spared
from pahq_hf.circuit.files import (
    CIRCUIT_NAME,
    DISCOVERY_NAME,
    MEANS_NAME,
    PICTURE_NAME,
    SCORES_NAME,
    make_folder,
    write_atomically,
    write_text,
)
from pahq_hf.circuit.gates import FoundBy
from pahq_hf.circuit.graph import BoolArray, Graph
from pahq_hf.circuit.identity import ModelIdentity
from pahq_hf.circuit.naming import without_place
from pahq_hf.circuit.nodes import ScoredNodes
from pahq_hf.circuit.run_record import RunRecord
from pahq_hf.circuit.scored_edges import ScoredEdges
from pahq_hf.circuit.storage import StoredCircuit, read_circuit, write_circuit
from pahq_hf.circuit.verdict import Verdict
from pahq_hf.errors import HubError, check_place

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Circuit:
    """A subgraph of a model, with the score of every edge.

    Attributes:
        graph: The model's whole graph.
        kept: Edges of the circuit. [readers, writers]
        scores: What removing an edge did to the metric when it was tested, else 0. [readers, writers]
        tested: Edges that were tested, or decided by an estimate. [readers, writers]
        model: What identifies the base model: id, revision, family, width, fingerprint; where it is `local`,
            the id is the name of a folder. A path is cut to that.
        discovery: What ran and what came out (`discovery.json`).
        means: Mean activations, for `PAHQModel.apply` without corrupted prompts (`mean_activations`).
        estimated: Edges whose score is an estimate; None where the search takes none. [readers, writers]
        found_by: Of a search in both directions, which found each edge: 1 noising, 2 denoising, 3 both.
            [readers, writers]
        frequencies: Of a search with a bootstrap, the share of the resamples in which each edge was kept.
            [readers, writers]
        scored_nodes: Of a search at level node, which heads and MLPs are in, and their scores; an edge's
            score is that of the lesser of its ends then.
    """

    graph: Graph
    kept: BoolArray
    scores: NDArray[np.float64]
    tested: BoolArray
    model: dict[str, Any] = field(default_factory=dict)
    discovery: dict[str, Any] = field(default_factory=dict)
    means: dict[str, NDArray[np.float32]] | None = None
    estimated: BoolArray | None = None
    found_by: FoundBy | None = None
    frequencies: NDArray[np.float64] | None = None
    scored_nodes: ScoredNodes | None = None

    def __post_init__(self) -> None:
        self.model = without_place(self.model)

    # -- what is in it ----------------------------------------------------------------------------

    @property
    def scored(self) -> ScoredEdges:
        """The edges alone: what pictures, pages and comparisons take."""
        return ScoredEdges(
            self.graph,
            self.kept,
            self.scores,
            self.tested,
            self.estimated,
            self.found_by,
            self.frequencies,
            self.scored_nodes,
        )

    @property
    def identity(self) -> ModelIdentity:
        """What identifies the base model."""
        return ModelIdentity.from_json(self.model)

    @property
    def record(self) -> RunRecord:
        """What ran and what came out.

        Raises:
            CircuitError: If `discovery` is damaged.
        """
        return RunRecord.from_json(self.discovery)

    @property
    def plain_ablation(self) -> str | None:
        """What removed edges carry in `PAHQModel.apply` without corrupted prompts; None if nothing can."""
        return plain_ablation(self.record.arguments.ablation, self.means)

    @property
    def edge_count(self) -> int:
        """Number of kept edges."""
        return self.scored.edge_count

    @property
    def size(self) -> tuple[int, int]:
        """How many edges are in, and of how many; of a search at level node, how many heads and MLPs."""
        nodes = self.scored_nodes
        if nodes is None:
            return self.edge_count, self.graph.edge_count
        return nodes.count, len(nodes.kept) - 1

    @cached_property
    def live(self) -> BoolArray:
        """Kept edges on some path from `input` to `logits`. [readers, writers]"""
        return self.scored.live

    @property
    def verdict(self) -> Verdict | None:
        """Whether the circuit does what the model does, as its run measured; None if none did."""
        return self.record.verdict

    @property
    def confirmation(self) -> Confirmation | None:
        """The metric by the search and by the hooks engine; None where its run compared no such two."""
        return self.record.confirmation

    @property
    def verified(self) -> bool | None:
        """Whether the hooks engine confirmed the search's result; None where that is not known."""
        found = self.confirmation
        return None if found is None else found.verified

    @property
    def edges(self) -> list[tuple[str, float]]:
        """Kept edges by name with their scores, in model order."""
        return self.scored.edges

    @property
    def gates(self) -> dict[str, str]:
        """`AND`, `OR` or `ADDER` by the names of kept edges; empty unless a search in both directions ran."""
        return self.scored.gates

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that a kept edge touches, in model order, `logits` last."""
        return self.scored.nodes

    @property
    def node_scores(self) -> dict[str, float]:
        """Scores of all heads and MLPs by name, of a search at level node; else empty."""
        nodes = self.scored_nodes
        tested = [] if nodes is None else np.flatnonzero(nodes.tested).tolist()
        return {self.graph.writers[w].name: float(nodes.scores[w]) for w in tested} if nodes else {}

    def to_networkx(self) -> nx.MultiDiGraph:
        """The circuit as a directed multigraph of nodes (`ScoredEdges.to_networkx`)."""
        return self.scored.to_networkx()

    def __repr__(self) -> str:
        """Model and size on one line."""
        name = self.identity.base_model or "model"
        return f"Circuit({name!r}, {self.edge_count:,} of {self.graph.edge_count:,} edges)"

    def _repr_html_(self) -> str:
        """The circuit in a notebook: its picture and the facts of its run."""
        from pahq_hf.circuit.render.notebook import circuit_html

        return circuit_html(self)

    # -- files ------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, overwrite_card: bool = False) -> None:
        """Write circuit.json, scores.safetensors, discovery.json, means.safetensors, a picture and a card.

        Args:
            folder: Created if needed.
            overwrite_card: Replace a README.md that was written or changed by hand, too.

        Raises:
            RunError: If the folder cannot be written.
        """
        folder = make_folder(folder)
        write_circuit(self._stored, folder)
        card = folder / hub.CARD_NAME
        self._illustrate(folder, card=overwrite_card or card.is_dir() or not hub.is_edited(card))

    def complete(self, folder: str | Path) -> None:
        """Make the picture and the card again where a folder that the circuit was saved in lacks them.

        Args:
            folder: The folder.
        """
        folder = Path(folder)
        has_picture, has_card = (os.path.lexists(folder / name) for name in (PICTURE_NAME, hub.CARD_NAME))
        if not (has_picture and has_card):
            self._illustrate(folder, picture=not has_picture, card=not has_card)

    def _illustrate(self, folder: Path, *, picture: bool = True, card: bool = True, **where: Any) -> None:
        """The picture, and the card that shows it; neither can lose the results."""
        if picture:
            with spared(folder / PICTURE_NAME):
                from pahq_hf.circuit.render.picture import draw

                write_atomically(folder / PICTURE_NAME, lambda path: draw(self.scored, path, "png"))
        if card:
            with spared(folder / hub.CARD_NAME):
                from pahq_hf.circuit.card import render_card

                text = render_card(self, has_picture=(folder / PICTURE_NAME).is_file(), **where)
                write_text(folder / hub.CARD_NAME, hub.signed(text))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        subfolder: str | None = None,
        overwrite_card: bool = False,
    ) -> str:
        """Publish the circuit on the Hugging Face Hub, as one commit.

        Args:
            repo_id: `owner/name`; the repository is created if need be.
            private: Whether a new repository is private.
            token: A token; the stored one by default.
            revision: Branch to commit to.
            create_pr: Open a pull request instead.
            commit_message: Title of the commit.
            subfolder: Folder inside the repository, to keep several circuits in one.
            overwrite_card: Replace a card that was edited on the Hub, too.

        Returns:
            Where the commit can be seen.

        Raises:
            HubError: If the Hub refuses.
        """

        def write(folder: Path) -> None:
            write_circuit(self._stored, folder)
            self._illustrate(folder, repo_id=repo_id, subfolder=subfolder)

        return hub.push(
            write,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Circuit of {self.edge_count:,} edges (pahq_hf)",
            subfolder=subfolder,
            overwrite_card=overwrite_card,
        )

    def to_json(self) -> dict[str, Any]:
        """The EAP-IG / MIB style document: config, nodes, kept edges."""
        return self._stored.to_json()

    @property
    def _stored(self) -> StoredCircuit:
        return StoredCircuit(self.scored, self.model, self.discovery, self.means)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Circuit:
        """Read a circuit written by `save_pretrained`, from a folder or from the Hub.

        Args:
            name: Its folder, or the id of a Hub repository.
            revision: Branch, tag or commit on the Hub.
            subfolder: Folder inside the repository or folder.
            token: Hub token; the stored one by default.
            cache_dir: Where downloads go.
            force_download: Download again what is in the cache.
            local_files_only: Do not reach the Hub.

        Returns:
            The circuit.

        Raises:
            CircuitError: If a file is missing, damaged, or of a newer format.
            ConfigError: If `name` is no name.
            HubError: If the repository cannot be read.
        """
        check_place(name)
        folder = Path(name)
        if not os.path.exists(folder) and _HUB_ID.fullmatch(str(name)):
            place = hub.HubPlace(
                str(name), revision, subfolder, token, cache_dir, force_download, local_files_only
            )
            try:
                folder = hub.pull(place, (CIRCUIT_NAME, SCORES_NAME), (DISCOVERY_NAME, MEANS_NAME))
            except HubError as error:
                raise HubError(f"there is no folder {name} here, and on the Hub: {error}") from error
        elif subfolder is not None:
            folder = folder / subfolder
        stored = read_circuit(folder)
        edges = stored.edges
        return cls(
            edges.graph,
            edges.kept,
            edges.scores,
            edges.tested,
            stored.model,
            stored.discovery,
            stored.means,
            edges.estimated,
            edges.found_by,
            edges.frequencies,
            edges.scored_nodes,
        )
