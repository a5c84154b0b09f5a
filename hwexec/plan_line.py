"""Plans as records of sweeps and benches keep them: a line of text each, so that what was measured once can be predicted again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

from sim.errors import require
from sim.network import Network
from sim.plan import Access, Chunk, Launch, Plan, Sync

_LETTERS = {Access.COPIED: "c", Access.DIRECT: "d", Access.PEER: "p", Access.RESIDENT: "r"}
_RUN = re.compile(r"([cdpr])([0-9]{1,9})", re.ASCII)
_CHUNK = re.compile(r"([0-9]{1,18})?\+([0-9]{1,18})(?:@([0-9]{1,4}(?:>[0-9]{1,4})*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PlanLine:
    """A plan without its network.

    `access`: all reads in order, alike ones counted together; `c4 d1 c12` is four copied, one direct, twelve copied
    (c copied, d direct, p peer-direct, r resident). `chunks`, in issue order: `START+SIZE@PATH`, without the start where
    the chunk before ends there (the first: at 0), and without the path where that is the target alone;
    `+4096 +8192@2>0` brings 12 KiB, the last 8 of them over GPU 2.
    """

    name: str
    target: int
    launch: Launch
    sync: Sync
    head: int
    access: str
    chunks: str
    opening: int = 0

    def __post_init__(self) -> None:
        for what, text, form, example in (
            ("access", self.access, _RUN, "c4 d1 c12"),
            ("chunks", self.chunks, _CHUNK, "+4096 8192+4096@2>0"),
        ):
            odd = next((word for word in text.split() if form.fullmatch(word) is None), None)
            require(
                odd is None, f"plan {self.name!r}: {odd!r} in its {what}; words there are as in {example!r}"
            )

    @property
    def gpus(self) -> frozenset[int]:
        """Its target and all that its chunks cross."""
        paths = (path for word in self.chunks.split() for path in word.partition("@")[2].split(">"))
        return frozenset({self.target, *(int(gpu) for gpu in paths if gpu)})

    def plan(self, network: Network) -> Plan:
        """The plan. InputError where its reads are not those of `network`."""
        runs = [(word[0], int(word[1:])) for word in self.access.split()]
        here, there = sum(len(layer.reads) for layer in network.layers), sum(count for _, count in runs)
        require(
            here == there,
            f"plan {self.name!r}: access for {there} reads, but {network.model} has {here}; it is another network's",
        )
        by_letter = {letter: access for access, letter in _LETTERS.items()}
        reads = iter([by_letter[letter] for letter, count in runs for _ in range(count)])
        access = tuple(tuple(next(reads) for _ in layer.reads) for layer in network.layers)
        chunks: list[Chunk] = []
        stop = 0
        for word in self.chunks.split():
            found = _CHUNK.fullmatch(word)
            assert found is not None
            start = int(found[1] or stop)
            stop = start + int(found[2])
            path = (self.target,) if found[3] is None else tuple(map(int, found[3].split(">")))
            chunks.append(Chunk(start, stop, path))
        return Plan(
            self.name, self.target, self.launch, access, tuple(chunks), self.sync, self.head, self.opening
        )


def as_line(plan: Plan) -> PlanLine:
    reads = (_LETTERS[access] for row in plan.access for access in row)
    access = " ".join(f"{letter}{sum(1 for _ in run)}" for letter, run in groupby(reads))
    words = []
    stop = 0
    for chunk in plan.chunks:
        start = "" if chunk.start_bytes == stop else str(chunk.start_bytes)
        path = "" if chunk.path == (plan.target,) else "@" + ">".join(map(str, chunk.path))
        words.append(f"{start}+{chunk.size_bytes}{path}")
        stop = chunk.stop_bytes
    return PlanLine(
        plan.name, plan.target, plan.launch, plan.sync, plan.head, access, " ".join(words), plan.opening
    )
