"""Benchmarks: `python -m benchmarks.acdc_speed --help`, `python -m benchmarks.growth --help`."""

import logging
import os

# Read when torch and torchao are imported, so it goes before them; it keeps their notices out of the output.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
