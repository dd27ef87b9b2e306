"""The exceptions this package raises on purpose.

Each carries one line that says what is wrong and what to do about it. The command line prints that
line and exits with code 2; anything else that escapes is a bug.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from os import PathLike


class PAHQError(Exception):
    """Base of every error a caller can act upon."""


class ConfigError(PAHQError):
    """An argument or a configuration value is out of range, or two of them contradict each other."""


class UnsupportedModelError(PAHQError):
    """The model's family is unknown, or the model uses a feature whose circuit graph is not defined."""


class ModelLoadError(PAHQError):
    """A checkpoint is missing, truncated or changed since it was loaded."""


class SelfCheckError(PAHQError):
    """The patched model does not reproduce the untouched Hugging Face forward pass."""


class TaskError(PAHQError):
    """A task's data cannot be used: missing columns, unequal lengths, answers of several tokens, ..."""


class MetricError(PAHQError):
    """A metric lacks the answers it needs, or came out as NaN."""


class CircuitError(PAHQError):
    """A circuit file is damaged, or belongs to another model."""


class HubError(PAHQError):
    """The Hugging Face Hub lacks something, refuses it, or cannot be reached."""


class RunError(PAHQError):
    """An output folder cannot be written, or holds a different run."""


class OutOfMemoryError(PAHQError):
    """Something does not fit into a device's memory, however little of it is computed at once."""


class UnverifiedWarning(UserWarning):
    """A search's final metric is not what the hooks engine finds for its circuit, by more than rounding."""


class AblationWarning(UserWarning):
    """A circuit runs under another ablation than it was found under, or answers poorly under this one."""


def first_line(error: BaseException, longest: int = 300) -> str:
    """The first line of what an error says, for one line of our own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:longest] if lines else type(error).__name__


_SOURCE = "__pahq_source__"


@contextmanager
def code_of(source: str) -> Iterator[None]:
    """Run somebody's own code: what it raises is passed on as it is, and `source_of` tells where it is from.

    Args:
        source: Whose code it is, in words: `search 'mine'`.
    """
    try:
        yield
    except Exception as error:
        if source_of(error) is None:  # the innermost is nearest to it
            with suppress(AttributeError):  # of one with slots it is not told
                setattr(error, _SOURCE, source)
        raise


def source_of(error: BaseException) -> str | None:
    """Whose code raised an exception, in words; None if it is nobody's own."""
    found = getattr(error, _SOURCE, None)
    return found if isinstance(found, str) else None


def describe(value: object) -> str:
    """What somebody gave in place of something else, in one line."""
    shown = " ".join(repr(value).split())
    return f"{type(value).__name__}: {shown:.60}"


def check_place(name: object) -> None:
    """Check that what `from_pretrained` is given is a name.

    Raises:
        ConfigError: If it is something else.
    """
    if not isinstance(name, (str, PathLike)):
        raise ConfigError(f"from_pretrained takes a name or a folder; got {describe(name)}")


def check_registered(given: object, kind: type, what: str, built_in: Container[str]) -> None:
    """Check what somebody registers under a name of its own.

    Args:
        given: What is registered.
        kind: What it has to be.
        what: What that is called: `register_...` takes it.
        built_in: Names that are taken.

    Raises:
        ConfigError: If it is something else, its name is none, or that of one in the package.
    """
    if not isinstance(given, kind):
        raise ConfigError(f"register_{what} takes a {kind.__name__}; got {describe(given)}")
    name = getattr(given, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ConfigError(f"a {what}'s name is of lower case letters, digits, _ and -; got {name!r}")
    if name in built_in:
        raise ConfigError(f"{what} {name!r} is built in: give yours another name")


def check_names(
    given: Iterable[str],
    known: Sequence[str],
    where: str,
    hints: Mapping[str, str] | None = None,
    otherwise: str = "",
) -> None:
    """Check that options are known.

    Args:
        given: Their names.
        known: The names there are.
        where: What takes them.
        hints: What to do instead of some that are not, by name.
        otherwise: What to do instead of the rest.

    Raises:
        ConfigError: Naming the first unknown one, and the nearest right one.
    """
    for name in given:
        if name in known:
            continue
        close = get_close_matches(name, known, n=1)
        if name in (hints or {}):
            advice = (hints or {})[name]
        elif close:
            advice = f"did you mean {close[0]!r}?"
        else:
            advice = f"it knows {', '.join(known)}" + (f"; {otherwise}" if otherwise else "")
        raise ConfigError(f"{where} has no option {name!r}: {advice}")
