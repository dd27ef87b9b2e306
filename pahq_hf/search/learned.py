"""What learning has come to, kept in a run's folder so that an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar, cast

from numpy.typing import NDArray

from pahq_hf.circuit.files import LEARNED_NAME
from pahq_hf.circuit.graph import Graph
from pahq_hf.search.course import Passed
from pahq_hf.search.journal import check_header
from pahq_hf.search.kept_arrays import DAMAGED, cannot_continue, checksum, read_arrays, save_arrays
from pahq_hf.search.rounds import as_float
from pahq_hf.search.work import Work


class State(Protocol):
    """What a search has learned after some levels: a frozen dataclass whose fields but `level` are arrays."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def level(self) -> int:
        """Levels that are done."""

    def check(self, graph: Graph) -> None:
        """Check that it can be of a graph.

        Raises:
            ValueError: If not.
        """


StateT = TypeVar("StateT", bound=State)


@dataclass(frozen=True)
class Level:
    """What the journal says of a level.

    Attributes:
        level: How many are done.
        learned: Checksum of what it came to.
        edges: Of its circuit.
        metric: Of that circuit, on the pairs that are searched.
        validation: On those that judge; None if there are none.
    """

    level: int
    learned: str
    edges: int
    metric: float
    validation: float | None = None

    @classmethod
    def of(cls, learned: State, passed: Passed) -> Level:
        """What is to be said of a level and its circuit."""
        return cls(learned.level, checked(learned), passed.size, passed.metric, passed.validation)

    def to_json(self) -> dict[str, Any]:
        """As a step of a journal."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def read(cls, step: Mapping[str, Any]) -> Level:
        """Read what `to_json` made.

        Raises:
            TypeError: If a value is of another type; or KeyError.
        """
        judged = step.get("validation")
        found = cls(step["level"], step["learned"], step["edges"], as_float(step["metric"]), judged)
        if type(found.level) is not int or type(found.edges) is not int or type(found.learned) is not str:
            raise TypeError("a value is of another type")
        return found if judged is None else replace(found, validation=as_float(judged))


_WHAT = "what it has learned"


def keep_scores(work: Work[Any], learned: State) -> None:
    """Keep the state after a level in the run's folder, if it has one.

    Raises:
        RunError: If it cannot be written.
    """
    if work.folder is not None:
        notes = {"header": dict(work.header), "level": learned.level, "learned": checked(learned)}
        save_arrays(work.folder / LEARNED_NAME, _arrays(learned), notes)


def keep_level(work: Work[Any], learned: State, passed: Passed) -> Level:
    """Keep what a level came to in the journal, and what its circuit measured.

    Args:
        work: The search.
        learned: The state after the level.
        passed: Its circuit.

    Returns:
        What the journal says of it.

    Raises:
        RunError: If it cannot be written.
    """
    level = Level.of(learned, passed)
    work.keep(level.to_json())
    return level


def kept_levels(work: Work[Any], last: int) -> list[Level]:
    """The levels that the journal of an interrupted run tells of, its second step and those that follow.

    Args:
        work: The search.
        last: The last level there is.

    Raises:
        RunError: If a step is none of theirs.
    """
    found = []
    for number, step in enumerate(work.steps[1 : 1 + last], start=1):
        if "removed" in step:  # learning ended early
            break
        try:
            level = Level.read(step)
            if level.level != number:
                raise ValueError(f"it is not level {number}")
        except (KeyError, ValueError, TypeError) as error:
            raise work.damaged(number + 1, f": {error}") from error
        found.append(level)
    return found


def load_scores(work: Work[Any], levels: Sequence[Level], kind: type[StateT]) -> StateT | None:
    """The state that an interrupted run kept; None if it kept none.

    Args:
        work: The search.
        levels: What the journal tells of; the state may be one level ahead.
        kind: What the search learns.

    Raises:
        RunError: If it is missing, damaged, or of another run.
    """
    folder = work.folder
    if folder is None or not work.is_begun or not levels:
        return None
    path = folder / LEARNED_NAME
    try:
        arrays, notes = read_arrays(path, (entry.name for entry in fields(kind) if entry.name != "level"))
        level, header = notes["level"], dict(notes["header"])
        if type(level) is not int or not header:
            raise ValueError("it does not say what it is")
        learned: StateT = cast(Any, kind)(level=level, **arrays)
        learned.check(work.graph)
        if notes["learned"] != checked(learned):
            raise ValueError("its scores do not have their checksum")
        if level not in (len(levels), len(levels) + 1):
            raise ValueError("it is not at the level of the journal")
        if level == len(levels) and levels[-1].learned != checked(learned):
            raise ValueError("its scores do not have their checksum")
    except DAMAGED as error:
        raise cannot_continue(path, _WHAT, error) from error
    check_header(header, work.header, folder)
    return learned


def checked(learned: State) -> str:
    """A checksum of what a level came to."""
    return checksum(_arrays(learned).values(), of=str(learned.level))


def _arrays(learned: State) -> dict[str, NDArray[Any]]:
    names = [entry.name for entry in fields(learned) if entry.name != "level"]
    return {name: getattr(learned, name) for name in names}
