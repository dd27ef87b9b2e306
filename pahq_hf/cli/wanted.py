"""What commands that search have in common: from options to a loaded model, and what is said at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pahq_hf.circuit.files import (
    CIRCUIT_NAME,
    SWEEP_NAME,
    check_creatable,
    refuse_others_files,
    refuse_run,
    refuse_sweep,
)
from pahq_hf.circuit.json_reader import read_json
from pahq_hf.cli.declared import chosen_options
from pahq_hf.cli.ending import print_end
from pahq_hf.cli.groups import EngineChoice, ModelChoice, RunChoice, SearchChoice
from pahq_hf.cli.output import exit_unverified, print_json, print_rich, say_resumed
from pahq_hf.config import PAHQConfig
from pahq_hf.errors import CircuitError, ConfigError
from pahq_hf.precision.threads import take_threads
from pahq_hf.search.journal import check_asked
from pahq_hf.search.kind import SearchKind
from pahq_hf.search.progress import make_progress
from pahq_hf.search.settings import RunSettings
from pahq_hf.tasks.catalog import foreseen_metric

if TYPE_CHECKING:
    from pahq_hf.circuit.circuit import Circuit
    from pahq_hf.model import PAHQModel
    from pahq_hf.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Wanted:
    """A search that the command line asks for, ready to begin.

    Attributes:
        options: The search's.
        model: The model, loaded.
        task: The prompts, as its tokenizer reads them.
        how: Keywords that `discover`, `attribute` and `sweep` of a model share.
    """

    options: Any
    model: PAHQModel
    task: Task
    how: Mapping[str, Any]


def prepare(
    kind: SearchKind[Any],
    given: Mapping[str, Any],
    asked: SearchChoice,
    out: Path,
    *,
    batch: int | None = None,
    sweep: Sequence[float] | None = None,
) -> Wanted:
    """Check everything that can be checked without a model, then load it.

    Args:
        kind: The search.
        given: What was given of its options.
        asked: The model, the prompts, and how the run computes.
        out: Its folder.
        batch: Candidates tried at once.
        sweep: Thresholds of a sweep; None for a run of one search.

    Raises:
        PAHQError: If an option is out of range, the folder is taken, or model or prompts cannot be loaded.
    """
    run, limits = asked.run, asked.limits
    asked.task.check()
    options, engine = kind.make_options(chosen_options(kind, given)), limits.config(batch)
    precision = asked.precision.config()
    kind.foresee(options, foreseen_metric(asked.task.task, options.metric), precision)
    _check_limits(kind, options, asked.limits)
    _check_folder(out, run, is_sweep=sweep is not None)
    if run.resume and sweep is None and not kind.is_own:  # one's own search may resolve its options otherwise
        check_asked(out, kind.name, options.to_dict(), precision.regime, asked.task.source())
    model = _load(asked.model, precision, run, out)
    task = asked.task.load(model.tokenizer)
    if run.resume:
        finished = (out / CIRCUIT_NAME).exists() if sweep is None else _holds(out, sweep)
        what = "run" if sweep is None else "sweep"
        say_resumed(out, what, finished=finished, engine=limits.engine, threads=run.threads)
    how = {
        "engine": engine,
        "out": out,
        "resume": run.resume,
        "take_over": run.take_over,
        "progress": not run.as_json,
    }
    return Wanted(options, model, task, how)


def _check_limits(kind: SearchKind[Any], options: Any, limits: EngineChoice) -> None:
    """Check that a search has a use for what is said of engines.

    Raises:
        ConfigError: If not.
    """
    if kind.is_own or getattr(options, "has_engine", True):
        return
    given = {
        "engine": limits.engine is not None,
        "memory-budget": limits.memory_budget is not None,
        "activation-store": limits.activation_store != "ram",
    }
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"method {kind.name!r} takes no --{name}, which is of --method exact: it has no engine"
            )


def _check_folder(out: Path, run: RunChoice, *, is_sweep: bool) -> None:
    """Check that a run or sweep may go into a folder, before anybody waits for a model.

    Raises:
        RunError: If not.
    """
    from pahq_hf.search.lock import check_free

    check_free(out, take_over=run.take_over)
    own, other = (refuse_sweep, refuse_run) if is_sweep else (refuse_run, refuse_sweep)
    other(out)
    if not run.resume:
        own(out, "continue it with --resume or choose another folder")
    refuse_others_files(out)
    check_creatable(out)


def _load(model: ModelChoice, precision: PAHQConfig, run: RunChoice, out: Path) -> PAHQModel:
    from pahq_hf.model import PAHQModel

    found = RunSettings.of_run(out) if run.resume else RunSettings()
    take_threads(run.threads, found.threads)
    arguments = model.source.arguments(
        device=model.device, dtype=model.dtype, resumed=found, base_model=model.base_model
    )
    with make_progress(not run.as_json).phase(f"loading {model.model}"):
        return PAHQModel.from_pretrained(model.model, precision, **arguments)


def _holds(out: Path, thresholds: Sequence[float]) -> bool:
    """Whether a folder holds a finished sweep at just these thresholds."""
    try:
        rows = read_json(out / SWEEP_NAME).get("rows")
        return {float(row["threshold"]) for row in rows or ()} == set(thresholds)
    except (CircuitError, KeyError, TypeError, ValueError):
        return False


def conclude(
    out: Path,
    facts: Mapping[str, Any],
    table: Callable[[], Any],
    command: str,
    *circuits: Circuit,
    as_json: bool,
) -> None:
    """Print what was found, as JSON or for people; ends with exit code 1 where it is not confirmed.

    Args:
        out: Where it lies.
        facts: What is said of it in JSON.
        table: Makes the table for people.
        command: What comes next.
        *circuits: The circuits.
        as_json: Whether JSON is printed.
    """
    if as_json:
        print_json({"out": str(out), **facts, "next": command})
    else:
        print_rich(table())
        print_end(out, command)
    exit_unverified(*circuits)
