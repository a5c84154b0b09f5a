"""Which GPUs share a way to host memory, told by what they get from it alone and at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from calibrate.fit import Constant
from calibrate.topology import HOST_MEMORY, uplink
from sim.draft import fair

Members = tuple[int, ...]
"""GPUs in order."""

UPLINK_BELOW = 0.90
"""Two GPUs that together get less than this part of what each gets alone share an uplink."""
SHARED_BELOW = 0.995
"""Three GPUs or more at once that get less than this part of what all that is known of carries share host memory itself."""
ALL_GROUPS = 4
"""Of so many GPUs every group is measured; of more, pairs and all of them at once."""


def groups(gpus: Sequence[int]) -> list[Members]:
    """Which are measured at once: each alone, each pair, what is between where they are few, and all."""
    count = len(gpus)
    sizes = range(1, count + 1) if count <= ALL_GROUPS else (1, 2, count)
    return [members for size in sizes for members in combinations(gpus, size)]


def shared(
    counted: Mapping[Members, Constant], rates: Sequence[float]
) -> list[tuple[str, Members, Constant]]:
    """Names, members and bytes per second of what GPUs share: uplinks first, pair by pair, then host memory, by what three of them
    get of it at once, four, and so on; the more there are the less each gets, so that one figure for all would be too much for
    some.

    `counted` has bytes per second of GPUs at once, copies' latencies included, as far as they were measured (see `groups`). `rates`
    are those of the GPUs' own lanes.
    """
    gpus = range(len(rates))
    everyone = tuple(gpus)
    group = list(gpus)
    totals: dict[Members, Constant] = {}
    for a in gpus:
        for b in gpus[a + 1 :]:
            total = _capacity((a, b), counted, rates)
            if total is not None and total.value < UPLINK_BELOW * (rates[a] + rates[b]):
                totals[a, b] = total
                group = [group[a] if g == group[b] else g for g in group]
    found: list[tuple[Members, Constant]] = []
    for lead in dict.fromkeys(group):
        members = tuple(g for g in gpus if group[g] == lead)
        if len(members) > 1:
            best = max((t for pair, t in totals.items() if set(pair) <= set(members)), key=lambda t: t.value)
            found.append((members, _capacity(members, counted, rates) or best))
    uplinks = {members for members, _ in found}
    least = 2 if len(everyone) == 2 else 3  # of more, two that share little show in what three of them get
    for members in groups(everyone):
        if members in uplinks or len(members) < least:
            continue
        total = _capacity(members, counted, rates)
        if total is not None and total.value < SHARED_BELOW * _carried(members, found, rates):
            found.append((members, total))

    def name(members: Members) -> str:
        if members == everyone:
            return HOST_MEMORY
        return uplink(members) if members in uplinks else f"{HOST_MEMORY} {'+'.join(map(str, members))}"

    return [(name(members), members, constant) for members, constant in found]


def _carried(gpus: Members, found: Sequence[tuple[Members, Constant]], rates: Sequence[float]) -> float:
    """What GPUs get at once by their lanes and what they are known to share."""
    links = {str(g): rates[g] for g in gpus} | {str(members): total.value for members, total in found}
    routes = [(str(g), *(str(members) for members, _ in found if g in members)) for g in gpus]
    return sum(fair(routes, links))


def _capacity(gpus: Members, counted: Mapping[Members, Constant], rates: Sequence[float]) -> Constant | None:
    """Bytes per second of several GPUs at once, None where that was not measured.

    As the part that they kept of what the same copies got alone, times their lanes' rates: both counts have the copies'
    latencies in them, and a link's rate has not.
    """
    at_once = counted.get(gpus)
    if at_once is None:
        return None
    alone = sum(counted[(g,)].value if (g,) in counted else rates[g] for g in gpus)
    scale = sum(rates[g] for g in gpus) / alone
    return Constant("bytes_per_s", *(scale * x for x in (at_once.value, at_once.low, at_once.high)))
