"""How a run computes, kept in its journal's header so that whoever resumes it goes on in the same way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from pahq_hf.circuit.files import ANSWERS_NAME, DIRECTION_NAMES, JOURNAL_NAME, ORIGINAL_NAME, SWEEP_PREFIX
from pahq_hf.circuit.json_reader import OWN_BYTES, parse_json, read_regular
from pahq_hf.config import Compute, EngineName


@dataclass(frozen=True)
class RunSettings:
    """What can change a score in its last bits; None where nothing is known.

    A run may be resumed with other threads, on another device or by another engine, if that is asked for.

    Attributes:
        threads: Threads of the processor.
        engine: `sparse` or `hooks`.
        device: Torch device.
        compute: Dtype of products with differences. The run's precision says it too, and that pins the run:
            here it tells what `auto` was.
    """

    threads: int | None = None
    engine: EngineName | None = None
    device: str | None = None
    compute: Compute | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def of_run(cls, folder: str | Path) -> RunSettings:
        """The settings of the run or sweep in a folder; of what is damaged, or none, nothing is known.

        Whether a run is whole and the one asked for is checked by those who read all of it.
        """
        folder = Path(folder)
        try:
            runs = sorted(folder.glob(f"{SWEEP_PREFIX}*/{JOURNAL_NAME}"))
            parts = (folder, folder / ORIGINAL_NAME)
            runs += [part / name / JOURNAL_NAME for part in parts for name in ("", *DIRECTION_NAMES)]
        except OSError:  # a name that is too long, for one
            runs = []
        for path in (folder / JOURNAL_NAME, *runs, folder / ANSWERS_NAME):
            try:
                header = parse_json(read_regular(path, OWN_BYTES).partition(b"\n")[0])
            except (OSError, ValueError):
                continue
            if isinstance(header, dict):
                return cls._of_header(header)
        return cls()

    @classmethod
    def _of_header(cls, header: dict[str, Any]) -> RunSettings:
        settings, precision = header.get("settings"), header.get("precision")
        found = settings if isinstance(settings, dict) else {}
        compute = precision.get("compute") if isinstance(precision, dict) else None
        threads, engine, device = (found.get(name) for name in ("threads", "engine", "device"))
        return cls(
            threads=threads if type(threads) is int and threads > 0 else None,
            engine=engine if engine in get_args(EngineName) else None,
            device=device if isinstance(device, str) else None,
            compute=compute if compute in get_args(Compute) else None,
        )
