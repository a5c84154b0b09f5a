"""What `hwexec bench` found, as it is kept: a row for each thing that ran, the limits, and what did not run."""

from __future__ import annotations

from dataclasses import dataclass

from hwexec.limit import Limit
from hwexec.plan_line import PlanLine
from hwexec.verify import OpRow
from sim.files import FileKind
from sim.profile import ProfileKind, Provenance


def labelled(name: str, links: int) -> str:
    """A row's name, where the best plans are told apart by what they may use."""
    return f"{name} over {links}" if name in ("best", "kept") else name


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy, or one peer. `error`: the largest relative difference to the reference, None where that is no number."""

    name: str
    links: int
    launch: str
    copied_bytes: int
    direct_bytes: int
    predicted_ns: float | None
    """By this host's constants and this profile; None for a warm run and a peer."""
    set_up_s: float | None
    outputs_match: bool
    bit_equal: bool
    error: float | None
    note: str
    runs: int
    samples_ns: tuple[float, ...]
    """Empty where times are no figures."""
    issued_ns: float | None = None
    """Median over the same starts until the host thread had issued all of one; None where `predicted_ns` is, and where times are no
    figures."""
    predicted_issued_ns: float | None = None
    """The same, predicted; None where `predicted_ns` is."""
    copies_ns: float | None = None
    """What the plan's copies from host memory took by themselves, all lanes at once, just after; None as `issued_ns` is, and
    where nothing was copied."""
    paused_ns: float | None = None
    """Median of further starts, each after 0.1 s in which nothing was asked of host and GPUs; None of a peer, and where times
    are no figures."""
    roused_ns: float | None = None
    """The same of starts that `ColdStart.rouse` announced half a millisecond before; None of a warm run as well."""
    lanes: int = 1
    """Lanes that the plan copies over, of the `links` that it might."""
    asked: int | None = None
    """Starts that were asked for; where `runs` are fewer, `note` says why."""
    apart_ns: tuple[float, ...] = ()
    """Further starts, which do not count: others slowed the host's core when they were made."""
    full_pace: bool = True
    """Whether those that count were made at the core's full pace; false where there were too few of them, and all count."""
    kept_bytes: int = 0
    """Of weights that stay on the target GPU between starts."""
    plan: PlanLine | None = None
    """As it ran, to be predicted again by other figures; None of a warm run and a peer."""

    @property
    def label(self) -> str:
        return labelled(self.name, self.links)


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found of a row that came late, by its `name` and `links`, once its plan was prepared anew. None and empty where it
    did not come to that, and `note` says why."""

    name: str
    links: int
    predicted_ns: float
    samples_ns: tuple[float, ...] = ()
    """Starts as those of the row, without pauses."""
    issued_ns: float | None = None
    """Of these, the median until the host thread had issued all of one."""
    gated_ns: float | None = None
    """Median of starts behind a gate, from where it opens: all of it was issued before. None of an eager plan."""
    watched_ns: float | None = None
    """One start that the profiler watched, from the request until all operations are done."""
    watched_issued_ns: float | None = None
    """Until the host's last call that launches a graph returned in it."""
    predicted_issued_ns: float | None = None
    """Until the host thread has issued all of a start, predicted."""
    ops: tuple[OpRow, ...] = ()
    """Copies and layers of the watched start beside the predicted ones."""
    first_late: int | None = None
    """The operation among `ops` that was the first to begin late; None where none did."""
    waited_for: tuple[int, ...] = ()
    """Copies that this is the first on its stream to wait for."""
    note: str = ""
    outputs_match: bool = True


@dataclass(frozen=True, slots=True)
class Waived:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What `hwexec bench` found. `pinned_bytes_per_s`: 256 MiB copies to each GPU alone, in the order of `gpus`, before all
    else or after it, whichever was faster."""

    model: str
    dtype: str
    batch: int
    seq: int | None
    gpus: tuple[int, ...]
    device: str
    figures: bool
    host: str
    profile_kind: ProfileKind
    provenance: Provenance
    pinned_bytes_per_s: tuple[float, ...]
    warm_graph_ns: float | None
    limits: tuple[Limit, ...]
    waived: tuple[Waived, ...]
    rows: tuple[Row, ...]
    together_bytes_per_s: float | None = None
    """The same to all GPUs at once, together; None for one GPU, and where times are no figures."""
    stopped: str = ""
    """What ended the command before all had run; empty where all did."""
    not_run: tuple[str, ...] = ()
    """What was still to run then."""
    looked: tuple[Looked, ...] = ()
    """Of each best plan that came late for no known cause, what a look into it found."""

    @property
    def outputs_match(self) -> bool:
        return all(row.outputs_match for row in self.rows) and all(look.outputs_match for look in self.looked)

    def limit(self, links: int) -> Limit | None:
        return next((limit for limit in self.limits if limit.links == links), None)

    def limit_ns(self, row: Row) -> float | None:
        """What a row is held against: the limit over its links, but where weights stay on the GPU by the bytes that it copies."""
        limit = self.limit(row.links)
        if limit is None or not row.kept_bytes:
            return None if limit is None else limit.limit_ns
        return max(self.warm_graph_ns or 0.0, row.copied_bytes / limit.bytes_per_s * 1e9)


BENCH = FileKind("bench-report", 2, BenchReport, last="figures")
