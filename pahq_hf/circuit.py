"""`Circuit`: the artefact of a discovery, and its files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pahq_hf import hub
from pahq_hf.confirmation import Confirmation
from pahq_hf.errors import CircuitError, ConfigError, HubError, RunError, check_place
from pahq_hf.extras import spared
from pahq_hf.files import (
    CIRCUIT_NAME,
    JOURNAL_NAME,
    SWEEP_PREFIX,
    Write,
    output_path,
    text_writer,
    write_atomically,
    write_text,
    write_together,
)
from pahq_hf.graph import BoolArray, Graph, GraphSpec
from pahq_hf.identity import ModelIdentity
from pahq_hf.naming import without_place
from pahq_hf.run_record import RunRecord
from pahq_hf.scored_edges import ScoredEdges
from pahq_hf.verdict import Verdict

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
SCORES_NAME = "scores.safetensors"
DISCOVERY_NAME = "discovery.json"
MEANS_NAME = "means.safetensors"
PICTURE_NAME = "circuit.png"
_MAX_BYTES = 1 << 30  # of a file
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SECTIONS = ("header", "arguments", "precision", "task", "edges", "metric", "seconds")


@dataclass
class Circuit:
    """A subgraph of a model, with the score of every edge.

    Attributes:
        graph: The model's whole graph.
        kept: Edges of the circuit. [readers, writers]
        scores: What removing an edge did to the metric when it was tested, else 0. [readers, writers]
        tested: Edges that were tested. [readers, writers]
        model: What identifies the base model: id, revision, family, width, fingerprint; where it is `local`,
            the id is the name of a folder. A path is cut to that.
        discovery: What ran and what came out (`discovery.json`).
        means: Mean activations, for `PAHQModel.apply` without corrupted prompts (`pahq_hf.means`).
    """

    graph: Graph
    kept: BoolArray
    scores: NDArray[np.float64]
    tested: BoolArray
    model: dict[str, Any] = field(default_factory=dict)
    discovery: dict[str, Any] = field(default_factory=dict)
    means: dict[str, NDArray[np.float32]] | None = None

    def __post_init__(self) -> None:
        self.model = without_place(self.model)

    # -- what is in it ----------------------------------------------------------------------------

    @property
    def scored(self) -> ScoredEdges:
        """Its edges alone: what pictures, pages and comparisons take."""
        return ScoredEdges(self.graph, self.kept, self.scores, self.tested)

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
    def edge_count(self) -> int:
        """Number of kept edges."""
        return self.scored.edge_count

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
        """Its metric by its search and by the hooks engine; None where its run compared no such two."""
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
    def nodes(self) -> list[str]:
        """Names of the nodes that a kept edge touches, in model order, `logits` last."""
        return self.scored.nodes

    def to_networkx(self) -> nx.MultiDiGraph:
        """The circuit as a directed multigraph of nodes (`ScoredEdges.to_networkx`)."""
        return self.scored.to_networkx()

    def __repr__(self) -> str:
        """Model and size on one line."""
        name = self.model.get("base_model", "model")
        return f"Circuit({name!r}, {self.edge_count:,} of {self.graph.edge_count:,} edges)"

    def _repr_html_(self) -> str:
        """The circuit in a notebook: its picture and the facts of its run."""
        from pahq_hf.render.notebook import circuit_html

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
        self._write(folder)
        card = folder / hub.CARD_NAME
        self._illustrate(folder, card=overwrite_card or card.is_dir() or not hub.is_edited(card))

    def _write(self, folder: Path) -> None:
        """The results; nothing is replaced before all of them are on disk."""
        checksums: dict[str, str] = {}

        def tensors(name: str, write: Write) -> dict[Path, Write]:
            def write_and_sum(path: Path) -> None:
                write(path)
                checksums[name] = _checksum(path)

            return {folder / name: write_and_sum}

        def write_facts(path: Path) -> None:  # after what it has the checksums of
            text_writer(_json(self.discovery | {"checksums": checksums}, indent=2))(path)

        means = self.means
        files = tensors(SCORES_NAME, self._write_scores)
        if means is not None:
            files |= tensors(MEANS_NAME, lambda path: _save_tensors(means, path))
        files[folder / DISCOVERY_NAME] = write_facts
        # Last: its presence says that the folder is complete.
        files[folder / CIRCUIT_NAME] = text_writer(_json(self.to_json(), indent=1))
        write_together(files)

    def _illustrate(self, folder: Path, *, card: bool = True, **where: Any) -> None:
        """The picture, and the card that shows it; neither can lose the results."""
        with spared(folder / PICTURE_NAME):
            from pahq_hf.render.picture import draw

            write_atomically(folder / PICTURE_NAME, lambda path: draw(self, path, "png"))
        if card:
            with spared(folder / hub.CARD_NAME):
                from pahq_hf.card import render_card

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
            self._write(folder)
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
        spec = self.graph.spec
        return {
            "cfg": {
                "format_version": FORMAT_VERSION,
                "n_layers": spec.layers,
                "n_heads": spec.heads,
                "n_key_value_heads": spec.kv_groups,
                "split_kv_groups": spec.split_kv_groups,
                "has_mlps": spec.mlps,
                "parallel_attn_mlp": spec.parallel,
                "coupled_heads": spec.coupled,
                **self.model,
            },
            "nodes": {name: {"in_graph": True} for name in self.nodes},
            "edges": {name: {"score": score, "in_graph": True} for name, score in self.edges},
        }

    def _write_scores(self, path: Path) -> None:
        tensors: dict[str, NDArray[Any]] = {
            "score": self.scores,
            "in_graph": self.kept.astype(np.uint8),
            "tested": self.tested.astype(np.uint8),
            "exists": self.graph.all_edges.astype(np.uint8),
        }
        layout = {
            "axes": "readers, writers",
            "readers": [reader.name for reader in self.graph.readers],
            "writers": [writer.name for writer in self.graph.writers],
            "checksums": DISCOVERY_NAME,  # where this file's is
        }
        # One key: safetensors writes several in a random order, and files could not be compared.
        notes = {"layout": json.dumps(layout)}
        _save_tensors(tensors, path, notes)

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
        if not folder.exists() and _HUB_ID.fullmatch(str(name)):
            place = hub.HubPlace(
                str(name), revision, subfolder, token, cache_dir, force_download, local_files_only
            )
            try:
                folder = hub.pull(place, (CIRCUIT_NAME, SCORES_NAME), (DISCOVERY_NAME, MEANS_NAME))
            except HubError as error:
                raise HubError(f"there is no folder {name} here, and on the Hub: {error}") from error
        elif subfolder is not None:
            folder = folder / subfolder
        return cls._read(folder)

    @classmethod
    def _read(cls, folder: Path) -> Circuit:
        _refuse_sweep(folder)
        document = read_json(folder / CIRCUIT_NAME)
        cfg, edges = document.get("cfg"), document.get("edges")
        if not isinstance(cfg, dict) or not isinstance(edges, dict):
            raise CircuitError(f"{folder / CIRCUIT_NAME} has no 'cfg' and 'edges'; it is not a circuit")
        spec = _spec_from(cfg, folder)
        discovery = _read_discovery(folder)
        tensors = _read_scores(folder / SCORES_NAME, spec)
        graph = Graph(spec)
        kept = graph.no_edges()
        for name, facts in edges.items():
            if not isinstance(facts, dict):
                raise CircuitError(f"{folder / CIRCUIT_NAME}: edge {name[:80]!r} has no facts")
            place = graph.parse_edge(name)
            kept[place] |= bool(facts.get("in_graph", True))
            if "score" in facts and not _is_number(facts["score"], tensors["score"][place]):
                raise CircuitError(
                    f"{folder}: {SCORES_NAME} and {CIRCUIT_NAME} disagree on the score of {name}"
                )
        if not np.array_equal(tensors["in_graph"].astype(bool), kept):
            raise CircuitError(f"{folder}: {SCORES_NAME} and {CIRCUIT_NAME} disagree on the kept edges")
        return cls(
            graph=graph,
            kept=kept,
            scores=tensors["score"].astype(np.float64),
            tested=tensors["tested"].astype(bool),
            model={key: value for key, value in cfg.items() if key not in _SPEC_KEYS},
            discovery=discovery,
            means=_load_tensors(folder / MEANS_NAME) if (folder / MEANS_NAME).exists() else None,
        )


_MODEL_KEYS = {"base_model", "revision", "model_type", "d_model", "fingerprint", "license", "local"}
_SPEC_KEYS = {
    "format_version": FORMAT_VERSION,
    "n_layers": None,
    "n_heads": None,
    "n_key_value_heads": None,
    "split_kv_groups": False,
    "has_mlps": True,
    "parallel_attn_mlp": False,
    "coupled_heads": False,
}


def _refuse_sweep(folder: Path) -> None:
    """A sweep's folder holds circuits and is none.

    Raises:
        CircuitError: Naming them, if it is one.
    """
    if os.path.exists(folder / CIRCUIT_NAME):
        return
    found = sorted(path.parent.name for path in folder.glob(f"{SWEEP_PREFIX}*/{CIRCUIT_NAME}"))
    if found:
        raise CircuitError(
            f"{folder} holds a sweep, not one circuit: give the folder of a threshold in it, one of "
            f"{', '.join(found)}"
        )


def _spec_from(cfg: dict[str, Any], folder: Path) -> GraphSpec:
    unknown = sorted(set(cfg) - set(_SPEC_KEYS) - _MODEL_KEYS)
    if unknown:
        logger.warning("%s: unknown keys in cfg are ignored: %s", folder, ", ".join(k[:40] for k in unknown))
    version = cfg.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CircuitError(
            f"{folder} has circuit format {version}; this version reads up to {FORMAT_VERSION}"
        )
    try:
        return GraphSpec(
            layers=int(cfg["n_layers"]),
            heads=int(cfg["n_heads"]),
            kv_groups=int(cfg.get("n_key_value_heads", cfg["n_heads"])),
            mlps=bool(cfg.get("has_mlps", True)),
            parallel=bool(cfg.get("parallel_attn_mlp", False)),
            split_kv_groups=bool(cfg.get("split_kv_groups", False)),
            coupled=bool(cfg.get("coupled_heads", False)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise CircuitError(f"{folder / CIRCUIT_NAME}: unusable cfg ({error!r})") from error


def _read_scores(path: Path, spec: GraphSpec) -> dict[str, NDArray[Any]]:
    """The tensors of a circuit, checked against the shape of its graph before that is built."""
    tensors = _load_tensors(path)
    missing = [name for name in ("score", "tested", "in_graph") if name not in tensors]
    if missing:
        raise CircuitError(f"cannot read {path}: it has no {missing[0]!r}")
    found = {name: tensors[name] for name in ("score", "tested", "in_graph")}
    mlp = int(spec.mlps)
    shape = (
        1 + spec.layers * (spec.heads + 2 * spec.kv_readers + mlp),
        1 + spec.layers * (spec.heads + mlp),
    )
    for name, tensor in found.items():
        if tensor.shape != shape:
            raise CircuitError(
                f"{path}: {name} has shape {tensor.shape}; the graph in {CIRCUIT_NAME} has {shape}"
            )
    return found


def _load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CircuitError(f"{path} is larger than any circuit; not read")
        tensors: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CircuitError(f"cannot read {path}: {error}") from error
    return tensors


def _save_tensors(tensors: dict[str, NDArray[Any]], path: Path, notes: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata=notes)
    except SafetensorError as error:
        raise RunError(f"cannot write tensors to {path.parent}: {error}") from error


def _read_discovery(folder: Path) -> dict[str, Any]:
    """What ran, if that is known; the tensors beside it are checked by the checksums in it."""
    path = folder / DISCOVERY_NAME
    facts = read_json(path) if path.exists() else {}
    for name in (*_SECTIONS, "checksums"):
        if not isinstance(facts.get(name, {}), dict):
            raise CircuitError(f"{path} is damaged: {name!r} does not hold an object")
    if facts.get("verdict") is not None:
        try:
            Verdict.from_dict(facts["verdict"])
        except CircuitError as error:
            raise CircuitError(f"{path} is damaged: {error}") from error
    checksums = facts.pop("checksums", None)
    if checksums is None and path.exists() and _is_listed(folder / SCORES_NAME):
        raise CircuitError(
            f"{path} is damaged: the checksums of scores and means that were in it are gone; {_mend(folder)}"
        )
    for name in (SCORES_NAME, MEANS_NAME):
        if name not in (checksums or {}):
            continue
        if not (folder / name).exists():
            raise CircuitError(f"{folder / name} is missing: {DISCOVERY_NAME} lists it; {_mend(folder)}")
        if _checksum(folder / name) != checksums[name]:
            raise CircuitError(f"{folder / name} is damaged: its checksum is not that in {DISCOVERY_NAME}")
    return facts


def _mend(folder: Path) -> str:
    """What to do about a run's damaged file."""
    if os.path.exists(folder / JOURNAL_NAME):
        return f"put it back, or remove {CIRCUIT_NAME} and --resume to make it again from {JOURNAL_NAME}"
    return "put it back, or make the circuit again in another folder"


