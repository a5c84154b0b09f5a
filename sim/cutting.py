"""Where to cut what is copied, so that layers wait least: for one lane and a number of waits, the best cuts there are.

Let storages be copied in the order in which layers need them, in groups of neighbours that arrive at once. Only the ends of
what one layer needs are worth a cut: a layer that has half of its bytes still waits. Call them boundaries 1..n; B_i are the
bytes up to boundary i, c_i the time of the layers that can run from there to the next, L the copy latency, r the rate of all
lanes, w a wait. Counted from when the first copy can begin, the k-th group, where it ends at boundary i, has landed at

    D(k, i) = k L + B_i / r

and, if only copies held them up, the layers up to there have run at

    F(0, 0) = -infinity        F(k, i) = w + min over j < i of max(F(k-1, j), D(k, i)) + c_{j+1} + .. + c_i

Of all j with F(k-1, j) <= D(k, i) the last is the best; of all others the one with the least F(k-1, j) - C_j, the time that
layers have stood still (C_j the sum of c up to j). D goes up with i, so both are kept in heaps while i does, and n boundaries and
K groups take n K log n steps.

When the first layer may run, a launch say, is a term of its own in that maximum, whatever the cuts: a plan of K groups ends at

    max(first layer + C_n + K w, first copy + F(K, n))

so the same cuts are best for every head: w is what a wait costs beside copies, by launch. One that copies hold up costs more: with
all D(k, i) later by the difference all F(k, i) are, and the cuts are the same. Over several lanes a group is split among them, and
all lanes count as one. Reads in place take their time alone and the lane's. A simulation says what a cut is really worth; here is
only where to look.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from math import inf

from sim.draft import SMALLEST_CHUNK_BYTES, Draft, Path, Range, ReadKey, evenly, runs_of, shares
from sim.host import Costs, Host
from sim.plan import Launch
from sim.profile import Profile

MOST_BOUNDARIES = 256
"""On longer networks boundaries with little between them are one."""


class Cutter:
    """What all cuts for the same reads, paths and launch have in common. A draft's groups, parts and head may differ."""

    def __init__(self, draft: Draft, profile: Profile, host: Host) -> None:
        self.profile, self.host = profile, host
        self.paths: tuple[Path, ...] = draft.paths
        self.rates = shares([host.h2d_route(path[0]) for path in self.paths], host)
        self.starts: list[int] = []
        """By boundary, the byte of the arena at which a group that follows the one before it begins."""
        self.stops: list[int] = []
        self.first: list[int] = []
        """By boundary, the first of its run: no chunk crosses from one run of neighbours to the next."""
        layers: list[int] = []
        """By boundary, the first layer that waits for its bytes."""
        runs = runs_of(draft, profile.network)
        total = sum(run[-1][2] - run[0][1] for run in runs)
        least = total / MOST_BOUNDARIES if len(profile.layers) > MOST_BOUNDARIES else 0
        for run in runs:
            first, begin = len(self.stops), run[0][1]
            waits = run[0][0]
            for (layer, _, stop), after in zip(run, [*run[1:], None], strict=True):
                if after is not None and (after[0] == layer or stop - begin < least):
                    continue
                self.starts.append(begin)
                self.stops.append(stop)
                self.first.append(first)
                layers.append(waits)
                if after is not None:
                    begin, waits = stop, after[0]
        sizes = [stop - start for start, stop in zip(self.starts, self.stops, strict=True)]
        sums = [0, *accumulate(sizes)]
        ran = [0.0, *accumulate(_run_ns(profile, draft.direct))]
        self.before_ns = ran[layers[0]] if layers else ran[-1]
        """Layers that need no copy."""
        ends = [ran[at] for at in [*layers[1:], len(ran) - 1]] if layers else []
        self.run_ns = [0.0, *(end - self.before_ns for end in ends)]
        """Up to each boundary, the layers that can run once it has landed and those before them."""
        costs = host.costs
        taken = [0.0, *accumulate(_carried_ns(profile, draft.direct, costs))]
        share = self.rates[0] / sum(self.rates)
        held = [0.0, *(taken[at] * share for at in layers)]
        bytes_per_ns = sum(self.rates) * 1e-9
        self.landed_ns = [size / bytes_per_ns + ns for size, ns in zip(sums, held, strict=True)]
        """B_i / r by boundary, and what layers before it take of the lanes by reading in place."""

        self.wait_ns = profile.cut_ns(costs, draft.launch)
        """w."""
        self._late_ns = max(0.0, costs.wait_blocked_ns.value - self.wait_ns)
        """What a wait that copies hold up costs beyond w."""
        self._back: list[list[int]] = []
        """By group and boundary that it ends at, the boundary that the group before it ends at."""
        self._ends: list[float] = []
        """By number of groups, F(K, n)."""
        self._row = [-inf, *(inf for _ in self.stops)]
        """The last F(k, i), by i."""

    def cuts(self, draft: Draft) -> tuple[Range, ...]:
        """Ranges in the order in which they are needed: `draft.groups` of them, or as many as there can be, each split in parts."""
        bounds = [len(self.stops)]
        for came in reversed(self._groups(self.count(draft))):
            bounds.append(came[bounds[-1]])
        groups = [(self.starts[a], self.stops[b - 1]) for a, b in pairwise(reversed(bounds))]
        return tuple(part for group in groups for part in self._parts(group, draft.part_bytes))

    def finish_ns(self, draft: Draft) -> float:
        """When a plan would end, as the recurrence has it."""
        count = self.count(draft)
        first_copy, first_layer = self._begins(draft, count * len(self.paths))
        unheld = first_layer + self.before_ns + self.run_ns[-1] + count * self.wait_ns
        if not count:
            return unheld
        self._groups(count)
        return max(unheld, first_copy + self._late_ns + self._ends[count - 1])

    def count(self, draft: Draft) -> int:
        """Groups that its cuts are: those asked for, one more for each gap, and no more than there are boundaries."""
        return min(len(set(self.first)) - 1 + draft.groups, len(self.stops)) if self.stops else 0

    def _groups(self, count: int) -> list[list[int]]:
        """The recurrence of the module's docstring, as far as it takes for so many groups: the way back through it."""
        while len(self._back) < count:
            self._next()
        return self._back[:count]

    def _next(self) -> None:
        """One group more."""
        k, end = len(self._back) + 1, len(self.stops)
        late, wait = k * self.host.costs.copy_latency_ns.value, self.wait_ns
        finish, ran, first, landed = self._row, self.run_ns, self.first, self.landed_ns
        now, came = [inf] * (end + 1), [0] * (end + 1)
        held: list[tuple[float, int]] = []
        """By F, those of j that copies have not yet caught up with."""
        stood: list[tuple[float, int]] = []
        """By F - C, the same; what is caught up with is dropped when it comes to the top."""
        done, low, seen = -1, -1, 0
        for i in range(k, end + 1):
            lowest = max(k - 1, first[i - 1])
            if lowest > low:  # nothing before it may share a group with i
                low = seen = lowest
                done = -1
                held.clear()
                stood.clear()
            at = landed[i] + late
            while seen < i:
                heappush(held, (finish[seen], seen))
                heappush(stood, (finish[seen] - ran[seen], seen))
                seen += 1
            while held and held[0][0] <= at:
                done = max(done, heappop(held)[1])
            while stood and finish[stood[0][1]] <= at:
                heappop(stood)
            value, best = (at - ran[done], done) if done >= 0 else (inf, low)
            if stood and stood[0][0] < value:
                value, best = stood[0]
            now[i], came[i] = value + ran[i] + wait, best
        self._row = now
        self._back.append(came)
        self._ends.append(now[end])

    def _begins(self, draft: Draft, copies: int) -> tuple[float, float]:
        """When the first copy can start, and when the first layer may run, of a plan of so many copies."""
        costs, profile = self.host.costs, self.profile
        each = costs.issue_copy_ns.value + costs.issue_event_ns.value
        if draft.launch is Launch.EAGER:
            begin = profile.start_ns(costs) / 2
            return begin + costs.issue_copy_ns.value, begin + copies * each
        begin, head, own = costs.start_graph_ns.value / 2, min(draft.head, copies), profile.own_launch_ns
        first, layers = (
            costs.issue_copy_ns.value if head else own + costs.launch_first_ns.value,
            len(profile.layers),
        )
        if draft.opening and head == copies:
            copies = head = len(self.paths)  # what the opening waits for, little more than a group
            layers = draft.opening
        least = costs.launch_first_ns.value if head < copies else 0.0
        launch = own + max(least, costs.graph_launch_ns(layers))
        launch += head * (each + costs.launch_wait_ns.value) + (copies - head) * costs.launch_copy_ns.value
        return begin + first, begin + launch

    def _parts(self, group: Range, most_bytes: int | None) -> Iterator[Range]:
        """A group split evenly among the lanes, or into more where those parts are larger than allowed."""
        start, stop = group
        size, lanes = stop - start, len(self.paths)
        count = max(1, min(lanes, size // SMALLEST_CHUNK_BYTES))
        if most_bytes is not None and size > count * most_bytes:
            count = -(-size // most_bytes)
        return evenly(group, count)


def _run_ns(profile: Profile, direct: frozenset[ReadKey]) -> list[float]:
    """Each layer's time beside copies, with what it reads in place."""
    in_place = _in_place_ns(profile, direct)
    return [
        timing.resident.median_ns + profile.beside_ns(layer) + in_place[layer]
        for layer, timing in enumerate(profile.layers)
    ]


def _carried_ns(profile: Profile, direct: frozenset[ReadKey], costs: Costs) -> list[float]:
    """How long each layer's reads in place keep the target's lane, all of it theirs."""
    carried = _in_place_ns(profile, direct)
    places: dict[int, list[int]] = {}
    for layer, at in direct:
        places.setdefault(layer, []).append(at)
    for layer, own in places.items():
        carried[layer] += profile.hidden_ns(layer, own, costs)
    return carried


def _in_place_ns(profile: Profile, direct: frozenset[ReadKey]) -> list[float]:
    """What each layer's reads in place add to it, the target's lane to themselves."""
    return [
        sum(extra.median_ns for at, extra in enumerate(timing.direct) if (layer, at) in direct)
        for layer, timing in enumerate(profile.layers)
    ]
