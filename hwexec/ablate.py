"""What each mechanism of the model buys: all points of a sweep predicted with one of them off, beside all of them on.

A mechanism is a line of `MECHANISMS`: its name, and how a model is made that lacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.table import Table

from hwexec.sweep import Point
from hwexec.sweep_report import ERRORS, Errors, by_launch, error_cells, errors_of, table_of
from sim.files import FileKind
from sim.host import LARGEST, Costs, Figure, Host
from sim.plan import Launch, Plan
from sim.profile import Profile, Provenance, Timing
from sim.program import lower
from sim.simulate import simulate
from sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Model:
    """What a prediction is made of. Without `share` every flow has the whole rate of its route."""

    host: Host
    profile: Profile
    share: bool = True

    def predict(self, plan: Plan) -> Timeline:
        """Without its spans."""
        program = lower(plan, self.profile.network, self.host)
        return simulate(program, self.profile, detail=False, share=self.share)


def _costs(value: float, *names: str, own: tuple[str, ...] = ()) -> Callable[[Model], Model]:
    """Those costs of the host at `value`, and where the profile has `own` figures in their place, these too."""

    def off(model: Model) -> Model:
        costs, profile = model.host.costs, model.profile
        changed: dict[str, Any] = {name: _at(getattr(costs, name), value) for name in names}
        theirs: dict[str, Any] = {
            name: _at(f, value) for name in own if (f := getattr(profile, name)) is not None
        }
        return replace(
            model,
            host=replace(model.host, costs=replace(costs, **changed)),
            profile=replace(profile, **theirs),
        )

    return off


def _at(figure: Figure, value: float) -> Figure:
    return replace(figure, value=value, low=None, high=None)


def _not_slowed(model: Model) -> Model:
    layers = tuple(replace(layer, beside=None) for layer in model.profile.layers)
    return replace(model, profile=replace(model.profile, slowed=None, layers=layers))


def _no_issue(model: Model) -> Model:
    layers = tuple(replace(layer, issue=Timing(0.0)) for layer in model.profile.layers)
    free = _costs(0, "issue_copy_ns", "issue_event_ns", "issue_hook_ns", own=("hook", "relay"))(model)
    return replace(free, profile=replace(free.profile, layers=layers))


def _named(record: type[Costs] | type[Profile], start: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record) if field.name.startswith(start))


MECHANISMS: dict[str, Callable[[Model], Model]] = {
    "sharing": lambda model: replace(model, share=False),
    "in-place read under load": _costs(0, "direct_busy_ns", "direct_ramp_ns", own=("direct_busy",)),
    "in-place weight": _costs(1, "direct_weight", own=("direct_weight",)),
    "in-place read while computing": _costs(LARGEST, "direct_bytes_per_s"),
    "kernels slowed by copies": _not_slowed,
    "latency": _costs(0, "copy_latency_ns", "peer_latency_ns"),
    "wait": _costs(0, *_named(Costs, "wait_"), own=_named(Profile, "wait")),
    "issue": _no_issue,
    "launch": _costs(0, *_named(Costs, "launch_"), own=("launch",)),
    "start": _costs(0, "start_ns", "start_graph_ns", own=("start",)),
    "host sync": _costs(0, "host_sync_ns"),
}


@dataclass(frozen=True, slots=True)
class Uncharged:
    """A mechanism that the model lacks, since it was measured to have no effect."""

    name: str
    why: str


UNCHARGED = (
    Uncharged(
        "footprint",
        "copies spread over pinned arenas of 1, 2, 4 and 8 GiB all ran at 55.1 to 55.3 GB/s (h200-pair, case footprint of "
        "`calibrate run`): the size of an arena costs nothing",
    ),
)


@dataclass(frozen=True, slots=True)
class AblationRow:
    """`without`: the mechanism that is off, None where none is. `launch`: of which plans, None for all."""

    without: str | None
    launch: Launch | None
    errors: Errors


@dataclass(frozen=True, slots=True)
class AblationRecord:
    """`measured_by` is the sweep's call, `predicted_by` this one."""

    host: str
    host_digest: str
    measured_by: Provenance
    predicted_by: Provenance
    uncharged: tuple[Uncharged, ...]
    rows: tuple[AblationRow, ...]


ABLATION = FileKind("ablation", 1, AblationRecord)


def models(whole: Model) -> tuple[Model, ...]:
    """With all mechanisms, then without each in turn."""
    return (whole, *(off(whole) for off in MECHANISMS.values()))


def ablation(predicted: Sequence[Sequence[Point]]) -> Iterator[AblationRow]:
    """Errors of the points as each of `models` predicts them, over all plans and by launch."""
    for off, points in zip((None, *MECHANISMS), predicted, strict=True):
        errors = errors_of(points)
        if errors is not None:
            yield AblationRow(off, None, errors)
        for launch, found in by_launch(points):
            yield AblationRow(off, launch, found)


def ablation_parts(record: AblationRecord) -> Iterator[Table | str]:
    launches = [row.launch for row in record.rows if row.without is None]
    columns = ["without"]
    for launch in launches:
        about = "all" if launch is None else launch.value
        count = next(r.errors.points for r in record.rows if r.launch is launch)
        columns += [f"{about} {count}\n{name}" for name in (*ERRORS, "mean tau")]
    table = table_of("Absolute error with one mechanism of the model off", columns, ("without",))
    for off in dict.fromkeys(row.without for row in record.rows):
        found = {row.launch: row.errors for row in record.rows if row.without == off}
        cells = (cell for launch in launches for cell in error_cells(found[launch]))
        table.add_row("(all on)" if off is None else off, *cells, end_section=off is None)
    yield table
    for uncharged in record.uncharged:
        yield f"{uncharged.name}: not charged, so not in the table; {uncharged.why}."
