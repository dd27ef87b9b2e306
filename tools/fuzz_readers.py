"""Give readers damaged files for a while, and tell what ends in no error of the package.

    python tools/fuzz_readers.py --seconds 600 --seed 1
    python tools/fuzz_readers.py --only circuit --keep /tmp/found

Each round takes good files, changes values or bytes, and reads them. An error of the package is what there
should be, and so is a result; anything else, or more than ten seconds of work, is kept with its traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import numpy as np

from pahq_hf.checkpoint.demo_path import demo_path
from pahq_hf.checkpoint.load import load_config, load_tokenizer
from pahq_hf.circuit.circuit import Circuit
from pahq_hf.circuit.graph import Graph, GraphSpec
from pahq_hf.circuit.interchange import read_circuit_file, to_mib
from pahq_hf.cli.tables import layer_table, run_table
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import PAHQError
from pahq_hf.modeling.architectures.lookup import graph_spec
from pahq_hf.search.journal import Chain, Journal
from pahq_hf.search.settings import RunSettings
from pahq_hf.search.shared_answers import EngineCache
from pahq_hf.search.sweep_result import Sweep
from pahq_hf.tasks.loading import load_task

SLOW = 10.0  # seconds of work
SPEC = GraphSpec(2, 4, 2)
VALUES: list[str] = [
    *(
        "null",
        "true",
        "0",
        "-1",
        "1.5",
        "NaN",
        "-Infinity",
        "1e400",
        "9" * 25,
        "9" * 400,
        "1000000000",
        "[]",
        "{}",
    ),
    *('""', '"x"', '"12"', '"\\ud800"', '"\\u0000\\u001b[2J\\u202e"', f'"{"x" * 20_000}"', "[1, [2, [3]]]"),
    *(
        "[" * 60 + "]" * 60,
        "[" * 2000 + "]" * 2000,
        '{"a": {"b": null}}',
        '"a0.h0->logits"',
        "[null, -1, {}]",
    ),
]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: What it reads.
        files: Good files by name.
        read: Reads a folder with such files.
    """

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], Any]


def circuit() -> Circuit:
    """A small circuit with facts of all kinds."""
    graph, numbers = Graph(SPEC), np.random.default_rng(3)
    kept = graph.all_edges & (numbers.random(graph.all_edges.shape) < 0.5)
    facts = {
        "method": "acdc",
        "header": {"model": "xxh3-0", "acdc": {"threshold": 0.1}},
        "arguments": {"threshold": 0.1, "metric": "kl", "ablation": "corrupted", "screen": "eap:0.5"},
        "precision": {"regime": "pahq", "format": "fp8"},
        "task": {"name": "ioi", "examples": 3, "total": 9},
        "edges": {"total": 5, "tested": 4, "untested": 1, "kept": 2, "live": 2},
        "metric": {
            "name": "kl",
            "full": 0.0,
            "empty": 2.0,
            "final": 0.1,
            "final_recomputed": 0.1,
            "fp32": 0.1,
        },
        "seconds": {"search": 1.0, "total": 1.5},
        "versions": {"torch": "2"},
        "peak_memory": {"rss": 5},
        "apply": {"ablation": "mean", "accuracy": {"full": 1.0}},
        "estimates": {"tests": 3, "estimated": 2, "audited": 1, "wrong": 0, "at_most": 0.1},
        "bootstrap": {"resamples": 2, "seed": 0, "between": 0.5, "consensus": 3},
        "directions": {"noising": {"metric": {"name": "kl", "final": 0.1}}},
    }
    scores = np.where(kept, numbers.random(kept.shape), 0.0)
    return Circuit(graph, kept, scores, kept.copy(), {"base_model": "me/model", "d_model": 32}, facts)


def saved(save: Callable[[Path], Any], *without: str) -> dict[str, bytes]:
    """What is in a folder that something was saved in."""
    with tempfile.TemporaryDirectory() as name:
        save(Path(name))
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(name).iterdir())
            if path.suffix not in without
        }


