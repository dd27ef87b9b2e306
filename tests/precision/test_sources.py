"""Where FP32 slices come from: checkpoints, spill files, memory."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pahq_hf.errors import ModelLoadError
from pahq_hf.precision.fp32.source import CheckpointSource, SourceBlock, SpillSource, WeightSource, byte_spans
from tests.forked import run_forked
from tests.helpers import MemorySource, ranges, small_disk, weight_of
from tests.tiers import examples

ROWS, COLS = 12, 10


# -- sources --------------------------------------------------------------------------------------


@st.composite
def segment_lists(draw: st.DrawFn, size: int = 14) -> tuple[tuple[int, int], ...]:
    parts = draw(st.lists(ranges(size), min_size=1, max_size=3))
    return tuple((part.start, part.stop) for part in parts)


@given(data=st.data(), transposed=st.booleans(), segments=segment_lists())
@examples(80)
def test_source_block_is_the_concatenation_of_its_segments(
    data: st.DataObject, transposed: bool, segments: tuple[tuple[int, int], ...]
) -> None:
    tensor = torch.arange(14 * COLS, dtype=torch.float32).view(14, COLS)
    stored = tensor.t().contiguous() if transposed else tensor
    projection = torch.cat([tensor[start:stop] for start, stop in segments])
    rows, cols = data.draw(ranges(len(projection))), data.draw(ranges(COLS))
    block = SourceBlock(MemorySource({"w": stored}), "w", transposed, segments)
    assert torch.equal(block.read(rows, cols), projection[rows, cols])


@pytest.fixture
def shards(tmp_path: Path) -> dict[Path, dict[str, Tensor]]:
    """Two safetensors files with different tensors."""
    contents = {
        tmp_path / "model-00001-of-00002.safetensors": {"a": weight_of(4, 6, 0), "b": weight_of(3, 5, 1)},
        tmp_path / "model-00002-of-00002.safetensors": {"c": weight_of(5, 2, 2).to(torch.bfloat16)},
    }
    for path, tensors in contents.items():
        save_file(tensors, path)
    return contents


def test_checkpoint_source_reads_every_shard(shards: dict[Path, dict[str, Tensor]]) -> None:
    source = CheckpointSource(list(shards))
    assert "a" in source and "c" in source and "d" not in source
    for tensors in shards.values():
        for name, tensor in tensors.items():
            block = source.read(name, slice(1, 3), slice(0, 2))
            assert block.dtype == tensor.dtype and torch.equal(block, tensor[1:3, 0:2])


def memory(tensors: dict[str, Tensor], _: Path) -> WeightSource:
    return MemorySource(tensors)


def file(tensors: dict[str, Tensor], folder: Path) -> WeightSource:
    save_file(tensors, folder / "model.safetensors")
    return CheckpointSource([folder / "model.safetensors"])


def spill(tensors: dict[str, Tensor], _: Path) -> WeightSource:
    return SpillSource(tensors)


@pytest.mark.parametrize("make", [memory, file, spill])
def test_blocks_are_private_copies(
    make: Callable[[dict[str, Tensor], Path], WeightSource], tmp_path: Path
) -> None:
    tensor = weight_of(4, 6, 0)
    expected = tensor.clone()
    source = make({"w": tensor}, tmp_path)
    source.read("w", slice(0, 4), slice(0, 6)).zero_()
    source.read("w", slice(0, 4), slice(2, 4)).zero_()
    assert torch.equal(source.read("w", slice(0, 4), slice(0, 6)), expected)
    assert torch.equal(tensor, expected)


def expect_load_error(path: Path, match: str) -> Any:
    return pytest.raises(ModelLoadError, match=f"(?s)^[^\n]*{path.name}[^\n]*{match}[^\n]*$")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with expect_load_error(path, "No such file"):
        CheckpointSource([path])


@pytest.mark.parametrize("size", [0, 4, 60, -8])
def test_a_truncated_file_is_named(shards: dict[Path, dict[str, Tensor]], size: int) -> None:
    path = next(iter(shards))
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with expect_load_error(path, ""):
        CheckpointSource(list(shards))


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def replace_in_place(path: Path) -> None:
    save_file({"a": torch.zeros(4, 6), "b": torch.zeros(3, 5)}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (touch, "changed on disk"),
        (truncate, "changed on disk"),
        (replace_in_place, "changed on disk"),
        (Path.unlink, "is gone"),
    ],
)
def test_a_file_changed_since_it_was_opened_is_refused(
    shards: dict[Path, dict[str, Tensor]], change: Callable[[Path], None], match: str
) -> None:
    source = CheckpointSource(list(shards))
    path = next(iter(shards))
    change(path)
    with expect_load_error(path, match):
        source.read("a", slice(0, 1), slice(0, 1))
    source.read("c", slice(0, 1), slice(0, 1))  # the other shard is as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_spill_file_has_no_name_and_gives_back_what_it_got(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensors = {"w": weight_of(4, 6, 0).to(dtype), "turned": weight_of(5, 7, 1).to(dtype).t()}
    source = SpillSource(tensors)
    assert not list(tmp_path.iterdir())
    for name, tensor in tensors.items():
        source.prefetch(name)
        assert torch.equal(source.read(name, slice(0, 4), slice(1, 3)), tensor[0:4, 1:3])
        assert torch.equal(source.view(name, slice(1, 3), slice(0, 5)), tensor[1:3, 0:5])
    block = source.view("w", slice(0, 4), slice(0, 6))
    del source
    gc.collect()
    assert torch.equal(block, tensors["w"])  # what was read stays


def test_a_spill_file_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with small_disk(10_000), pytest.raises(ModelLoadError, match=r"cannot keep the FP32 weights .*TMPDIR"):
        SpillSource({"w": weight_of(64, 64, 0)})
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pahq_hf import PAHQConfig, PAHQModel
from tests.models import tiny_llama
model = PAHQModel(tiny_llama(), PAHQConfig("rtn"))
os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_no_weights(number: signal.Signals, tmp_path: Path) -> None:
    ended = run_forked(KILLED, str(int(number)), env={"TMPDIR": str(tmp_path)})
    assert ended.code == -number, ended.stderr[-2000:]
    assert not list(tmp_path.iterdir())


def test_spill_without_a_temporary_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match=r"the temporary folder: .*nowhere"):
        SpillSource({"w": weight_of(4, 6, 0)})


def test_prefetch_knows_where_tensors_lie(shards: dict[Path, dict[str, Tensor]]) -> None:
    source = CheckpointSource(list(shards))
    for path, tensors in shards.items():
        spans = byte_spans(path)
        for name, tensor in tensors.items():
            start, length = spans[name]
            assert (
                path.read_bytes()[start : start + length]
                == tensor.contiguous().view(torch.uint8).numpy().tobytes()
            )
            source.prefetch(name)
    next(iter(shards)).unlink()
    source.prefetch("a")  # a hint; reading says what is wrong
