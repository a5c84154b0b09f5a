"""Search for the plan with the lowest predicted cost. Knows baselines and bounds; decides nothing by the clock.

Small networks are enumerated, so the answer there is exact among plans cut at storage boundaries. Larger ones start from the
published plans and, over each set of links, from as many waits for bytes as seem best, each cut where that costs least
(sim/cutting.py), with and without the copies inside the graph. The best of these is varied: reads move between copied and in
place in the order of what a byte in place costs, then the graph's head, the number of waits, the sizes of parts and the links.
At last it is improved by local moves where its timeline stalls. The number of plans tried depends on the input alone, so the
same input gives the same plan on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf

from sim.baselines import BASELINES, Setting, published_partner
from sim.bound import bound_ns, intake, warm_ns
from sim.budget import within
from sim.cutting import Cutter
from sim.draft import EVERY, SMALLEST_CHUNK_BYTES, Draft, Path, ReadKey, held_bytes, onward, paths_of, plan_of
from sim.errors import require
from sim.exhaustive import every_plan
from sim.hints import size_words
from sim.host import Host
from sim.keep import Kept, fewest, keeping, order, prefixes
from sim.memory import room_bytes
from sim.moves import PART_BYTES, VARIATIONS, neighbours
from sim.network import Network
from sim.options import Candidate, Options, Outcome
from sim.plan import Launch, Plan
from sim.profile import Profile
from sim.program import lower
from sim.score import Score, Scores
from sim.simulate import simulate

LADDER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
"""Groups of chunks tried."""
RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""Of what a read adds in place to what its copy takes, up to which reads are made in place."""
OBVIOUS = 0.5
"""What adds less than this part of its copy is read in place to begin with."""
SURE = 1.002
"""Other reads in place must gain more than this: beside copies they are predicted a few percent of themselves off, so that less
is noise."""
NEAR, MOST_STARTS = 1.02, 2
"""Of the ladder's plans, one for each set of links, those are varied that cost no more times as much as the best, so many at most:
one that starts behind may end up ahead."""
ROUNDS = 2
"""How often each of them is varied, one decision after the other."""
LOCAL_MOVES = 52
"""Plans tried by local search on a network of up to 200 layers; fewer in proportion on longer ones."""


def search(profile: Profile, host: Host, options: Options) -> Outcome:
    """Raises InputError for a GPU or partner that is not there, a partner without a route, a profile of another host or for another
    kind of GPU."""
    began = time.perf_counter()
    require(
        profile.host_digest == host.digest,
        f"the profile of {profile.network.model} was made for another host or other constants than {host.name} has now; "
        "make it again for this host",
    )
    target, timed = host.gpu(options.target), host.gpus[0]
    require(
        target.name == timed.name,
        f"GPU {target.index} of {host.name} is a {target.name}, and layers are timed for GPU {timed.index}, a {timed.name}; choose "
        "a target of that kind, or make a host whose first GPU is of the other",
    )
    finder = _Finder(profile, host, options)
    strategies = [finder.candidate(plan.name, plan) for plan in finder.published]
    strategies.append(winner := finder.winner("best"))
    left_out, tried = tuple(finder.left_out), finder.scores.evaluated
    warm = warm_ns(profile, host)
    if options.keeps:
        finder, tried = _keeping(finder)
        strategies.append(winner := finder.winner("kept"))
    lowest = bound_ns(profile, host, finder.gpus, finder.kept)
    if options.runs > 1:
        lowest = (lowest + (options.runs - 1) * warm) / options.runs
    return Outcome(
        winner,
        tuple(strategies),
        left_out,
        lowest,
        max(0.0, winner.mean_ns / lowest - 1) if lowest > 0 else 0.0,
        finder.exact,
        tried,
        time.perf_counter() - began,
        warm,
    )


