"""What each `sim` command does, from checked options to print and files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sim.bound import bound_ns
from sim.catalog import (
    Request,
    check_plans_model,
    find_host,
    host_names,
    host_path,
    obtain_network,
    obtain_profile,
)
from sim.console import note
from sim.errors import naming, require
from sim.files import PlanFile, read_plan, write_plan
from sim.hints import size_words
from sim.host import Host
from sim.listing import host_table, hosts_table, layer_choices, layers_json, layers_table
from sim.made_for import check_host, check_name, check_network, host_named
from sim.memory import beside_bytes, room_bytes
from sim.names import known_models
from sim.network import Network
from sim.options import Options
from sim.output import check_outputs, write_file
from sim.picture import check_format, chrome_trace, picture
from sim.plan import Plan
from sim.profile import Profile
from sim.program import lower
from sim.provenance import stamp
from sim.report import (
    Answer,
    footnote,
    mib,
    ms,
    search_json,
    search_words,
    strategy_table,
    title,
)
from sim.search import search
from sim.simulate import simulate
from sim.tables import show
from sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class SearchCall:
    """The options of `sim search`, sizes and GPUs parsed."""

    model: str
    batch: int | None
    dtype: str | None
    seq: int | None
    host: str
    profile: str | None
    gpus: tuple[int, ...] | None
    memory_budget: int | None
    runs: int
    keep_bytes: int | None
    keep_ratio: float | None
    layers: bool
    out: str | None
    as_json: bool
    trace: str | None
    plot: str | None
    force: bool


@dataclass(frozen=True, slots=True)
class SimulateCall:
    """The options of `sim simulate`."""

    plan: str
    model: str | None
    host: str | None
    profile: str | None
    as_json: bool
    trace: str | None
    plot: str | None
    force: bool


def search_plan(call: SearchCall) -> None:
    if call.plot is not None:
        check_format(call.plot)
    inputs = (host_path(call.host), call.profile)
    check_outputs((call.out, call.trace, call.plot), inputs, force=call.force)
    target, *partners = call.gpus or (0,)
    over = None if call.gpus is None else tuple(partners)
    options = Options(target, over, call.memory_budget, call.runs, call.keep_bytes, call.keep_ratio)
    host = find_host(call.host)
    for gpu in call.gpus or ():
        host.gpu(gpu)
    profile = obtain_profile(host, Request(call.model, call.batch, call.dtype, call.seq), call.profile)
    _check_fits(profile, host, target, call.memory_budget)
    answer = Answer(profile, host, options, search(profile, host, options))
    best = answer.outcome.best
    if call.out is not None:
        mean_ns = best.mean_ns if options.runs > 1 else None
        file = plan_file(profile, host, answer, mean_ns)
        write_plan(call.out, file, force=call.force)
    _write_timeline(call.trace, call.plot, call.force, best.timeline, title(profile, host, target))
    if call.as_json:
        print(search_json(answer))
        return
    show(strategy_table(answer), *search_words(answer))
    if call.layers:
        for line in layer_choices(answer):  # rows, never wrapped
            print(line)
    _say_written((call.out, call.trace, call.plot))


def plan_file(profile: Profile, host: Host, answer: Answer, mean_ns: float | None) -> PlanFile:
    network, best = profile.network, answer.outcome.best
    inputs = (f"host:{host.digest}", f"network:{network.digest}", f"plan:{best.plan.digest}")
    return PlanFile(
        model=network.model,
        dtype=network.dtype,
        batch=network.batch,
        seq=network.seq,
        network_digest=network.digest,
        host=host.name,
        host_digest=host.digest,
        profile_kind=profile.kind,
        provenance=stamp(host.name, host.gpus[0].name, inputs=inputs),
        plan=best.plan,
        mean_ns=mean_ns,
        predicted_ns=best.makespan_ns,
        bound_ns=answer.outcome.bound_ns,
    )


def simulate_plan(call: SimulateCall) -> None:
    if call.plot is not None:
        check_format(call.plot)
    inputs = (call.plan, host_path(call.host), call.profile)
    check_outputs((call.trace, call.plot), inputs, force=call.force)
    file = read_plan(call.plan)
    # code to import and call, or a path to open, only the user may name
    check_plans_model(call.plan, file.model, call.model, profile=call.profile, instead=", or its --profile")
    host = host_named(call.plan, file.host, call.host)
    check_name(call.plan, file.plan)
    check_host(call.plan, file, host)
    with naming(call.plan) if call.profile is None else nullcontext():  # a profile's faults have its own name
        profile = obtain_profile(host, Request(file.model, file.batch, file.dtype, file.seq), call.profile)
    check_network(call.plan, file, profile.network)
    plan, network = file.plan, profile.network
    with naming(call.plan):
        program = lower(plan, network, host)
    timeline = simulate(program, profile)
    lowest = bound_ns(profile, host, plan.gpus, plan.kept(network))
    about = title(profile, host, plan.target)
    _write_timeline(call.trace, call.plot, call.force, timeline, about)
    if call.as_json:
        print(
            json.dumps(
                {
                    "model": network.model,
                    "dtype": network.dtype,
                    "batch": network.batch,
                    "seq": network.seq,
                    "host": host.name,
                    "profile_kind": profile.kind,
                    "name": plan.name,
                    "changed": _changed(file),
                    "latency_ms": timeline.makespan_ns / 1e6,
                    "copied_bytes": plan.copied_bytes,
                    "direct_bytes": plan.direct_bytes(network),
                    **({"kept_bytes": plan.kept_bytes(network)} if plan.kept(network) else {}),
                    "chunks": len(plan.chunks),
                    "gpus": list(plan.gpus),
                    "launch": plan.launch.value,
                    "recorded_ms": file.predicted_ns / 1e6,
                    "bound_ms": lowest / 1e6,
                },
                allow_nan=False,
            )
        )
        return
    show(
        about,
        f"Plan {plan.name} fits its host and network: {len(plan.chunks)} chunks, {mib(plan.copied_bytes)} MiB copied, "
        f"{mib(plan.direct_bytes(network))} MiB read in place, {_kept_words(plan, network)}over GPUs "
        f"{'+'.join(map(str, plan.gpus))}, {plan.launch.value}.",
        f"Predicted: {ms(timeline.makespan_ns)} ms, {_against(file, timeline)}; no plan over these GPUs "
        f"{'that keeps these weights ' if plan.kept(network) else ''}can be under {ms(lowest)} ms.",
        footnote(profile, host, plan),
    )
    _say_written((call.trace, call.plot))


def _kept_words(plan: Plan, network: Network) -> str:
    return f"{mib(plan.kept_bytes(network))} MiB kept between starts, " if plan.kept(network) else ""


def _made(file: PlanFile) -> list[str]:
    return [text for text in file.provenance.inputs if text.startswith("plan:")]


def _changed(file: PlanFile) -> bool:
    """Whether the plan was changed after it was made, as far as the file tells."""
    made = _made(file)
    return bool(made) and made != [f"plan:{file.plan.digest}"]


def _against(file: PlanFile, timeline: Timeline) -> str:
    """The prediction beside the file's own, and why they differ, as far as can be told."""
    made, changed = _made(file), _changed(file)
    edited = "the plan was changed after it was made"
    # a sum in another order is the same prediction
    if math.isclose(timeline.makespan_ns, file.predicted_ns):
        return f"as the file says, though {edited}" if changed else "as the file says"
    why = "from another profile, or by another version" + ("" if made else ", or of another plan")
    return f"where the file says {ms(file.predicted_ns)} ms ({edited if changed else why})"


