"""The exceptions this package raises on purpose.

Each carries one line that says what is wrong and what to do about it. The command line prints that
line and exits with code 2; anything else that escapes is a bug.
"""

from __future__ import annotations


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


class DriftError(PAHQError):
    """A search's final metric is not what the hooks engine finds for its circuit: a bug, please report it."""


def first_line(error: Exception, longest: int = 300) -> str:
    """The first line of what an error says, for one line of our own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:longest] if lines else type(error).__name__