def _keeping(bare: _Finder) -> tuple[_Finder, int]:
    """The search among plans that keep what pays, by the best of those that keep nothing; and how many plans were tried."""
    options, network = bare.options, bare.network
    most = inf if bare.budget is None else bare.budget
    most = most if options.keep_bytes is None else min(most, options.keep_bytes)
    choices = prefixes(order(bare.best, network), network, most)
    tried: dict[Kept, _Finder] = {frozenset(): bare}

    def of(kept: Kept) -> _Finder:
        if kept not in tried:
            smaller = max((other for other in tried if other < kept), key=len)
            known = [keeping(tried[other].best, kept, network) for other in {frozenset(), smaller}]
            tried[kept] = _Finder(bare.profile, bare.host, options, kept, known)
        return tried[kept]

    found: Kept | None = None
    if options.keep_ratio is None:
        of(choices[-1])
    else:
        longest = options.keep_ratio * warm_ns(bare.profile, bare.host)
        found = fewest(choices, network, lambda kept: of(kept).score.makespan_ns <= longest)
    best = (
        tried[found] if found is not None else min(tried.values(), key=lambda finder: finder.score.value_ns)
    )
    return best, sum(finder.scores.evaluated for finder in tried.values())


class _Finder:
    """A search among the plans that keep `kept` on the target between starts, none slower than those that are `known`."""

    def __init__(
        self,
        profile: Profile,
        host: Host,
        options: Options,
        kept: Kept = frozenset(),
        known: Sequence[Plan] = (),
    ) -> None:
        host.gpu(options.target)
        target = options.target
        others = tuple(g.index for g in host.gpus if g.index != target)
        others = others if options.partners is None else options.partners
        for partner in options.partners or ():
            require(partner != target, f"GPU {partner} is the target; name other GPUs as partners")
            if not any(onward(host, partner, target, others)):
                host.peer_route(partner, target)
        self.profile, self.host, self.options, self.kept = profile, host, options, kept
        self.network: Network = profile.network
        self.gpus = (target, *others)
        self.paths = paths_of(host, target, others)
        self.partners = tuple(gpu for gpu in host.partners(target) if gpu in others)
        room = room_bytes(host, target, self.network)
        self.budget = options.memory_budget_bytes
        if self.network.arena_bytes > room:
            self.budget = room if self.budget is None else min(self.budget, room)
        if self.budget is not None and self.network.arena_bytes > self.budget:
            self.paths = (*self.paths, *self._places_to_stay(others))
        self.scores = Scores(profile, host, target, self.budget, options.runs)
        self.costs: dict[Draft, float] = {}
        self.cutters: dict[tuple[object, ...], Cutter] = {}
        self.left_out: list[tuple[str, str]] = []
        self.published = () if kept else tuple(self._published())
        self.known = [*self.published, *filter(self.scores.fits, known)]
        self.reads = self._reads_by_cost()
        self.worth = [key for key in self.reads if self._size(key) >= SMALLEST_CHUNK_BYTES]
        """Those that may gain in place. What is smaller adds nothing to a copy; in place beside copies it took 7 us, which profiles
        cannot tell from what larger reads take (results/h100-pair-6/trials/joins.txt)."""
        layers = len(self.network.layers)
        self.moves = max(12, min(LOCAL_MOVES, LOCAL_MOVES * 200 // max(1, layers)))

    def _places_to_stay(self, others: Sequence[int]) -> Iterator[Path]:
        """Paths that let no more leave host memory, from GPUs whose own memory the target can read where its own is short."""
        used = {gpu for path in self.paths for gpu in path}
        for gpu in others:
            if gpu not in used and self.host.reaches(gpu, self.options.target):
                yield gpu, self.options.target

    @property
    def score(self) -> Score:
        """Of the best plan."""
        return self.scores.of(self.best)

    def winner(self, name: str) -> Candidate:
        """The best plan, by that name."""
        return self.candidate(name, replace(self.best, name=name))

    def candidate(self, name: str, plan: Plan) -> Candidate:
        score = self.scores.of(plan)
        timeline = self.scores.timelines.get(plan) or simulate(
            lower(plan, self.network, self.host), self.profile
        )
        return Candidate(name, plan, score.makespan_ns, score.value_ns, score.settles, timeline)

    # Where it looks

    @property
    def best(self) -> Plan:
        """The best plan found."""
        return self._found[0]

    @property
    def exact(self) -> bool:
        """Whether no plan is better, of those cut between storages."""
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[Plan, bool]:
        """The best plan, and whether it is exact."""
        target, fits = self.options.target, self.scores.fits
        small = every_plan(self.network, self.host, target, self.partners, fits, self.kept)
        plans: list[Plan] = [*self.known, *(small or ())]
        best = self._least(plans)
        # where memory is short a partner's may be read, and such plans are not enumerated
        peers = (
            self.budget is not None
            and bool(self.partners)
            and any(timing.peer for timing in self.profile.layers)
        )
        exact = small is not None and not peers and all(len(path) <= 2 for path in self.paths)
        exact = exact and not self.kept  # few are left to copy then, which pays to be cut within
        if not exact or best is None:
            found = self._structured()
            best = found if best is None else self._better(best, found)
        return best, exact

    def _least(self, plans: Iterable[Plan]) -> Plan | None:
        best: Plan | None = None
        for plan in plans:
            best = plan if best is None else self._better(best, plan)
        return best

    def _better(self, a: Plan, b: Plan) -> Plan:
        """The cheaper one; the first on a tie."""
        return b if self.scores.of(b).value_ns < self.scores.of(a).value_ns else a

    def _published(self) -> Iterator[Plan]:
        partner = published_partner(self.host, self.options.target)
        if self.options.partners is not None:
            partner = next((gpu for gpu in self.options.partners if gpu in self.partners), None)
        setting = Setting(self.profile, self.host, self.options.target, partner)
        for baseline in BASELINES:
            if baseline.relays and partner is None:
                self.left_out.append(
                    (baseline.name, f"GPU {self.options.target} has no partner to relay through")
                )
                continue
            plan = baseline.make(setting)
            reason = plan.overfull(self.network, self.host)
            if not self.scores.holds(plan):
                reason = f"holds {size_words(plan.held_bytes(self.network))}, over the memory budget"
            if reason is None:
                yield plan
            else:
                self.left_out.append((baseline.name, reason))

    def _size(self, read: ReadKey) -> int:
        """Bytes of the storage that it reads."""
        layer, at = read
        return self.network.storages[self.network.layers[layer].reads[at].storage].size_bytes

    def _reads_by_cost(self) -> list[ReadKey]:
        """Reads that can be in place, cheapest first: added time over the time its copy takes."""
        per_byte = 1e9 / intake(self.host, self.gpus)
        rows = [
            (extra.median_ns / max(1.0, self._size((i, j)) * per_byte), i, j)
            for i, timing in enumerate(self.profile.layers)
            for j, extra in enumerate(timing.direct)
            if self.network.layers[i].reads[j].storage not in self.kept
        ]
        return [(i, j) for _, i, j in sorted(rows)]

    def _structured(self) -> Plan:
        likely = sorted([*self._all_in_place(), *self._ladder()], key=self._cost)
        near = [draft for draft in likely[:MOST_STARTS] if self._cost(draft) <= NEAR * self._cost(likely[0])]
        best = min((self._refine(draft, self.moves // len(near)) for draft in near), key=self._cost)
        return self._plan(self._surer(best))

    def _surer(self, best: Draft) -> Draft:
        """Without reads in place that take about as long as their copies, where that costs next to nothing."""
        obvious = best.direct & self._cheaper_in_place(OBVIOUS, best.paths)
        if obvious == best.direct:
            return best
        other = self._fit(replace(best, direct=obvious, cuts=None))
        other = self._least_draft(other, self._likely(other))  # local moves would read in place again
        return other if self._cost(other) <= SURE * self._cost(best) else best

    def _refine(self, best: Draft, moves: int) -> Draft:
        """Varied one decision after the other, then by local moves."""
        for _ in range(ROUNDS):
            before = best
            best = self._least_draft(best, self._in_place(best))
            for vary in VARIATIONS:
                best = self._least_draft(best, vary(best, self.paths))
            if best == before:
                break
        return self._improve(best, moves)

    def _all_in_place(self) -> Iterator[Draft]:
        """Nothing held on the target: every read from host memory, or from partners' where that is faster."""
        every = Draft(Launch.GRAPH, frozenset(self.reads), frozenset(), self.paths[:1], kept=self.kept)
        yield every
        for count in sorted({2, len(self.paths)} - {1}):
            none = held_bytes(every, self.network)  # but for what is kept
            yield self._fit(replace(every, direct=frozenset(), paths=self.paths[:count]), none)

    def _cut(self, draft: Draft) -> Draft:
        """With its cuts."""
        if draft.cuts is not None:
            return draft
        return replace(draft, cuts=self._cutter(draft).cuts(draft))

    def _cutter(self, draft: Draft) -> Cutter:
        key = (draft.direct, draft.peer, draft.paths, draft.launch)
        if key not in self.cutters:
            self.cutters[key] = Cutter(draft, self.profile, self.host)
        return self.cutters[key]

    def _plan(self, draft: Draft) -> Plan:
        return plan_of(self._cut(draft), self.network, self.host)

    def _cost(self, draft: Draft) -> float:
        if draft not in self.costs:
            plan = self._plan(draft)
            self.costs[draft] = self.scores.of(plan).value_ns if self.scores.fits(plan) else float("inf")
        return self.costs[draft]

    def _least_draft(self, best: Draft, drafts: Iterable[Draft]) -> Draft:
        """The cheapest, each first made to keep to the memory budget; `best` on a tie."""
        cost = self._cost(best)
        for draft in map(self._fit, drafts):
            other = self._cost(draft)
            if other < cost:
                best, cost = draft, other
        return best

    def _ladder(self) -> Iterator[Draft]:
        """The best of each set of links, with the copies in the graph or ahead of it. What is cheaper in place than half its
        copy is read there.
        """
        for count in range(1, len(self.paths) + 1):
            paths = self.paths[:count]
            obvious = self._cheaper_in_place(OBVIOUS, paths)
            drafts = [
                draft
                for head in (0, EVERY)
                for draft in self._likely(
                    Draft(Launch.GRAPH, obvious, frozenset(), paths, head=head, kept=self.kept)
                )
            ]
            best = self._least_draft(drafts[0], drafts)
            if count > 1:
                best = self._least_draft(best, (replace(best, part_bytes=part) for part in PART_BYTES))
            yield best

    def _likely(self, draft: Draft, ladder: Sequence[int] = LADDER, most: int = 5) -> list[Draft]:
        """The draft with as many groups as seem best, likeliest first."""
        cutter = self._cutter(draft)
        by_count: dict[int, Draft] = {}
        for groups in ladder:
            other = replace(draft, groups=groups, cuts=None)
            by_count.setdefault(cutter.count(other), other)  # more than there can be are as many
        return sorted(by_count.values(), key=cutter.finish_ns)[:most]

    def _cheaper_in_place(self, ratio: float, paths: Sequence[Path]) -> frozenset[ReadKey]:
        """Reads whose added time is under `ratio` of what their copy takes over these paths, all busy."""
        target = self.options.target
        others = {gpu for path in paths for gpu in path} - {target}
        per_byte = ratio * 1e9 / intake(self.host, (target, *sorted(others)))
        return frozenset(
            (i, j)
            for i, j in self.worth
            if self.profile.layers[i].direct[j].median_ns < per_byte * self._size((i, j))
        )

    def _in_place(self, draft: Draft) -> Iterator[Draft]:
        """More read in place, or less; with as many waits as now, and with as many as seem best then."""
        sets = (self._cheaper_in_place(ratio, draft.paths) for ratio in RATIOS)
        for direct in dict.fromkeys([frozenset(), *sets]):
            other = replace(draft, direct=direct, cuts=None)
            yield other
            yield from self._likely(other, LADDER[1::2], 1)

    def _fit(self, draft: Draft, budget: int | None = None) -> Draft:
        """Within the memory budget."""
        budget = self.budget if budget is None else budget
        return draft if budget is None else within(budget, draft, self.profile, self.host)

    # Local moves

    def _improve(self, best: Draft, left: int) -> Draft:
        """First improvement, moves drawn from the longest stalls of the best plan, until none helps or the moves are spent."""
        cost = self._cost(best)
        tried: set[Draft] = {best}
        while left > 0:
            for draft in self._neighbours(best):
                if draft in tried:
                    continue
                tried.add(draft)
                left -= 1
                other = self._cost(draft)
                if other < cost:
                    best, cost = draft, other
                    break
                if left <= 0:
                    return best
            else:
                return best
        return best

    def _neighbours(self, draft: Draft) -> Iterator[Draft]:
        cut = self._cut(draft)
        plan = self._plan(cut)
        timeline = simulate(lower(plan, self.network, self.host), self.profile)
        return neighbours(cut, plan, timeline, self.network, self.worth)
