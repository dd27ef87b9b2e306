"""The agreement benchmark counts what it says it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import agreement
from benchmarks.variants import Variant
from pahq_hf import Circuit
from pahq_hf.errors import ConfigError


@pytest.mark.exhaustive
def test_rows_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["rtn", "pahq:once:margin=0", "pahq:int8:compute=fp32:margin=inf"]
    asked = ["demo", "--n", "2", "--threshold", "0.5", "--out", str(tmp_path), "--json", "--rows", *rows]
    assert agreement.main(asked) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    fp32, rtn, once, sure = found
    assert [row["name"] for row in found] == ["fp32", *rows]
    assert fp32["first_flip"] is None and fp32["jaccard"] == 1 and fp32["median_error"] == 0
    assert once["median_error"] > 0 and rtn["median_error"] > 0
    assert sure["first_flip"] is None and sure["flipped"] == 0 and sure["kept"] == fp32["kept"]
    assert sure["looks"] >= 100 and rtn["looks"] == 0
    assert agreement.main(asked) == 0  # finished runs are not repeated
    assert json.loads(capsys.readouterr().out) == found


def test_figures_of_a_flipped_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["demo", "--n", "4", "--threshold", "0.05", "--out", str(tmp_path), "--json", "--rows", "fp32"]
    assert agreement.main(asked) == 0
    capsys.readouterr()
    exact = Circuit.from_pretrained(tmp_path / "fp32")
    other = Circuit.from_pretrained(tmp_path / "fp32")
    tests = list(agreement.tests_in_order(exact))
    reader, writer, kept, _ = tests[9]
    order = exact.graph.reader_order("acdc")
    places = [order.index(test[0]) for test in tests]
    assert places == sorted(places)
    other.kept[reader, writer] = not kept
    large = [number for number, test in enumerate(tests[:9]) if abs(test[3]) >= 0.05 / 4]
    for number in large:
        other.scores[tests[number][0], tests[number][1]] *= 1.1
    figures = agreement.compare("other", exact, other)
    assert figures.first_flip == 10 and figures.flipped == 1
    union = exact.edge_count + (0 if kept else 1)
    assert figures.jaccard == (union - 1) / union
    assert large and np.isclose(figures.median_error, 0.1)


def test_variants_are_read_and_refused() -> None:
    row = Variant.parse("pahq:int8:active=both:margin=0.1:once")
    assert (row.pahq.regime, row.pahq.format, row.pahq.active) == ("pahq", "int8", "both")
    assert row.margin == 0.1 and row.once
    with pytest.raises(ConfigError, match="format"):
        Variant.parse("pahq:int7")
    with pytest.raises(ConfigError, match="precision"):
        Variant.parse("exact")