def show(folder: Path) -> None:
    """Read a circuit as `pahq show` does."""
    found = Circuit.from_pretrained(folder)
    json.dumps([found.to_json(), found.record.to_json()])
    run_table(found), layer_table(found)


def read_journal(folder: Path) -> None:
    RunSettings.of_run(folder)
    Journal.read(folder)


def targets() -> list[Target]:
    """All readers, with good files for each."""
    demo = demo_path()
    chain = Chain()
    steps = [{"model": "m", "task": "t", "acdc": {"threshold": 0.1}, "settings": {"threads": 1}}]
    steps += [
        {"reader": n, "searched": True, "kept": [0], "scores": {"0": 0.5}, "metric": 0.1} for n in range(3)
    ]
    journal = b"".join(chain.seal(step) for step in steps)
    rows = [{"clean_ids": [1, 2, 3], "corrupted_ids": [1, 4, 3], "answer_ids": [5]} for _ in range(3)]
    texts = [{"clean": "When Mary", "corrupted": "When John", "answer": " Mary", "distractor": " John"}]
    tokenizer = load_tokenizer(str(demo))
    config = {name: (demo / name).read_bytes() for name in ("config.json", "generation_config.json")}
    sweep = {"rows": [{"threshold": 0.1}], "totals": {"thresholds": 1}, "header": {"acdc": {}}}
    return [
        Target("config", config, lambda f: Graph(graph_spec(load_config(str(f))))),
        Target("tokenizer", saved(lambda f: tokenizer.save_pretrained(f)), lambda f: load_tokenizer(str(f))),
        Target("wrapper", saved(PAHQConfig().save_pretrained), PAHQConfig.from_pretrained),
        Target("circuit", saved(circuit().save_pretrained, ".png", ".md"), show),
        Target(
            "import",
            {"g.json": json.dumps(to_mib(circuit())).encode()},
            lambda f: read_circuit_file(f / "g.json"),
        ),
        Target(
            "edges",
            {"e.json": json.dumps([["input->a0.h0<q>", 0.5], ["m1->logits", 0.1]]).encode()},
            lambda f: read_circuit_file(f / "e.json", SPEC),
        ),
        Target("journal", {"journal.jsonl": journal}, read_journal),
        Target(
            "answers",
            {"answers.jsonl": journal},
            lambda f: EngineCache.open(f / "answers.jsonl", dict(steps[0])),
        ),
        Target("sweep", {"sweep.json": json.dumps(sweep).encode()}, Sweep.from_pretrained),
        Target(
            "ids",
            {"d.jsonl": "\n".join(map(json.dumps, rows)).encode()},
            lambda f: load_task(str(f / "d.jsonl"), None),
        ),
        Target(
            "texts",
            {"d.json": json.dumps(texts).encode()},
            lambda f: load_task(str(f / "d.json"), tokenizer),
        ),
        Target(
            "table",
            {"d.csv": b"clean,corrupted,answer,distractor\nWhen Mary,When John, Mary, John\n"},
            lambda f: load_task(str(f / "d.csv"), tokenizer),
        ),
    ]


