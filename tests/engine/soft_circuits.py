"""The referee of circuits, by the graph's numbers of edges."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pahq_hf.circuit.graph import Graph
from tests.engine.test_slopes import referee_metric
from tests.referee import Referee

Floats = NDArray[np.float64]


class SoftReferee:
    """The referee's metric of a circuit of which each edge has a share. [readers, writers]"""

    def __init__(self, judge: Referee, graph: Graph) -> None:
        self._judge, self._shape = judge, (len(judge.readers), len(judge.writers))
        self._rows = [judge.reader_index[reader.name] for reader in graph.readers]
        self._columns = [judge.writer_index[writer.name] for writer in graph.writers]

    def __call__(self, shares: Floats) -> float:
        gone = torch.zeros(self._shape, dtype=torch.float64)
        for r, w in np.argwhere(shares != 1):
            gone[self._rows[r], self._columns[w]] = 1 - shares[r, w]
        return referee_metric(self._judge, gone)
