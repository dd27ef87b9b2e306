"""The command line: what it prints, and that every mistake is one line on stderr and exit code 2.

Most commands run in one process of their own, one after the other, with real file descriptors: what
libraries write past `sys.stderr` counts too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from pahq_hf import Circuit, load_task
from pahq_hf.precision.products import resolve_compute
from tests.helpers import files_of, id_rows, named, referee, run_main, save_tiny, write_rows
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
        write_rows(path / "column.jsonl", [{"clean": "Mary", "corrupt": "Anna"}])
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
        where = ["--task", str(self.root / task), "--out", str(self.root / out)]
        return ["discover", str(self.root / model), *where, *more]

    def evaluate(
        self, run: str = "run", model: str = "model", *more: str, task: str = "ids.jsonl"
    ) -> list[str]:
        where = ["--model", str(self.root / model), "--task", str(self.root / task)]
        return ["evaluate", str(self.root / run), *where, *more]

    def path(self, name: str) -> str:
        return str(self.root / name)


UNIFORM = {"policy": {}, "quantize_embeddings": False}


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, cut at spaces."""
    model = models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


# Command and what its line must say. `out` is a folder that must not exist afterwards.
Bad = dict[str, tuple[Callable[[World], list[str]], str]]
BAD: Bad = {
    # models
    "no such folder": (lambda w: w.discover("nowhere"), "nowhere"),
    "no such Hub model": (lambda w: ["info", "no-such/model"], "cannot read the model 'no-such/model'"),
    "not even a name": (lambda w: ["info", "a b/c?d"], "a b/c?d"),
    "an unsupported family": (lambda w: ["info", w.path("bert")], "family 'bert' is not supported"),
    "an unsupported family in discover": (lambda w: w.discover("bert"), "family 'bert' is not supported"),
    "an unknown family": (lambda w: ["info", w.path("novel")], "cannot tell the family of"),
    "a truncated checkpoint": (lambda w: w.discover("short"), "cannot read the checkpoint file"),
    "a missing tensor": (lambda w: w.discover("less"), "it lacks 1 tensors, such as model.layers.1.mlp"),
    "no weights": (lambda w: w.discover("bare"), "cannot load the weights"),
    "NaN in the final norm": (lambda w: w.discover("norm"), "NaN"),
    "NaN for one token": (lambda w: w.discover("token"), "metric kl came out as nan"),
    "NaN in evaluate": (lambda w: w.evaluate("run", "token", "--any-weights"), "metric kl came out as nan"),
    # data
    "no such file": (lambda w: w.discover("model", "nothing.jsonl"), "nothing.jsonl: no such file"),
    "too many examples": (
        lambda w: [*w.discover("nowhere"), "--task", "ioi", "--n", "100000000"],  # before the model is read
        "at most 100,000 examples",
    ),
    "no such task": (lambda w: [*w.discover(), "--task", "juggling"], "unknown task 'juggling'"),
    "no data": (lambda w: w.discover("model", "empty.jsonl"), "the dataset is empty"),
    "a missing column": (lambda w: w.discover("words", "column.jsonl"), "missing column corrupted"),
    "different lengths": (lambda w: w.discover("model", "lengths.jsonl"), "example 0: the clean prompt"),
    "different lengths of texts": (lambda w: w.discover("words", "texts.jsonl"), "example 1: the clean"),
    "an answer of two tokens": (lambda w: w.discover("words", "several.jsonl"), "'Mary John' is 2 tokens"),
    "texts without tokenizer": (lambda w: w.discover("model", "texts.jsonl"), "a tokenizer is needed"),
    "a generated task without tokenizer": (lambda w: [*w.discover(), "--task", "ioi"], "pass the model's"),
    "not JSON": (lambda w: w.discover("model", "broken.jsonl"), "line 1: not valid JSON"),
    "an unknown token": (lambda w: w.discover("model", "vocabulary.jsonl"), f"token id {VOCAB}"),
    "no answers for the metric": (
        lambda w: w.discover("model", "answers.jsonl", "--metric", "logit_diff"),
        "metric logit_diff needs an answer for every example",
    ),
    "no answers in evaluate": (
        lambda w: w.evaluate("run", "model", "--metric", "nll", task="answers.jsonl"),
        "metric nll needs an answer for every example",
    ),
    # options
    "threshold nan": (
        lambda w: w.discover("model", "ids.jsonl", "--threshold", "nan"),
        "threshold must be a finite number",
    ),
    "threshold below 0": (lambda w: w.discover("model", "ids.jsonl", "--threshold=-1"), "threshold must be"),
    "infinite threshold": (lambda w: w.discover("model", "ids.jsonl", "--threshold=inf"), "a finite number"),
    "threshold of letters": (lambda w: w.discover("model", "ids.jsonl", "--threshold", "low"), "--threshold"),
    "a glob of nothing": (
        lambda w: w.discover("model", "ids.jsonl", "--readers", "logits,q*"),
        "no reader matches 'q*'; readers are named like",
    ),
    "an unknown order": (lambda w: w.discover("model", "ids.jsonl", "--order", "random"), "--order"),
    "an unknown metric": (lambda w: w.discover("model", "ids.jsonl", "--metric", "loss"), "--metric"),
    "an unknown precision": (lambda w: w.discover("model", "ids.jsonl", "--precision", "fp4"), "--precision"),
    "an unknown format": (lambda w: w.discover("model", "ids.jsonl", "--format", "fp4"), "--format"),
    "an unknown active": (lambda w: w.discover("model", "ids.jsonl", "--active", "writer"), "--active"),
    "an unknown compute": (lambda w: w.discover("model", "ids.jsonl", "--compute", "fp4"), "--compute"),
    "a margin below 0": (lambda w: w.discover("model", "ids.jsonl", "--margin=-1"), "margin must be"),
    "margin nan": (lambda w: w.discover("model", "ids.jsonl", "--margin", "nan"), "margin must be"),
    "a margin in FP32": (
        lambda w: w.discover("model", "ids.jsonl", "--precision", "fp32", "--margin", "0.1"),
        "a margin needs precision pahq",
    ),
    "active writers in FP32": (
        lambda w: w.discover("model", "ids.jsonl", "--precision", "fp32", "--active", "both"),
        "active=both needs precision pahq",
    ),
    "BF16 products in another regime": (
        lambda w: w.discover("model", "ids.jsonl", "--precision", "rtn", "--compute", "bf16"),
        "compute=bf16 needs precision pahq",
    ),
    "FP8 products of other weights": (
        lambda w: w.discover("model", "ids.jsonl", "--format", "int8", "--compute", "fp8"),
        "compute=fp8 needs format fp8",
    ),
    "an unknown ablation": (lambda w: w.discover("model", "ids.jsonl", "--ablation", "none"), "--ablation"),
    "an unknown engine": (lambda w: w.discover("model", "ids.jsonl", "--engine", "steam"), "--engine"),
    "an empty batch": (lambda w: w.discover("model", "ids.jsonl", "--batch", "0"), "batch"),
    "a budget of words": (lambda w: w.discover("model", "ids.jsonl", "--memory-budget", "much"), "much"),
    "a budget of nothing": (lambda w: w.discover("model", "ids.jsonl", "--memory-budget=0"), "budget"),
    "no examples": (lambda w: w.discover("model", "ids.jsonl", "--n", "0"), "--n"),
    "an unknown option": (lambda w: w.discover("model", "ids.jsonl", "--tau", "1"), "--tau"),
    "an unknown command": (lambda w: ["find"], "find"),
    "no output folder": (lambda w: ["discover", w.path("model"), "--task", "ioi"], "--out"),
    "no model": (lambda w: ["info"], "MODEL"),
    "an unknown device": (lambda w: w.discover("model", "ids.jsonl", "--device", "abacus"), "'abacus'"),
    "a device that is not there": (
        lambda w: w.discover("model", "ids.jsonl", "--device", "cuda:77"),
        "device 'cuda:77' cannot be used",
    ),
    "low precision in float64": (
        lambda w: w.discover("model", "ids.jsonl", "--dtype", "float64", "--precision", "rtn"),
        "low-precision regimes need",
    ),
    "the default in float64": (
        lambda w: w.discover("model", "ids.jsonl", "--dtype", "float64"),
        "low-precision regimes need",
    ),
    # folders
    "a folder below a file": (lambda w: w.discover(out="file/out"), "cannot create the output folder"),
    "a file as folder": (lambda w: w.discover(out="file"), "cannot create the output folder"),
    "a name too long": (lambda w: w.discover(out="x" * 300), "cannot create the output folder"),
    "a folder with a run": (lambda w: w.discover(out="run"), "holds a run already (circuit.json); continue"),
    "a folder with half a run": (lambda w: w.discover(out="half"), "holds a run already (journal.jsonl)"),
    "resuming another run": (
        lambda w: w.discover("model", "ids.jsonl", "--resume", out="half"),
        "holds another run: its threshold is",
    ),
    "resuming another finished run": (
        lambda w: w.discover("model", "ids.jsonl", "--resume", out="run"),
        "holds another run: its threshold is",
    ),
    # circuits
    "no circuit": (lambda w: ["show", w.path("model")], "circuit.json"),
    "no folder": (lambda w: ["show", w.path("nowhere")], "nowhere"),
    "a damaged circuit.json": (lambda w: ["show", w.path("damaged_circuit")], "circuit.json is damaged"),
    "damaged scores": (lambda w: ["show", w.path("damaged_scores")], "its checksum is not that in"),
    "a damaged discovery.json": (lambda w: w.evaluate("damaged_discovery"), "discovery.json is damaged"),
    "edges that do not exist": (lambda w: w.evaluate("unnamed"), "->logit' is not an edge of"),
    "a circuit of other groups": (lambda w: w.evaluate("gpt2_run"), "kv_groups=4, the model has kv_groups=2"),
    "a circuit of fewer layers": (lambda w: w.evaluate("run", "deep"), "layers=2, the model has layers=3"),
    "a circuit of another family": (lambda w: w.evaluate("run", "qwen2"), "is llama, the model's is qwen2"),
    "evaluate on missing data": (lambda w: w.evaluate(task="nothing.jsonl"), "no such file"),
    "evaluate without a model": (lambda w: ["evaluate", w.path("run"), "--task", "ioi"], "--model"),
}  # fmt: skip
REPORTED = {"a missing tensor"}  # transformers lists what is missing first
FINE: dict[str, Callable[[World], list[str]]] = {
    "info": lambda w: ["info", w.path("bare")],
    "info json": lambda w: ["info", w.path("bare"), "--json"],
    "info split": lambda w: ["info", w.path("bare"), "--json", "--split-kv-groups"],
    "discover json": lambda w: w.discover("model", "ids.jsonl", "--threshold=0.05", "--json", out="fine/a"),
    "discover": lambda w: w.discover("words", "good.jsonl", "--metric", "logit_diff", out="fine/b"),
    "discover again": lambda w: [*FINE["discover json"](w), "--resume"],
    "discover more": lambda w: w.discover(
        "model", "ids.jsonl", "--precision", "rtn", "--format", "int8", "--order", "head", "--ablation",
        "mean", "--split-kv-groups", "--n", "2", "--readers", "logits,m*", "--absolute", "--resume", "--json",
        "--device", "cpu", "--engine", "hooks", "--batch", "5", "--memory-budget", "1G", out="fine/c",
    ),
    "discover pahq": lambda w: w.discover(
        "model", "ids.jsonl", "--threshold=0.05", "--format", "int8", "--active", "both", "--compute", "fp32",
        "--margin", "inf", "--json", out="fine/d",
    ),
    "evaluate json": lambda w: w.evaluate("run", "model", "--json"),
    "evaluate": lambda w: w.evaluate("run", "model", "--metric", "logit_diff"),
    "evaluate split": lambda w: w.evaluate("fine/c", "model", "--json"),
    "show": lambda w: ["show", w.path("run")],
    "show json": lambda w: ["show", w.path("run"), "--json"],
    "help": lambda w: ["--help"],
    "help discover": lambda w: ["discover", "--help"],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def untouched(world: World) -> dict[str, bytes]:
    """All files before any of the commands ran."""
    return files_of(world.root)


@pytest.fixture(scope="module")
def results(
    world: World, untouched: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """What every command of `BAD` and `FINE` left."""
    folder = tmp_path_factory.mktemp("driver")
    cases = {name: command(world) for name, (command, _) in BAD.items()}
    cases |= {name: command(world) for name, command in FINE.items()}
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


# -- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(results: dict[str, Result], name: str) -> None:
    code, out, err = results[name]
    assert code == 2, err
    assert out == ""
    if name in REPORTED:
        err = err[err.rindex("\npahq: ") + 1 :]
    assert err.startswith("pahq: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert BAD[name][1] in err
    assert "Traceback" not in err
    assert len(err) < 500


def test_mistakes_leave_nothing_behind(
    world: World, untouched: dict[str, bytes], results: dict[str, Result]
) -> None:
    left = {name: raw for name, raw in files_of(world.root).items() if not name.startswith("fine")}
    assert left == untouched
    assert not (world.root / "out").exists()


def test_the_bare_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main() == 2
    captured = capsys.readouterr()
    assert "Usage:" in captured.out and "discover" in captured.out
    assert captured.err == ""


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """Only errors raised on purpose become one line; others keep their traceback."""

    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Circuit, "from_pretrained", bug)
    with pytest.raises(ZeroDivisionError):
        run_main("show", world.path("run"))


def test_an_interrupt_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], world: World
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Circuit, "from_pretrained", interrupt)
    assert run_main("show", world.path("run")) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pahq: interrupted") and captured.err.count("\n") == 1


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