def _check_fits(profile: Profile, host: Host, target: int, budget: int | None) -> None:
    """Plans that copy everything are of no use where a GPU cannot hold it; what one may hold only the user knows."""
    network, room = profile.network, room_bytes(host, target, profile.network)
    beside, memory = beside_bytes(network), host.gpu(target).memory_bytes
    require(
        beside <= memory,
        f"{network.model}: with --batch {network.batch} its activations and libraries take {size_words(beside)}, and GPU {target} "
        f"of {host.name} has {size_words(memory)}, wherever the weights are; ask for a smaller --batch"
        + ("" if network.seq is None else " or --seq"),
    )
    if network.arena_bytes <= room:
        return
    has = f"the {size_words(room)} that GPU {target} of {host.name} has room for"
    require(
        budget is not None,
        f"{network.model}: its {size_words(network.arena_bytes)} of weights do not fit in {has}; "
        "pass --memory-budget with what it may hold of them, and the rest is read in place",
    )
    require(
        budget is None or budget <= room,
        f"--memory-budget of {size_words(budget or 0)}: more than {has}; give at most that",
    )


def list_layers(model: str, batch: int | None, dtype: str | None, seq: int | None, as_json: bool) -> None:
    network = obtain_network(Request(model, batch, dtype, seq))
    if as_json:
        print(layers_json(network))
    else:
        show(layers_table(network))


def list_hosts(host: str | None) -> None:
    if host is None:
        show(hosts_table(tuple(find_host(name) for name in host_names())))
    else:
        show(host_table(find_host(host)))


def list_models() -> None:
    for name in known_models():
        print(name)
    note(
        "also: any package.module:callable that returns a torch module; `hf:` shapes of your own, as hf:llama:layers=4"
    )


def _write_timeline(trace: str | None, plot: str | None, force: bool, timeline: Timeline, about: str) -> None:
    if trace is not None:
        write_file(trace, chrome_trace((timeline,), about), force=force)
    if plot is not None:
        write_file(plot, picture((timeline,), about, Path(plot).suffix), force=force)


def _say_written(paths: Iterable[str | None]) -> None:
    for path in paths:
        if path is not None:
            note(f"wrote {path}")
