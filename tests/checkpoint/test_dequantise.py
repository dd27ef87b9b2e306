"""Quantised checkpoints: read as full precision where that takes no GPU, else refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.errors import UnsupportedModelError
from tests.helpers import run_main, save_tiny
from tests.models import tiny_llama

IDS = torch.arange(12).reshape(2, 6) + 5
BLOCK = 16


def told(folder: Path, quantization: Any) -> Path:
    """A folder whose config says how its weights are quantised."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def in_fp8(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint as FP8 ones are made: blocks with a scale each. And the values that these stand for."""
    stored: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for name, weight in load_file(save_tiny(folder) / "model.safetensors").items():
        stored[name] = wanted[name] = weight
        if "proj" in name:
            rows, cols = weight.shape
            blocks = weight.reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored |= {name: codes.reshape(rows, cols), f"{name}_scale_inv": scale}
            wanted[name] = (codes.float() * scale[:, None, :, None]).reshape(rows, cols)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return told(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}), wanted


def in_torchao(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(save_tiny(folder / "base"), quantization_config=quantization)
    model.save_pretrained(folder / "quantised")
    state: dict[str, Any] = dict(model.named_parameters())
    return folder / "quantised", {
        name: weight if type(weight.data) is Tensor else weight.data.dequantize()
        for name, weight in state.items()
    }


@pytest.mark.parametrize("make", [in_fp8, in_torchao])
@torch.no_grad()
def test_quantised_weights_are_read_as_full_precision(make: Any, tmp_path: Path) -> None:
    folder, wanted = make(tmp_path / "model")
    plain = tiny_llama()
    plain.load_state_dict(wanted, strict=False)
    model = PAHQModel.from_pretrained(folder, precision="fp32")
    assert (model(IDS).logits - plain(IDS).logits).abs().max() < 1e-5
    assert (model(IDS).logits - tiny_llama()(IDS).logits).abs().max() > 1e-3
    low = PAHQModel.from_pretrained(folder, format="int8")
    assert low.identity == model.identity
    model.base_model.save_pretrained(tmp_path / "saved")  # as a plain checkpoint
    again = PAHQModel.from_pretrained(tmp_path / "saved", precision="fp32")
    assert again.identity.fingerprint == model.identity.fingerprint
    assert run_main("info", str(folder), "--json") == 0


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4", "hqq", "odd"]
)
@pytest.mark.parametrize("precision", ["fp32", "pahq"])
def test_others_are_refused_in_one_line(method: str, precision: Any, tmp_path: Path) -> None:
    folder = told(save_tiny(tmp_path / "model"), {"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=rf"quantised \({method}\)") as caught:
        PAHQModel.from_pretrained(folder, precision=precision)
    assert "\n" not in str(caught.value)


def test_a_quantised_model_in_memory_is_refused(tmp_path: Path) -> None:
    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path), quantization_config=quantization)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torchao\)"):
        PAHQModel(model, PAHQConfig("fp32"))