# -- damage -----------------------------------------------------------------------------------------------


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON document, as what it is in and its key there."""
    found: list[tuple[Any, Any]] = []
    waiting = [node]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            waiting.append(each[key])
    return found


def other_values(raw: bytes, draw: random.Random) -> bytes:
    """A JSON document, or one of its lines, with other values in some places."""
    lines = raw.split(b"\n")
    number = draw.randrange(len(lines))
    try:
        document = json.loads(raw)
        lines, number = [b""], 0
    except ValueError:
        try:
            document = json.loads(lines[number])
        except ValueError:
            return other_bytes(raw, draw)
    texts: dict[str, str] = {}
    for count in range(draw.choice((1, 1, 1, 2, 4))):
        every = places(document)
        if not every:
            break
        inside, key = draw.choice(every)
        kind = draw.random()
        if kind < 0.1:
            del inside[key]
        elif kind < 0.2 and isinstance(inside, dict):
            inside[draw.choice(("cfg", "edges", "\ud800", "x" * 300, "", "a0.h0->m1"))] = inside.pop(key)
        else:
            texts[f"@{count}@"] = draw.choice(VALUES)
            inside[key] = f"@{count}@"
    text = json.dumps(document)
    for mark, value in texts.items():
        text = text.replace(f'"{mark}"', value)
    lines[number] = text.encode()
    return b"\n".join(lines)


def other_bytes(raw: bytes, draw: random.Random) -> bytes:
    """A file with some bytes changed, cut out, doubled or put in."""
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(len(changed) + 1)
        some = draw.randrange(1, 50)
        kind = draw.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at : at + some]
        elif kind == 2:
            changed[at:at] = changed[at : at + some]
        elif kind == 3:
            changed[at:at] = draw.choice((b"{", b"]", b'"', b",", b"\0", b"\xff", b"\n", b"\\", b"9" * some))
        else:
            del changed[at:]
    return bytes(changed)


def damage(folder: Path, target: Target, draw: random.Random) -> None:
    """Fill a folder with the files of a target, of which one or two are damaged."""
    for name, raw in target.files.items():
        (folder / name).write_bytes(raw)
    for name in draw.sample(sorted(target.files), k=min(len(target.files), draw.choice((1, 1, 2)))):
        raw = target.files[name]
        is_text = Path(name).suffix in (".json", ".jsonl")
        change = other_values if is_text and draw.random() < 0.7 else other_bytes
        (folder / name).write_bytes(change(raw, draw))
        facts = folder / "discovery.json"  # whose checksums would tell of most damage before it is read
        if name != "discovery.json" and facts.exists() and draw.random() < 0.7:
            facts.write_text(json.dumps({**json.loads(target.files["discovery.json"]), "checksums": {}}))


# -- the rounds -------------------------------------------------------------------------------------------


def one_round(target: Target, draw: random.Random, keep: Path, found: Counter[str]) -> str:
    """Read damaged files once. Returns how it ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "f"
        folder.mkdir()
        damage(folder, target, draw)
        copy = Path(name) / "copy"  # readers may mend files
        shutil.copytree(folder, copy)
        started = time.process_time()
        try:
            target.read(folder)
            ended = "read"
        except PAHQError as error:
            ended = "refused"
            if "\n" in str(error):
                ended = "several lines"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            ended = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
            told = traceback.format_exc()
        else:
            told = ""
        if ended in ("refused", "several lines"):
            told = ""
        if time.process_time() - started > SLOW:
            ended = f"slow: {ended}"
        if ended not in ("read", "refused"):
            found[f"{target.name}: {ended}"] += 1
            place = keep / f"{target.name}-{len(found):03}"
            if found[f"{target.name}: {ended}"] == 1 and not place.exists():
                shutil.copytree(copy, place)
                (place / "traceback.txt").write_text(told, errors="backslashreplace")
        return ended


def main() -> int:
    """Run for some seconds; 1 if anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="How long.")
    parser.add_argument("--seed", type=int, default=0, help="What is drawn.")
    parser.add_argument("--only", help="The reader of this name.")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="Where what was found goes.")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    every = [target for target in targets() if options.only in (None, target.name)]
    if not every:
        parser.error(f"there is no reader {options.only!r}")
    draw, found, ends = random.Random(options.seed), Counter[str](), Counter[str]()
    until = time.monotonic() + options.seconds
    while time.monotonic() < until:
        target = draw.choice(every)
        ended = one_round(target, draw, options.keep, found)
        ends[f"{target.name} {ended if ended in ('read', 'refused') else 'WRONG'}"] += 1
    for name, count in sorted(ends.items()):
        print(f"{count:8,}  {name}")
    for name, count in found.most_common():
        print(f"{count:8,}  {name}")
    print(f"{sum(ends.values()):,} rounds, {len(found)} kinds of wrong ends")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
