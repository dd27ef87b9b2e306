"""Models, data and runs, good and bad, and commands on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast

from tests.helpers import id_rows, run_main, save_tiny, write_rows
from tests.models import VOCAB, random_task

DRIVER = """
import json, os, sys, tempfile, traceback
from pahq_hf.cli.app import main
cases, target, results = json.load(open(sys.argv[1])), sys.argv[2], {}
for name, arguments in cases.items():
    sys.argv = ["pahq", *arguments]
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    saved = [os.dup(1), os.dup(2)]
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number + 1)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    for number, old in enumerate(saved):
        os.dup2(old, number + 1)
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
    results[name] = [code, *texts]
json.dump(results, open(target, "w"))
"""

WORDS = ["When", "Mary", "John", "Anna", "went", "home", "gave", "a", "book", "to", "and", "the", "went home"]
TASK = random_task(batch=3, seed=31)
GOOD = {"clean": "Mary gave a book to", "corrupted": "Anna gave a book to"}


class Result(NamedTuple):
    """What one command left."""

    code: int
    out: str
    err: str


class World:
    """Models, data and runs, good and bad."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_tiny(root / "model")
        self.words = save_tiny(root / "words")
        tokenizer().save_pretrained(self.words)
        self.ids = write_rows(root / "ids.jsonl", id_rows(TASK))
        self.run = root / "run"
        assert self.discover_in("run") == 0
        self._spoil_models()
        self._spoil_data()
        self._spoil_runs()

    def discover_in(self, name: str, *more: str, model: Path | None = None) -> int:
        """A run in a folder of this world; the exit code."""
        where = ["--task", str(self.ids), "--out", str(self.root / name), "--threshold", "0.05", "--json"]
        return run_main("discover", str(model or self.model), *where, *more)

    def _spoil_models(self) -> None:
        self.norm = self._changed("norm", lambda t: t["model.norm.weight"].fill_(float("nan")))
        token = int(TASK.clean_ids[0, -1])
        self.token = self._changed(
            "token", lambda t: t["model.embed_tokens.weight"][token].fill_(float("nan"))
        )
        self.short = self._copy(self.model, "short")
        raw = (self.short / "model.safetensors").read_bytes()
        (self.short / "model.safetensors").write_bytes(raw[: len(raw) // 2])
        self.less = self._changed("less", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
        self.bare = self._copy(self.model, "bare")
        (self.bare / "model.safetensors").unlink()
        BertConfig().save_pretrained(self.root / "bert")
        (self.root / "novel").mkdir()
        (self.root / "novel" / "config.json").write_text('{"model_type": "novel"}')

    def _spoil_data(self) -> None:
        rows, path = id_rows(TASK), self.root
        write_rows(path / "empty.jsonl", [])
        write_rows(path / "column.jsonl", [{"clean": "Mary", "other": "Anna"}])
        write_rows(path / "lengths.jsonl", [rows[0] | {"corrupted_ids": [1, 2, 3]}])
        write_rows(path / "texts.jsonl", [GOOD, GOOD | {"corrupted": "Anna went to"}])
        write_rows(path / "several.jsonl", [GOOD | {"answer": "Mary John", "distractor": "Anna"}])
        write_rows(path / "answers.jsonl", id_rows(TASK, answers=False))
        write_rows(path / "vocabulary.jsonl", [rows[0] | {"clean_ids": [VOCAB] * 9}])
        write_rows(path / "good.jsonl", [GOOD | {"answer": "Mary", "distractor": "Anna"}])
        (path / "broken.jsonl").write_text('{"clean_ids": [1, 2\n')
        (path / "file").write_text("a regular file")

    def _spoil_runs(self) -> None:
        save_tiny(self.root / "gpt2", "gpt2")
        assert self.discover_in("gpt2_run", model=self.root / "gpt2") == 0
        save_tiny(self.root / "deep", "llama", layers=3)
        save_tiny(self.root / "qwen2", "qwen2")
        half = self._copy(self.run, "half")
        for name in ("circuit.json", "scores.safetensors", "discovery.json", "README.md"):
            (half / name).unlink()
        raw = (half / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (half / "journal.jsonl").write_bytes(b"".join(raw[:5]))
        for name, share in (("circuit.json", 0.5), ("scores.safetensors", 0.5), ("discovery.json", 0.5)):
            damaged = self._copy(self.run, f"damaged_{name.partition('.')[0]}") / name
            damaged.write_bytes(damaged.read_bytes()[: int(share * damaged.stat().st_size)])
        unnamed = self._copy(self.run, "unnamed") / "circuit.json"
        unnamed.write_text(unnamed.read_text().replace("->logits", "->logit"))

    def _copy(self, source: Path, name: str) -> Path:
        shutil.copytree(source, self.root / name)
        return self.root / name

    def _changed(self, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        folder = self._copy(self.model, name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def discover(
        self, model: str = "model", task: str = "ids.jsonl", *more: str, out: str = "out"
    ) -> list[str]:
        """A `discover` command."""
        where = ["--task", str(self.root / task), "--out", str(self.root / out)]
        return ["discover", str(self.root / model), *where, *more]

    def evaluate(
        self, run: str = "run", model: str = "model", *more: str, task: str = "ids.jsonl"
    ) -> list[str]:
        """An `evaluate` command."""
        where = ["--model", str(self.root / model), "--task", str(self.root / task)]
        return ["evaluate", str(self.root / run), *where, *more]

    def path(self, name: str) -> str:
        """Of a file or folder."""
        return str(self.root / name)


def one_process(folder: Path, cases: dict[str, list[str]]) -> dict[str, Result]:
    """What commands leave that run in one process of their own, one after the other.

    With real file descriptors: what libraries write past `sys.stderr` counts too.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, folder / "cases.json", folder / "results.json"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return {name: Result(*found) for name, found in json.loads((folder / "results.json").read_text()).items()}


def in_process(*arguments: str) -> Result:
    """What a command leaves that runs in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_main(*arguments)
    return Result(code, out.getvalue(), err.getvalue())


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, cut at spaces."""
    model = models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


# -- results --------------------------------------------------------------------------------------------


def only_json(result: Result) -> dict[str, Any]:
    """The one JSON object on stdout, with nothing else anywhere."""
    assert result.code == 0, result.err
    # These models do no task: that, and what it makes of their circuits, is said beside.
    said = ("the full model's accuracy on the clean prompts is", "tau ", "pahq: no run in ")
    assert not [line for line in result.err.splitlines() if not line.startswith(said)]
    assert result.out.endswith("\n") and result.out.count("\n") == 1
    document = json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(document, dict)
    return document
