"""How much memory a low-precision model takes while it is loaded, and GGUF files on their way through."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import pahq_hf.checkpoint.load
from pahq_hf.checkpoint.gguf import write_header
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import ModelLoadError
from pahq_hf.model import PAHQModel
from pahq_hf.precision.memory import read_memory
from tests.forked import run_forked
from tests.helpers import FP32, files_of
from tests.models import padded_prompts, tiny_llama

RTN = PAHQConfig("rtn")

# -- peak memory ------------------------------------------------------------------------------------

VOCAB, WIDTH, MLP, LAYERS = 8_000, 512, 2048, 13
TABLES = 2 * 4 * VOCAB * WIDTH  # bytes of embedding and unembedding in FP32

LOAD = """
import json, sys
from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.precision.memory import PeakMemory, read_memory, trim
config = PAHQConfig("pahq", quantize_embeddings=sys.argv[2] == "tables")
PAHQModel.from_pretrained("demo", config)  # libraries take their memory
trim()
start = read_memory()["anonymous"]
with PeakMemory() as peak:
    model = PAHQModel.from_pretrained(sys.argv[1], config)
grown = read_memory()["anonymous"] - start
control = model.patched.precision
print(json.dumps([peak.anonymous - start, grown, control.nbytes, control.nbytes_fp32]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """A random Llama of 60 million parameters as a checkpoint."""

    def save(dtype: torch.dtype) -> Path:
        folder: Path = tmp_path_factory.mktemp("large")
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": MLP, "vocab_size": VOCAB}
        heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
        with torch.device("meta"):
            hf = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes, **heads))
        hf.to_empty(device="cpu")
        for parameter in hf.parameters():
            parameter.data.normal_(std=0.02)
        hf.to(dtype).save_pretrained(folder)
        return folder

    return save


def loaded(folder: Path, tables: bool) -> tuple[int, int, int, int]:
    """Peak and growth of a process that loads a model, the bytes of its linear weights, and in FP32."""
    ended = run_forked(LOAD, str(folder), "tables" if tables else "", env={"OMP_NUM_THREADS": "1"})
    assert ended.code == 0, ended.stderr
    peak, grown, low, full = json.loads(ended.stdout)
    return peak, grown, low, full