def test_info(results: dict[str, Result]) -> None:
    facts = only_json(results["info json"])
    memory, threads = facts.pop("memory"), facts.pop("threads")
    assert threads["count"] >= 1
    assert memory["weights"] == sum(part["bytes"] for part in memory["parts"]) < memory["weights_fp32"]
    assert memory["peak"] > memory["weights"] + memory["activations"]
    assert facts == {
        "family": "llama", "layers": 2, "heads": 4, "kv_groups": 2, "writers": 11, "readers": 19, "edges": 82,
    }  # fmt: skip
    split = only_json(results["info split"])
    assert split.pop("threads").keys() == threads.keys()
    assert split.pop("memory")["weights"] == memory["weights"]
    assert split == facts | {"readers": 27, "edges": 110}
    assert results["info"].code == 0
    graph, _, table = results["info"].out.partition("Memory")
    assert "attention" in table and "expected peak" in table
    shown = dict(line.split() for line in graph.splitlines())
    assert shown == {name: str(value) for name, value in facts.items()}


@pytest.mark.parametrize(
    ("config", "more", "edges"),
    [
        (GPT2Config(), [], 32_491),
        (GPT2Config(n_layer=4, n_head=8, n_embd=256, n_inner=0), [], 1_281),
        (LlamaConfig(num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8), [], 195_865),
        (
            LlamaConfig(num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8),
            ["--split-kv-groups"],
            386_713,
        ),
        (
            LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576),
            [],
            70_651,
        ),
    ],
    ids=["gpt2", "attention-only", "llama-3.2-1b", "llama-3.2-1b-split", "smollm2"],
)
def test_info_counts_the_edges_of_known_models(
    config: Any, more: list[str], edges: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From config.json alone."""
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert run_main("info", str(tmp_path), "--json", *more) == 0
    assert json.loads(capsys.readouterr().out)["edges"] == edges


def test_discover_prints_what_it_wrote(world: World, results: dict[str, Result]) -> None:
    facts = only_json(results["discover json"])
    out = world.root / "fine" / "a"
    assert facts["next"].startswith("pahq ")
    written = json.loads((out / "discovery.json").read_text())
    assert written.pop("checksums").keys() == {"means.safetensors", "scores.safetensors"}  # of files
    assert facts == {"out": str(out), "next": facts["next"], **written}
    assert (out / "circuit.json").read_bytes() == (world.run / "circuit.json").read_bytes()
    assert only_json(results["discover again"]) == facts
    circuit = Circuit.from_pretrained(out)
    expected = referee("llama", load_task(str(world.ids))).acdc(0.05)
    assert named(circuit.graph, circuit.kept) == expected.kept
    assert facts["metric"]["fp32"] == pytest.approx(expected.final, abs=1e-5)
    assert circuit.model["base_model"] == world.model.name


def test_discover_prints_a_table(world: World, results: dict[str, Result]) -> None:
    result = results["discover"]
    assert result.code == 0
    circuit = Circuit.from_pretrained(world.root / "fine" / "b")
    assert f"{circuit.edge_count} of 82" in result.out
    assert "logit_diff" in result.out and "good" in result.out
    assert "ACDC, tau 0.01: " in result.err and "tests in" in result.err  # and not on stdout
    assert "\r" not in result.err
    assert "ACDC" not in result.out and "Loading" not in result.err


def test_discover_takes_its_options(results: dict[str, Result]) -> None:
    facts = only_json(results["discover more"])
    precision = {"regime": "rtn", "format": "int8", "split_kv_groups": True} | UNIFORM
    assert facts["precision"] == precision | {"active": "receiver", "compute": "fp32"}
    assert facts["second_looks"] == {"margin": None, "tests": 0, "changed": 0}
    arguments = facts["arguments"]
    assert (arguments["order"], arguments["ablation"], arguments["absolute"]) == ("head", "mean", True)
    assert arguments["readers"] == "logits,m*"
    assert facts["task"]["examples"] == 2 and facts["engine"] == "hooks"
    assert facts["edges"]["total"] == 110
    assert facts["edges"]["tested"] <= 11 + 10 + 5


def test_discover_is_anchored_by_default(results: dict[str, Result]) -> None:
    facts = only_json(results["discover json"])
    precision = {"regime": "pahq", "format": "fp8", "split_kv_groups": False, "active": "receiver"} | UNIFORM
    native = resolve_compute("auto", "fp8", torch.device("cpu"))
    assert facts["precision"] == facts["header"]["precision"] == precision | {"compute": native}
    assert facts["arguments"]["margin"] == facts["second_looks"]["margin"] == 0.2
    assert 0 <= facts["second_looks"]["changed"] <= facts["second_looks"]["tests"] < facts["edges"]["tested"]


def test_discover_can_look_at_everything_again(world: World, results: dict[str, Result]) -> None:
    """Then precision is of no consequence."""
    facts = only_json(results["discover pahq"])
    precision = {"regime": "pahq", "format": "int8", "split_kv_groups": False, "active": "both"} | UNIFORM
    assert facts["precision"] == precision | {"compute": "fp32"}
    assert facts["arguments"]["margin"] == facts["second_looks"]["margin"] == "inf"
    assert facts["second_looks"]["tests"] >= facts["edges"]["tested"]
    circuit = Circuit.from_pretrained(world.root / "fine" / "d")
    judge = referee("llama", load_task(str(world.ids))).acdc(0.05)
    assert named(circuit.graph, circuit.kept) == judge.kept
    for (writer, reader), score in judge.scores.items():
        r, w = circuit.graph.parse_edge(f"{writer}->{reader}")
        assert circuit.scores[r, w] == pytest.approx(score, abs=1e-5)


def test_evaluate(world: World, results: dict[str, Result]) -> None:
    facts = only_json(results["evaluate json"])
    circuit = Circuit.from_pretrained(world.run)
    task = load_task(str(world.ids))
    judge = referee("llama", task)
    removed = judge.edge_set - named(circuit.graph, circuit.kept)
    assert facts["kl"] == pytest.approx(judge.metric(removed), abs=1e-5)
    assert facts["metric"]["name"] == "kl"
    assert facts["metric"]["value"] == facts["kl"]
    assert facts["faithfulness"] == pytest.approx(1 - facts["kl"] / facts["metric"]["empty"], abs=1e-6)
    assert facts["edges"] == circuit.edge_count and facts["edges_total"] == 82 and facts["examples"] == 3
    logits = judge.circuit_logits(removed)
    hits = [int(logits[i].argmax()) in task.answers[i] for i in range(3)]
    assert facts["accuracy"] == pytest.approx(sum(hits) / 3)
    assert 0 <= facts["accuracy_full"] <= 1


def test_evaluate_as_a_table_with_another_metric(world: World, results: dict[str, Result]) -> None:
    result = results["evaluate"]
    assert result.code == 0 and result.err == ""
    shown = dict(line.split() for line in result.out.splitlines())
    assert shown["metric.name"] == "logit_diff"
    judge = referee("llama", load_task(str(world.ids)), metric="logit_diff")
    assert float(shown["metric.full"]) == pytest.approx(judge.metric(set()), abs=1e-4)
    assert float(shown["kl"]) == pytest.approx(only_json(results["evaluate json"])["kl"], abs=1e-5)


def test_evaluate_splits_groups_as_the_circuit_does(results: dict[str, Result]) -> None:
    assert only_json(results["evaluate split"])["edges_total"] == 110


def test_show(world: World, results: dict[str, Result]) -> None:
    result = results["show"]
    assert result.code == 0 and result.err == ""
    circuit = Circuit.from_pretrained(world.run)
    assert f"{circuit.edge_count} of 82" in result.out
    strongest = max(circuit.edges, key=lambda edge: abs(edge[1]))
    assert strongest[0] in result.out and f"{strongest[1]:+.4g}" in result.out
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if "│" in line
    ]
    into = [name.partition("->")[2] for name, _ in circuit.edges]
    for layer in ("1", "0"):
        counts = [sum(f"a{layer}." in r and f"<{kind}>" in r for r in into) for kind in "qkv"]
        counts.append(into.count(f"m{layer}"))
        heads = [str(h) for h in range(4) if any(f"a{layer}.h{h}->" in name for name, _ in circuit.edges)]
        assert [layer, *(str(count) if count else "·" for count in counts), " ".join(heads)] in rows
    assert f"logits: {into.count('logits')} edges" in result.out
    document = only_json(results["show json"])
    assert document["edges"] == json.loads((world.run / "circuit.json").read_text())["edges"]
    assert document["discovery"]["edges"]["kept"] == circuit.edge_count


def test_help(results: dict[str, Result]) -> None:
    assert results["help"].code == results["help discover"].code == 0
    for command in ("info", "discover", "evaluate", "show"):
        assert command in results["help"].out
    for option in (
        "--task", "--n", "--seed", "--threshold", "--metric", "--precision", "--format", "--order",
        "--active", "--compute", "--margin", "--ablation", "--split-kv-groups", "--device", "--resume",
        "--json", "--out",
    ):  # fmt: skip
        assert option in results["help discover"].out, option


def test_the_installed_script(world: World) -> None:
    """`pahq` itself, as a user starts it."""
    script = Path(sys.executable).parent / "pahq"
    ended = subprocess.run([script, "info", world.path("bare"), "--json"], capture_output=True, text=True)
    assert only_json(Result(ended.returncode, ended.stdout, ended.stderr))["edges"] == 82
