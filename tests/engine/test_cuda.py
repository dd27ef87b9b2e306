"""On a real card: its circuits are the CPU's, runs repeat to the bit, and products are what they say."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from pahq_hf import Circuit, EngineConfig, PAHQConfig, PAHQModel, load_task
from pahq_hf.precision.formats.float8 import Float8Weight
from pahq_hf.precision.products import native_fp8
from pahq_hf.search.acdc_options import Tests

pytestmark = pytest.mark.cuda
CONFIGS: dict[str, dict[str, Any]] = {
    "fp32": {"regime": "fp32"},
    "pahq": {"regime": "pahq", "compute": "bf16"},
    "pahq-fp32": {"regime": "pahq", "compute": "fp32"},
    "pahq-int8": {"regime": "pahq", "format": "int8", "compute": "bf16"},
    "pahq-mx": {"regime": "pahq", "format": "mx", "compute": "bf16"},
    "pahq-e5m2": {"regime": "pahq", "format": "fp8-e5m2", "compute": "bf16"},
    "fp8": {"regime": "pahq", "compute": "fp8"},
    "pahq-literal": {"regime": "pahq-literal"},
    "rtn": {"regime": "rtn"},
}


def discover(name: str, engine: Any, tests: Tests = "all", **where: Any) -> Circuit:
    model = PAHQModel.from_pretrained("demo", PAHQConfig(**CONFIGS[name]), **where)
    task = load_task("ioi", model.tokenizer, n=8)
    return model.discover(task, threshold=0.05, tests=tests, engine=EngineConfig(engine), progress=False)


@cache
def on_cpu(name: str, tests: Tests = "all") -> Circuit:
    return discover(name, "sparse", tests)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "fp8"])
def test_circuits_are_the_cpus_and_repeat_to_the_bit(name: str) -> None:
    first, again = (discover(name, "sparse", device="cuda:0") for _ in range(2))
    assert np.array_equal(first.kept, on_cpu(name).kept)
    assert np.array_equal(first.scores, again.scores)
    assert first.discovery["versions"]["device"] == "cuda:0"
    hardware, memory = first.discovery["hardware"], first.discovery["peak_memory"]
    assert hardware["card"] and hardware["flags"]["fp32_matmul"] == "ieee"
    assert 0 < memory["device"] <= memory["device_reserved"]


@pytest.mark.parametrize("name", ["fp32", "pahq"])
def test_the_hooks_engine_finds_the_same(name: str) -> None:
    assert np.array_equal(discover(name, "hooks", device="cuda:0").kept, on_cpu(name).kept)


@pytest.mark.parametrize("engine", ["sparse", "hooks"])
@pytest.mark.parametrize("name", ["fp32", "pahq"])
def test_verified_estimates_are_the_cpus_and_repeat_to_the_bit(name: str, engine: str) -> None:
    first, again = (discover(name, engine, "verified", device="cuda:0") for _ in range(2))
    assert np.array_equal(first.kept, on_cpu(name, "verified").kept)
    assert np.array_equal(first.scores, again.scores)
    assert first.estimated is not None and first.estimated.any()


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="auto is one GPU only where there is one")
@pytest.mark.parametrize("name", ["fp32", "pahq"])
@pytest.mark.parametrize("where", [{"device_map": "auto"}, {"device_map": {"": 0}}], ids=str)
def test_every_way_to_load(name: str, where: dict[str, Any]) -> None:
    model = PAHQModel.from_pretrained("demo", PAHQConfig(**CONFIGS[name]), **where)
    assert model.patched.device.type == "cuda"
    for linear in model.patched.linears():
        tensors = [*linear.parameters(), *linear.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}


def test_a_model_that_is_moved() -> None:
    model = PAHQModel.from_pretrained("demo", PAHQConfig(**CONFIGS["pahq-fp32"])).to("cuda")
    circuit = model.discover(load_task("ioi", model.tokenizer, n=8), threshold=0.05, progress=False)
    assert np.array_equal(circuit.kept, on_cpu("pahq-fp32").kept)


@pytest.mark.parametrize(
    ("method", "metric"),
    [
        *(("eap-ig", "kl"), ("eap", "logit_diff"), ("hisp", "logit_diff")),
        *(("eap-ig-activations", "kl"), ("clean-corrupted", "kl"), ("gim", "logit_diff")),
    ],
)
def test_attribution_is_the_cpus_and_repeats_to_the_bit(method: Any, metric: Any) -> None:
    def scores(**where: Any) -> np.ndarray:
        model = PAHQModel.from_pretrained("demo", PAHQConfig("fp32"), **where)
        task = load_task("ioi", model.tokenizer, n=8)
        return np.asarray(model.attribute(task, method=method, metric=metric).scores)

    ours, again, exact = scores(device="cuda:0"), scores(device="cuda:0"), scores()
    assert np.array_equal(ours, again)
    assert np.abs(ours - exact).max() < 1e-4 * np.abs(exact).max()


def test_evaluation_and_generation() -> None:
    found = []
    for where in ({}, {"device": "cuda:0"}):
        model = PAHQModel.from_pretrained("demo", PAHQConfig("fp32"), **where)
        task, device = load_task("ioi", model.tokenizer, n=4), model.patched.device
        report = model.evaluate(on_cpu("fp32"), task)
        mask = task.attention_mask.to(device)
        corrupted = {"corrupted": task.corrupted_ids.to(device), "corrupted_mask": mask}
        with model.apply(on_cpu("fp32"), **corrupted):
            made = model.generate(
                task.clean_ids.to(device), attention_mask=mask, max_new_tokens=2, do_sample=False
            )
        found.append((report, made.cpu()))
    (exact, tokens), (ours, made) = found
    assert ours["kl"] == pytest.approx(exact["kl"], rel=1e-4, abs=1e-7)
    assert torch.equal(tokens, made)


def test_products_in_fp8() -> None:
    if not native_fp8(torch.device("cuda")):
        pytest.skip("no FP8 products on this card")
    weight = Float8Weight(torch.randn(256, 512, device="cuda"))
    everything = slice(0, 256), slice(0, 512)
    product = weight.dynamic(*everything)
    assert product is not None
    for rows in (1, 7, 160):
        x = torch.randn(rows, 512, device="cuda") * 1e-3
        x[0] = 0
        y = product(x)
        exact = x @ weight.dense(*everything).t()
        assert torch.isfinite(y).all() and not y[0].any()
        assert float((y - exact).norm()) <= 2**-4 * float(exact.norm())


def test_a_search_with_products_in_fp8() -> None:
    if not native_fp8(torch.device("cuda")):
        pytest.skip("no FP8 products on this card")
    assert np.array_equal(discover("fp8", "sparse", device="cuda:0").kept, on_cpu("pahq").kept)