@pytest.mark.skipif(not read_memory(), reason="reads /proc")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)], ids=str
)
def test_loading_takes_little_more_than_what_stays(
    dtype: torch.dtype, large: Callable[[torch.dtype], Path]
) -> None:
    folder, grown = large(dtype), dict[bool, int]()
    for tables in (False, True):
        peak, grown[tables], low, full = loaded(folder, tables)
        stays = low + (TABLES // 4 if tables else TABLES * dtype.itemsize // 4)
        assert full == 4 * LAYERS * (3 * WIDTH * MLP + 3 * WIDTH * WIDTH) and low < 0.26 * full
        assert peak < (0 if tables else TABLES) + 0.6 * full
        # What is imported at load takes 26 MB with transformers 5.24.
        assert stays - 30e6 < grown[tables] < stays + 30e6
        assert peak < 1.3 * grown[tables] + TABLES / 2
    if dtype == torch.float32:  # from a BF16 checkpoint the tables are BF16: little is saved
        assert grown[True] < grown[False] - 0.5 * TABLES


# -- GGUF -------------------------------------------------------------------------------------------


def write_gguf(path: Path, hf: PreTrainedModel) -> Path:
    """A Llama as llama.cpp keeps it, in F32."""
    config, file = hf.config, gguf.GGUFWriter(str(path), "llama")
    file.add_name("tiny")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in hf.state_dict().items():
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:  # rotated in another order
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None
        file.add_tensor(stored, np.ascontiguousarray(array))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where converted files go; not made yet."""
    monkeypatch.setenv("PAHQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A GGUF file of the tiny Llama."""
    (tmp_path / "model").mkdir()
    return write_gguf(tmp_path / "model" / "tiny.gguf", tiny_llama())


def load(path: Path, config: PAHQConfig) -> PAHQModel:
    return PAHQModel.from_pretrained(path.parent, config, gguf_file=path.name)


@pytest.mark.parametrize("tables", [False, True])
@torch.no_grad()
def test_gguf_is_streamed_from_its_conversion(
    tables: bool, path: Path, cache: Path, spill_folder: Path
) -> None:
    config, ids = PAHQConfig("rtn", "int8", quantize_embeddings=tables), padded_prompts()["input_ids"]
    ours, theirs = load(path, config), PAHQModel(tiny_llama(), config)
    assert ours.identity.fingerprint == theirs.identity.fingerprint
    assert ours.identity.base_model == path.parent.name
    for mine, other in zip(ours.patched.linears(), theirs.patched.linears(), strict=True):
        assert torch.equal(mine.dense(), other.dense())
        with mine.shared.mode.full_precision(), other.shared.mode.full_precision():
            assert torch.equal(mine.dense(), other.dense())
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert not list(spill_folder.iterdir())  # what the model in memory has there has no name
    (folder,) = (cache / "gguf").iterdir()
    assert {"config.json", "model.safetensors"} <= set(files_of(folder))


def test_gguf_is_converted_once(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = load(path, FP32)
    assert capfd.readouterr().err == "", "no bars into files"
    assert first.config.name_or_path == str(path.parent)
    assert first.identity.base_model == path.parent.name
    before = files_of(cache)
    assert all(not name.endswith(".lock") for name in before)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("converted again")

    with monkeypatch.context() as patch:
        patch.setattr(pahq_hf.checkpoint.load, "_convert", refuse)
        others = [load(path, config) for config in (PAHQConfig("pahq"), RTN, FP32)]
        ids = padded_prompts()["input_ids"]
        assert torch.equal(others[-1](ids).logits, first(ids).logits)
        wide = PAHQModel.from_pretrained(path.parent, FP32, gguf_file=path.name, dtype=torch.float64)
        assert wide.dtype == torch.float64
    assert all(other.identity == first.identity for other in others) and files_of(cache) == before


def test_two_at_once_convert_once(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converts, real = [], pahq_hf.checkpoint.load._convert

    def slow(*args: Any, **kwargs: Any) -> None:
        converts.append(args)
        time.sleep(0.2)
        real(*args, **kwargs)

    monkeypatch.setattr(pahq_hf.checkpoint.load, "_convert", slow)
    with ThreadPoolExecutor(2) as pool:
        convert = partial(pahq_hf.checkpoint.load.converted, gguf_file=path.name)
        first, second = pool.map(convert, [str(path.parent)] * 2)
    assert first == second and len(converts) == 1


def test_the_config_needs_the_header_only(path: Path, cache: Path) -> None:
    """Neither weights nor vocabulary are needed: of a file without them it is the same."""
    name, whole = str(path.parent), AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    ours = pahq_hf.checkpoint.load.load_config(name, gguf_file=path.name)
    assert ours.to_dict() == whole.to_dict() and ours.name_or_path == name
    header = path.with_name("header.gguf")
    write_header(path, header)
    assert header.stat().st_blocks * 512 < path.stat().st_size
    again = AutoConfig.from_pretrained(path.parent, gguf_file=header.name)
    assert again.to_dict() == whole.to_dict()
    assert not cache.exists()


def test_the_size_of_the_vocabulary_is_that_of_its_tokens(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "tokens.gguf"), "llama")
    for add, value in (
        (writer.add_block_count, 2),
        (writer.add_embedding_length, 16),
        (writer.add_head_count, 2),
        (writer.add_feed_forward_length, 32),
        (writer.add_context_length, 64),
    ):
        add(value)
    writer.add_token_list([f"token {number}" for number in range(3000)])
    writer.add_token_scores([0.0] * 3000)
    writer.add_eos_token_id(7)
    writer.add_tensor("token_embd.weight", np.zeros((3000, 16), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    whole = AutoConfig.from_pretrained(tmp_path, gguf_file="tokens.gguf")
    ours = pahq_hf.checkpoint.load.load_config(str(tmp_path), gguf_file="tokens.gguf")
    assert ours.vocab_size == 3000 and ours.eos_token_id == 7 and ours.to_dict() == whole.to_dict()
    write_header(tmp_path / "tokens.gguf", tmp_path / "header.gguf")
    assert b"token 17" not in (tmp_path / "header.gguf").read_bytes()


@pytest.mark.parametrize("size", [0, 3, 10, 24, 100, 300])
def test_a_header_that_is_cut_off(size: int, path: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError):
        write_header(tmp_path / "cut.gguf", tmp_path / "header.gguf")


def test_another_gguf_of_the_same_name_is_converted_anew(path: Path, cache: Path) -> None:
    first = load(path, RTN)
    write_gguf(path.with_suffix(".new"), tiny_llama(seed=1)).replace(path)
    second = load(path, RTN)
    assert second.identity.fingerprint != first.identity.fingerprint
    assert second.identity.fingerprint == load(path, FP32).identity.fingerprint
    assert len(list((cache / "gguf").iterdir())) == 2


def test_a_cache_that_cannot_be_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a regular file")
    monkeypatch.setenv("PAHQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=f"cannot keep the converted .*{tmp_path / 'file'}"):
        load(path, RTN)
    load(path, FP32)


@pytest.mark.parametrize("half", [False, True])
def test_a_damaged_gguf_leaves_nothing_in_the_cache(half: bool, path: Path, cache: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if half else raw[:100])
    with pytest.raises(ModelLoadError) as caught:
        load(path, RTN)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in cache.rglob("*")] in ([], ["gguf"])