def _is_listed(path: Path) -> bool:
    """Whether scores were written together with a list of checksums; earlier versions had none."""
    try:
        with safe_open(path, framework="numpy") as file:
            layout = json.loads((file.metadata() or {}).get("layout", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError):
        return False  # whoever reads them says what is wrong
    return isinstance(layout, dict) and layout.get("checksums") == DISCOVERY_NAME


def _is_number(found: object, value: float) -> bool:
    return isinstance(found, (int, float)) and (found == value or (np.isnan(found) and np.isnan(value)))


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _json(document: dict[str, Any], indent: int) -> str:
    return json.dumps(document, indent=indent) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        CircuitError: If it is missing, too large, damaged, or no object.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CircuitError(f"{path} is larger than any circuit; not read")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CircuitError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CircuitError(f"{path} does not hold a JSON object")
    return document


def refuse_overwrite(folder: Path, advice: str = "choose another folder") -> Path:
    """`folder`, unless it holds a run.

    Args:
        folder: Where a run is to be written.
        advice: What to do if there is one.

    Raises:
        RunError: If there is one.
    """
    for name in (CIRCUIT_NAME, JOURNAL_NAME, DISCOVERY_NAME):
        if os.path.exists(folder / name) and not (name == DISCOVERY_NAME and _died_while_saving(folder)):
            raise RunError(f"{folder} holds a run already ({name}); {advice}")
    return folder


def _died_while_saving(folder: Path) -> bool:
    """Whether facts without a circuit are those of an attribution, which can only begin anew."""
    try:
        method = read_json(folder / DISCOVERY_NAME).get("method", "acdc")
    except CircuitError:
        return False
    return bool(method != "acdc")


def make_folder(folder: str | Path) -> Path:
    """Create an output folder.

    Raises:
        RunError: If it cannot be created or written.
    """
    folder = output_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the output folder {folder}: {error.strerror}") from error
    return folder
