"""Checkpoints that are damaged, or change while a model is in use: one clear error, nothing left over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pahq_hf.tasks.loading
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import ModelLoadError, SelfCheckError
from pahq_hf.model import PAHQModel
from pahq_hf.search.journal import Journal
from tests.forked import run_forked
from tests.helpers import FP32, id_rows, run_main, write_rows
from tests.models import padded_prompts, random_task, tiny_llama

pytestmark = pytest.mark.crossing

INDEX = "model.safetensors.index.json"
VICTIM = "model.layers.1.mlp.up_proj.weight"
TASK = random_task(batch=2, length=6, seed=3)
LOW = {
    "pahq": PAHQConfig("pahq"),
    "literal": PAHQConfig("pahq-literal", "int8"),
    "rtn": PAHQConfig("rtn"),
    "tables": PAHQConfig("pahq", quantize_embeddings=True),
    "mixed": PAHQConfig("pahq", policy={"m*": "bf16"}),
}
REGIMES = {"fp32": FP32} | LOW

regimes = pytest.mark.parametrize("config", LOW.values(), ids=LOW)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several shards."""
    folder = tmp_path_factory.mktemp("original")
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def discover_command(folder: Path, out: Path, *more: str) -> list[str]:
    rows = write_rows(folder.parent / "rows.jsonl", id_rows(TASK))
    return ["discover", str(folder), "--task", str(rows), "--out", str(out), "--json", *more]


def expect_one_line(code: int, capfd: pytest.CaptureFixture[str], *words: str) -> None:
    """Assert how the command line fails: nothing on stdout, and a last line with these words."""
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("pahq: ")]
    assert code == 2 and not out and len(lines) == 1 and err.endswith(lines[0] + "\n")
    for word in words:
        assert word in lines[0]


# -- before loading ---------------------------------------------------------------------------------


def victim_shard(folder: Path) -> Path:
    return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][VICTIM])


def change_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(victim_shard(folder))
    change(tensors)
    save_file(tensors, victim_shard(folder), metadata={"format": "pt"})


def truncate_a_shard(folder: Path) -> None:
    os.truncate(victim_shard(folder), victim_shard(folder).stat().st_size - 100)


def remove_a_shard(folder: Path) -> None:
    victim_shard(folder).unlink()


def spoil_the_index(folder: Path) -> None:
    (folder / INDEX).write_text("{not json")


def empty_the_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def list_for_an_index(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def name_what_no_shard_holds(folder: Path) -> None:
    change_shard(folder, lambda tensors: tensors.pop(VICTIM))


def name_a_shard_that_is_none(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][VICTIM] = "model-00099-of-00099.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def make_a_shard_a_folder(folder: Path) -> None:
    path = victim_shard(folder)
    path.unlink()
    path.mkdir()


# Damage, and what the message says beside the folder or file.
DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate_a_shard, "cannot read the checkpoint file"),
    (remove_a_shard, "cannot read the checkpoint file"),
    (spoil_the_index, "cannot find the weights"),
    (empty_the_index, "cannot find the weights"),
    (list_for_an_index, "cannot find the weights"),
    (name_what_no_shard_holds, f"it lacks 1 tensors, such as {VICTIM}"),
    (name_a_shard_that_is_none, "model-00099-of-00099.safetensors"),
    (make_a_shard_a_folder, "cannot read the checkpoint file"),
]
damages = pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=lambda v: getattr(v, "__name__", ""))


@damages
@pytest.mark.parametrize("config", REGIMES.values(), ids=REGIMES)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[Path], None], words: str, config: PAHQConfig, folder: Path, spill_folder: Path
) -> None:
    damage(folder)
    with pytest.raises(ModelLoadError) as caught:
        PAHQModel.from_pretrained(folder, config)
    message = str(caught.value)
    assert words in message and str(folder) in message and "\n" not in message
    assert not list(spill_folder.iterdir())


