"""Which GPUs share a way to host memory, told by what they get from it alone and at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calibrate.fit import Constant
from calibrate.topology import HOST_MEMORY, uplink

Members = tuple[int, ...]
"""GPUs in order."""

UPLINK_BELOW = 0.90
"""Two GPUs that together get less than this part of what each gets alone share an uplink."""
SHARED_BELOW = 0.995
"""All GPUs at once that get less than this part of what their lanes and uplinks carry share host memory itself."""


def shared(
    counted: Mapping[Members, Constant], rates: Sequence[float]
) -> list[tuple[str, Members, Constant]]:
    """Names, members and bytes per second of what GPUs share: uplinks first, pair by pair, then what all share, if anything.

    `counted` has bytes per second of GPUs at once, copies' latencies included: of each alone, each pair and all of them, as far
    as they were measured. `rates` are those of the GPUs' own lanes.
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
    total = _capacity(everyone, counted, rates)
    if len(everyone) > 1 and total is not None and all(members != everyone for members, _ in found):
        grouped = {g for members, _ in found for g in members}
        expected = sum(min(f.value, sum(rates[g] for g in m)) for m, f in found)
        expected += sum(rates[g] for g in gpus if g not in grouped)
        if total.value < SHARED_BELOW * expected:
            found.append((everyone, total))
    return [
        (HOST_MEMORY if members == everyone else uplink(members), members, constant)
        for members, constant in found
    ]


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
