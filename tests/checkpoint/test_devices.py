"""Devices that cannot be used, in words of ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pahq_hf.checkpoint.placement import usable_device
from pahq_hf.errors import ConfigError


@pytest.mark.parametrize("name", ["mps", "xpu", "xpu:1", "hpu", "privateuseone", "abacus", "", "cuda:x", 99])
def test_no_backends_words_are_passed_on(name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be used: ") as caught:
        usable_device(name)
    said = str(caught.value)
    assert "here" in said and "\n" not in said and len(said) < 200
    assert not any(word in said for word in ("aten::", "backend", "linked", "compiled", "module", "assert"))


def test_a_device_without_float64_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPS says it; on a machine that has one."""

    def empty(*_: Any, dtype: Any = None, **__: Any) -> Any:
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
        )

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="'mps' cannot be used: it has no float64"):
        usable_device("mps")
    with pytest.raises(ConfigError, match="'mps:3' cannot be used: here there is cpu and 1 of mps"):
        usable_device("mps:3")
