"""FP32 is FP32 inside, whatever the caller has switched on, and the caller's switches are as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pahq_hf import PAHQConfig, PAHQModel
from pahq_hf.precision.flags import exact_products, product_flags
from pahq_hf.precision.sums import add_rows
from tests.models import FAMILIES, random_task

CUDA: Any = torch.backends.cuda.matmul
CPU: Any = torch.backends.mkldnn.matmul


def state() -> dict[str, Any]:
    """Every switch; what cannot be read because old and new ones were mixed is None."""

    def read(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError:
            return None

    return {
        "cuda": CUDA.fp32_precision,
        "cpu": CPU.fp32_precision,
        "old": read(lambda: CUDA.allow_tf32),
        "name": read(torch.get_float32_matmul_precision),
        "reductions": CUDA.allow_bf16_reduced_precision_reduction,
    }


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    reductions = CUDA.allow_bf16_reduced_precision_reduction
    yield
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = CPU.fp32_precision = "none"
    CUDA.allow_bf16_reduced_precision_reduction = reductions


def old_switch() -> None:
    CUDA.allow_tf32 = True


def new_switch() -> None:
    CUDA.fp32_precision = "tf32"


def by_name(name: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(name)


def cpu_only() -> None:
    CPU.fp32_precision = "bf16"


def no_reductions() -> None:
    CUDA.allow_bf16_reduced_precision_reduction = False


SWITCHES = {
    "nothing": lambda: None,
    "allow_tf32": old_switch,
    "fp32_precision": new_switch,
    "high": by_name("high"),
    "medium": by_name("medium"),
    "cpu": cpu_only,
    "no reductions": no_reductions,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_switches_are_off_inside_and_as_they_were_outside(switch: Callable[[], None]) -> None:
    switch()
    before = state()
    with pytest.raises(KeyError), exact_products():
        inside = state()
        with exact_products():  # a run inside another
            assert state() == inside
        raise KeyError
    assert inside["cuda"] in ("ieee", "none") and inside["cpu"] in ("ieee", "none")
    assert inside["old"] is False and inside["name"] == "highest"  # PyTorch fails where these disagree
    assert inside["reductions"] is False
    assert state() == before


def watched(model: PAHQModel, seen: list[Any]) -> PAHQModel:
    """Note the switches at every product of the last MLP, and the dtype it is computed in."""

    def note(_: nn.Module, __: Any, y: Tensor) -> None:
        seen.append((product_flags(), CPU.fp32_precision, y.dtype))

    model.patched.mlp_linears(model.patched.layers[-1])[-1].register_forward_hook(note)
    return model


def test_every_way_to_run_a_model_has_them_off() -> None:
    torch.set_float32_matmul_precision("medium")
    before = state()
    seen: list[Any] = []
    model, task = watched(PAHQModel(FAMILIES["llama"](), PAHQConfig("fp32")), seen), random_task()

    def apply() -> None:
        with model.apply(circuit):
            model(input_ids=task.clean_ids)

    circuit = model.discover(task, threshold=0.5, progress=False)
    ways: dict[str, Callable[[], Any]] = {
        "discover": lambda: model.discover(task, threshold=0.5, progress=False),
        "sweep": lambda: model.sweep(task, thresholds=[0.5], progress=False),
        "attribute": lambda: model.attribute(task, method="eap-ig", steps=1),
        "evaluate": lambda: model.evaluate(circuit, task),
        "apply": apply,
    }
    for name, way in ways.items():
        seen.clear()
        way()
        assert seen, name
        for flags, cpu, _ in seen:
            assert flags == {"fp32_matmul": "ieee", "bf16_reduced_precision_reduction": False}, name
            assert cpu == "ieee", name
        assert state() == before, name


def test_autocast_changes_nothing() -> None:
    task = random_task()
    circuits = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model = PAHQModel(FAMILIES["llama"](), PAHQConfig("fp32"))
            circuits.append(model.discover(task, threshold=0.01, progress=False))
            assert torch.is_autocast_enabled("cpu") is enabled
    assert np.array_equal(circuits[0].scores, circuits[1].scores)


def test_rows_are_added_where_they_belong() -> None:
    index, rows = torch.tensor([2, 0, 2, 2]), torch.randn(4, 3)
    total = torch.ones(4, 3)
    assert add_rows(total, index, rows) is total
    for place in range(4):
        wanted = 1 + rows[index == place].sum(0)
        assert math.isclose(float((total[place] - wanted).abs().max()), 0, abs_tol=1e-6)


@pytest.mark.cuda
def test_sums_by_index_repeat_to_the_bit_on_a_gpu() -> None:
    index, rows = torch.randint(0, 7, (20_000,)).cuda(), torch.randn(20_000, 65, device="cuda")
    sums = [add_rows(torch.zeros(7, 65, device="cuda"), index, rows) for _ in range(5)]
    assert all(torch.equal(sums[0], other) for other in sums)
    exact = add_rows(torch.zeros(7, 65, dtype=torch.float64), index.cpu(), rows.cpu().double())
    assert float((sums[0].cpu() - exact).abs().max()) < 1e-2


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["high", "medium"])
def test_products_are_fp32_on_a_gpu(name: str) -> None:
    torch.set_float32_matmul_precision(name)
    a, b = torch.randn(256, 1024, device="cuda"), torch.randn(1024, 256, device="cuda")
    exact = a.double() @ b.double()
    with exact_products():
        inside = float((a @ b - exact).norm() / exact.norm())
    outside = float((a @ b - exact).norm() / exact.norm())
    assert inside < 2e-6 < 1e-4 < outside