@damages
def test_damaged_checkpoints_on_the_command_line(
    damage: Callable[[Path], None],
    words: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    expect_one_line(run_main(*discover_command(folder, tmp_path / "out")), capfd, words, str(folder))
    assert not (tmp_path / "out").exists()


def test_an_index_with_names_too_many_is_fine(folder: Path) -> None:
    """As for transformers: shards say what they hold."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = victim_shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))
    ours = PAHQModel.from_pretrained(folder, LOW["rtn"])
    assert ours.identity.fingerprint == PAHQModel(tiny_llama(), FP32).identity.fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", REGIMES.values(), ids=REGIMES)
def test_a_weight_that_is_no_number(value: float, config: PAHQConfig, folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[VICTIM][3, 4] = value

    change_shard(folder, spoil)
    kind = ModelLoadError if config.is_low else SelfCheckError  # found in the weight, or in the logits
    with pytest.raises(kind, match="NaN or infinity") as caught:
        PAHQModel.from_pretrained(folder, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [[], ["--quantize-embeddings"], ["--precision", "rtn"]], ids=str)
def test_a_weight_that_is_no_number_on_the_command_line(
    options: list[str], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_shard(folder, lambda tensors: tensors[VICTIM].fill_(float("nan")))
    code = run_main(*discover_command(folder, tmp_path / "out", *options))
    expect_one_line(code, capfd, "NaN or infinity")
    assert not (tmp_path / "out").exists()


# -- after loading ----------------------------------------------------------------------------------


def rewrite_by_rename(folder: Path) -> None:
    """Another model of the same size."""
    tiny_llama(seed=1).save_pretrained(folder.parent / "other", max_shard_size="20KB")
    for path in (folder.parent / "other").iterdir():
        path.replace(folder / path.name)


def truncate_in_place(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)


def delete(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


LATER: list[tuple[Callable[[Path], None], str]] = [
    (rewrite_by_rename, "changed on disk since the model was loaded; reload the model"),
    (truncate_in_place, "changed on disk since the model was loaded; reload the model"),
    (delete, "is gone; reload the model"),
]
changes = pytest.mark.parametrize(("change", "words"), LATER, ids=lambda v: getattr(v, "__name__", ""))


def expect_refusal(model: PAHQModel, folder: Path, words: str, run: Callable[[], Any]) -> None:
    """Assert that something fails with these words, and leaves the model as it was."""
    weights = model.patched.precision.nbytes
    with pytest.raises(ModelLoadError) as caught:
        run()
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    control = model.patched.precision
    assert not control.active and not control.mode.is_full and control.nbytes == weights
    assert not any(linear.is_raised for linear in model.patched.linears())


@changes
@regimes
@torch.no_grad()
def test_activate_after_a_change(
    change: Callable[[Path], None], words: str, config: PAHQConfig, folder: Path
) -> None:
    model = PAHQModel.from_pretrained(folder, config)
    ids = padded_prompts()["input_ids"]
    before = model(ids).logits
    model.activate("a0.h0", "m1")
    model.deactivate()
    change(folder)
    for names in (["a0.h0"], ["m1"], ["a1.h3", "m0"]):
        expect_refusal(model, folder, words, lambda names=names: model.activate(*names))
    assert torch.equal(model(ids).logits, before)  # what is resident still works
    with pytest.raises(ModelLoadError, match=words), model.patched.precision.full_precision():
        model(ids)
    assert torch.equal(model(ids).logits, before)


@changes
@regimes
def test_discover_after_a_change(
    change: Callable[[Path], None], words: str, config: PAHQConfig, folder: Path, tmp_path: Path
) -> None:
    model = PAHQModel.from_pretrained(folder, config)
    change(folder)
    out = tmp_path / "out"
    expect_refusal(model, folder, words, lambda: model.discover(TASK, out=out, progress=False))
    assert not (out / "circuit.json").exists()


@changes
@regimes
def test_a_change_in_the_middle_of_a_run(
    change: Callable[[Path], None],
    words: str,
    config: PAHQConfig,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The journal keeps what was decided before, and the restored checkpoint continues it."""
    shutil.copytree(folder, tmp_path / "whole")
    append, out = Journal.append, tmp_path / "out"

    def append_and_change(self: Journal, record: Any) -> None:
        append(self, record)
        if len(self.steps) == 3:
            change(folder)

    model = PAHQModel.from_pretrained(folder, config)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_and_change)
        expect_refusal(model, folder, words, lambda: model.discover(TASK, out=out, progress=False))
    again = PAHQModel.from_pretrained(tmp_path / "whole", config)
    circuit = again.discover(TASK, out=out, resume=True, progress=False)
    assert circuit.discovery["resumed_readers"] >= 3


@changes
def test_a_change_between_loading_and_the_search_on_the_command_line(
    change: Callable[[Path], None],
    words: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_task = pahq_hf.tasks.loading.load_task

    def load_and_change(*args: Any, **kwargs: Any) -> Any:
        change(folder)
        return load_task(*args, **kwargs)

    monkeypatch.setattr(pahq_hf.tasks.loading, "load_task", load_and_change)
    code = run_main(*discover_command(folder, tmp_path / "out"))
    expect_one_line(code, capfd, words, str(folder))
    assert not (tmp_path / "out" / "circuit.json").exists()


MAPPED = """
import os, sys, torch
from pathlib import Path
from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.errors import ModelLoadError
model = PAHQModel.from_pretrained(sys.argv[1], PAHQConfig("rtn", sys.argv[2]))
if sys.argv[3:]:
    model.activate(*sys.argv[3:])
ids = torch.arange(1, 9)[None]
before = model(ids).logits
for path in Path(sys.argv[1]).glob("*.safetensors"):
    os.truncate(path, 0)
try:
    same = torch.equal(model(ids).logits, before)
except ModelLoadError:
    same = True
sys.exit(0 if same else 3)
"""


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [(torch.float32, ["fp8", "a0.h0", "m1"]), (torch.bfloat16, ["fp8"]), (torch.bfloat16, ["bf16", "m1"])],
    ids=str,
)
def test_a_model_in_use_survives_truncation(dtype: torch.dtype, arguments: list[str], tmp_path: Path) -> None:
    """A mapped page whose file is gone kills the process (SIGBUS): none may be read unchecked."""
    tiny_llama(dtype=dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    ended = run_forked(MAPPED, str(tmp_path), *arguments)
    assert ended.code == 0, (ended.code, ended.stderr[-2000:])


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 1000])
def test_shards_cut_to_any_length(cut: int, folder: Path) -> None:
    os.truncate(victim_shard(folder), cut)
    with pytest.raises(ModelLoadError, match="cannot read the checkpoint file"):
        PAHQModel.from_pretrained(folder, LOW["pahq"])
