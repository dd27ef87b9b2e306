"""Which component is kept in which format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pahq_hf.errors import ConfigError
from pahq_hf.precision.active_components import Component, Part
from pahq_hf.precision.formats.registry import find_format
from pahq_hf.precision.linear import PAHQLinear
from pahq_hf.precision.weight_block import Layout, WeightBlock


def formats_of(components: Sequence[Component], policy: Mapping[str, str], default: str) -> list[str]:
    """The format of every component: the first pattern of the policy that matches its name.

    Args:
        components: Names such as `a0.h1` and `m0`.
        policy: Formats by pattern (`m*`, `a0.*`), in order of precedence.
        default: For components that no pattern matches.

    Returns:
        One format for each.

    Raises:
        ConfigError: If a pattern matches no component.
    """
    for pattern in policy:
        if not any(fnmatchcase(name, pattern) for name in components):
            raise ConfigError(
                f"the policy's pattern {pattern!r} matches no component; they are named like a0.h1 and m0"
            )
    return [
        next((fmt for pattern, fmt in policy.items() if fnmatchcase(name, pattern)), default)
        for name in components
    ]


def layouts(
    parts: Mapping[Component, Sequence[Part]], policy: Mapping[str, str], default: str
) -> dict[PAHQLinear, Layout]:
    """The formats of every projection's blocks.

    Weights that several heads share (keys and values of a group) get the finest of their formats.

    Args:
        parts: The weight blocks of every component.
        policy: Formats by pattern.
        default: For the rest.

    Returns:
        For every projection the formats of blocks that make it up; one where they are all the same.

    Raises:
        ConfigError: If a pattern matches no component.
    """
    found: dict[PAHQLinear, dict[tuple[int, int], tuple[WeightBlock, str]]] = {}
    for fmt, blocks in zip(formats_of(list(parts), policy, default), parts.values(), strict=True):
        for linear, block in blocks:
            pieces = found.setdefault(linear, {})
            key = block.rows.start, block.cols.start
            other = pieces[key][1] if key in pieces else fmt
            pieces[key] = block, max(fmt, other, key=lambda name: find_format(name).fineness)
    return {linear: _merged(linear, list(pieces.values())) for linear, pieces in found.items()}


def _merged(linear: PAHQLinear, pieces: list[tuple[WeightBlock, str]]) -> Layout:
    formats = {fmt for _, fmt in pieces}
    return [(linear.whole, formats.pop())] if len(formats) == 1 else pieces
