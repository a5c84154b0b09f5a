"""Figures of several measurements: their differences, their middle, and ranges that hold them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from calibrate.fit import Constant
from sim.host import Costs, Figure, Host


def widened(host: Host, other: Host) -> Host:
    """Ranges that hold what `other` has as well, where both have a figure."""
    rates = {link.name: link.bytes_per_s for link in other.links}
    links = tuple(
        replace(link, bytes_per_s=wider(link.bytes_per_s, rates.get(link.name))) for link in host.links
    )
    costs = {
        each.name: wider(getattr(host.costs, each.name), getattr(other.costs, each.name))
        for each in fields(Costs)
    }
    return replace(host, links=links, costs=Costs(**costs))


def wider(figure: Figure, other: Figure | None) -> Figure:
    ends = [f for f in (figure.low, figure.high) if f is not None]
    more = [] if other is None else [f for f in (other.low, other.high) if f is not None]
    if not ends or not more:
        return figure
    return replace(figure, low=min(*ends, *more), high=max(*ends, *more))


def difference(name: str, more: Constant, less: Constant, known: float = 0.0) -> Constant:
    """What `more` takes beyond `less` and `known`; its range is as wide as both allow."""
    ends = ((more.value, less.value), (more.low, less.high), (more.high, less.low))
    return Constant(name, *(max(0.0, a - b - known) for a, b in ends))


def middle(constants: Sequence[Constant]) -> Constant:
    """The median of several GPUs or pairs, with the range that all of theirs span."""
    return Constant(
        constants[0].name,
        float(np.median([c.value for c in constants])),
        min(c.low for c in constants),
        max(c.high for c in constants),
    )
