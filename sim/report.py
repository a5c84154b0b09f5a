"""Records to tables, words and JSON. Every print says whether its profile was measured, estimated or played."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from sim.account import Account, account, in_place
from sim.catalog import find_host, host_names
from sim.hints import run_words, size_words
from sim.host import Host
from sim.keep import order
from sim.network import Network
from sim.options import Candidate, Options, Outcome
from sim.origins import LAYER_TIMES, MORE, Lever, levers, origins
from sim.plan import Access, Launch, Plan
from sim.profile import Profile, ProfileKind

MIB = 2**20
LABELS: dict[ProfileKind, str] = {
    "estimated": "ESTIMATED, not measured",
    "measured": "measured",
    "played": "PLAYED by threads, no figures",
}
PREDICTED: dict[ProfileKind, str] = {"estimated": "estimated", "measured": "predicted", "played": "played"}
"""What a predicted time is called."""
LEAST_TOLD, MOST_TOLD = 0.0005, 3
"""Of what an estimate hangs on: told from this part of it, and so many at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All that one search's print needs."""

    profile: Profile
    host: Host
    options: Options
    outcome: Outcome


# What is asked -------------------------------------------------------------------------------------------------------


def subject(network: Network) -> str:
    """`resnet50, fp32, batch 1`."""
    return run_words(network.model, network.dtype, network.batch, network.seq)


def title(profile: Profile, host: Host, target: int) -> str:
    return f"{subject(profile.network)} on {host.name}, GPU {target} ({LABELS[profile.kind]})"


def footnote(profile: Profile, host: Host, plan: Plan) -> str:
    """Where the figures come from: who measured, or how much of what the prediction of `plan` is made from nobody did."""
    made = profile.provenance
    if profile.kind == "measured":
        parts = [made.host or host.name, made.gpu]
        parts += [
            f"{what} {value}" for what, value in (("driver", made.driver), ("CUDA", made.cuda)) if value
        ]
        parts += [f"torch {made.torch}"] if made.torch else []
        where = f"on {', '.join(p for p in parts if p)}, {made.date}."
        rest = _rest_words(profile, host, plan)
        return f"Layers measured {where} {rest}" if rest else f"Measured {where}"
    if profile.kind == "played":
        return (
            f"NO FIGURES: threads of a processor played the GPUs of {made.host or host.name} when this was recorded "
            f"({made.date}), and no time above says anything about any GPU; `calibrate run` on a machine with GPUs measures them."
        )
    return estimate_words(profile, host, plan)


def _rest_words(profile: Profile, host: Host, plan: Plan) -> str:
    """Of measured layers, what of the host nobody measured; empty where the prediction of `plan` hangs on none of that."""
    if all(origin.kind == "measured" for origin in origins(host)):
        return ""
    moved = [lever for lever in levers(plan, profile, host) if lever.name != LAYER_TIMES]
    words = _constants_words(host, moved)
    return f"{words[0].upper()}{words[1:]}" if moved else ""


def estimate_words(profile: Profile, host: Host, plan: Plan) -> str:
    """How many of a host's constants nobody measured, what lists them, and which of them the prediction of `plan` hangs on."""
    return f"Estimated: {_constants_words(host, levers(plan, profile, host))}"


def _constants_words(host: Host, moved: Sequence[Lever]) -> str:
    """The same, as sentences; `moved` are what the prediction hangs on, most first."""
    found = tuple(origins(host))
    known, total = sum(o.count for o in found if o.kind == "measured"), sum(o.count for o in found)
    kinds = ", ".join(f"{o.count} {o.kind}" for o in found)
    counted = (
        f"none of the {total} constants of {host.name} is measured"
        if not known
        else f"{total - known} of the {total} constants of {host.name} are not measured"
    )
    ships = host.name in host_names() and find_host(host.name).digest == host.digest
    lists = f"`sim hosts {host.name if ships else 'FILE'}` lists each with its source"
    told = [lever for lever in moved if lever.part >= LEAST_TOLD][:MOST_TOLD]
    changes = ", ".join(f"{lever.name} by {lever.part:.1%}" for lever in told)
    most = f" Raised by {MORE:.0%}, these change this answer most: {changes}." if changes else ""
    return f"{counted} ({kinds}); {lists}.{most}"


# The search ----------------------------------------------------------------------------------------------------------


def strategy_table(answer: Answer) -> Table:
    outcome, options = answer.outcome, answer.options
    network = answer.profile.network
    table = Table(
        title=title(answer.profile, answer.host, options.target), title_justify="left", title_style="bold"
    )
    label = PREDICTED[answer.profile.kind]
    columns = [
        "strategy",
        f"{label}\nms",
        "vs\ndemand",
        "copied\nMiB",
        "in place\nMiB",
        "chunks",
        "GPUs",
        "launch",
    ]
    if options.runs > 1:
        columns.insert(2, f"mean of\n{options.runs} ms")
    if options.keeps:
        columns.insert(columns.index("chunks"), "kept\nMiB")
    if options.memory_budget_bytes is not None:
        columns.append("held\nMiB")
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("strategy", "GPUs", "launch") else "right", no_wrap=True
        )
    demand = next((c for c in outcome.strategies if c.name == "demand"), None)
    for candidate in outcome.strategies:
        plan = candidate.plan
        row = [
            candidate.name,
            ms(candidate.makespan_ns),
            "" if demand is None else f"{demand.mean_ns / candidate.mean_ns:.2f}x",
            mib(plan.copied_bytes),
            mib(_in_place_bytes(plan, network)),
            *([mib(plan.kept_bytes(network))] if options.keeps else []),
            str(len(plan.chunks)),
            "+".join(map(str, plan.gpus)),
            plan.launch.value,
        ]
        if options.runs > 1:
            row.insert(2, ms(candidate.mean_ns) + ("*" if candidate.settles else ""))
        if options.memory_budget_bytes is not None:
            row.append(mib(plan.held_bytes(network)))
        table.add_row(*(Text(cell) for cell in row), style="bold" if candidate is outcome.best else "")
    return table


def search_words(answer: Answer) -> tuple[str, ...]:
    """The best plan in two lines, its gap to the bound, what is missing from the table, where the figures come from."""
    lines = [what_it_does(answer), why_faster(answer), gap_words(answer)]
    if answer.options.keeps:
        lines.insert(0, kept_words(answer))
    if any(c.settles for c in answer.outcome.strategies):
        lines.append(
            "* copies what it reads in place in the background, after the first answer and before the next run"
        )
    lines += [f"not shown: {name} ({reason})" for name, reason in answer.outcome.left_out]
    lines.append(footnote(answer.profile, answer.host, answer.outcome.best.plan))
    return tuple(lines)


def what_it_does(answer: Answer) -> str:
    best, network = answer.outcome.best.plan, answer.profile.network
    done = account(best, answer.host, answer.outcome.best.timeline)
    parts = [_copies_words(best, done)] if best.chunks else ["copies nothing"]
    direct = in_place(best, network)
    if direct.layers:
        parts.append(
            f"reads {size_words(direct.size_bytes)} in place from host memory ({_layer_words(network, direct.layers)})"
        )
    peer = in_place(best, network, Access.PEER)
    if peer.layers:
        parts.append(
            f"reads {size_words(peer.size_bytes)} in place in a partner's memory ({_layer_words(network, peer.layers)})"
        )
    if not direct.layers and not peer.layers:
        parts.append("reads nothing in place")
    parts.append(_launched(best))
    return f"Best plan: {', '.join(parts[:-1])} and {parts[-1]}."


def kept_words(answer: Answer) -> str:
    """What stays on the GPU, of how much, and how near to a warm run a start comes by it."""
    outcome, network, options = answer.outcome, answer.profile.network, answer.options
    kept, warm = outcome.best.plan.kept_bytes(network), outcome.warm_ns
    of = f"{size_words(kept) if kept else 'nothing'} of {size_words(network.total_bytes)}"
    ratio = outcome.best.makespan_ns / warm if warm else 1.0
    near = f"a start takes {ratio:.3f} times a warm run of {ms(warm)} ms"
    if options.keep_ratio is not None and ratio > options.keep_ratio:
        return f"Kept: {of}; {near}, and no plan was found that takes {options.keep_ratio:g} times."
    fewest = ", and no fewer were found to do for that" if options.keep_ratio and kept else ""
    return f"Kept: {of}{'' if kept else _why_none(answer)}; {near}{fewest}."


def _why_none(answer: Answer) -> str:
    """Why nothing is kept where something might be, in words; empty where that was asked."""
    network, most = answer.profile.network, answer.options.keep_bytes
    if not most:
        return ""
    first = next(iter(order(answer.outcome.strategies[-2].plan, network)), None)
    if first is None:
        return ""
    size = network.storages[first].size_bytes
    return (
        f" (what is needed first takes {size_words(size)})"
        if size > most
        else " (so few make no start sooner)"
    )


def why_faster(answer: Answer) -> str:
    """Against the fastest strategy that is published, or keeps nothing: how much, and which parts of the two timelines make the
    difference."""
    outcome, host = answer.outcome, answer.host
    kept = bool(outcome.best.plan.kept(answer.profile.network))
    rivals = outcome.strategies[: -2 if answer.options.keeps and not kept else -1]
    if not rivals:
        return "Why: no published strategy fits what was asked, so there is nothing to compare it with."
    rival = rivals[-1] if kept else min(rivals, key=lambda c: c.mean_ns)
    what = "which keeps nothing" if kept else "the best published strategy"
    ahead = rival.mean_ns - outcome.best.mean_ns
    if ahead <= 1e-6 * rival.mean_ns:
        return f"Why: {rival.name} is as fast, at {ms(rival.mean_ns)} ms; nothing that was tried beats it."
    over = "" if answer.options.runs == 1 else f", in the mean of {answer.options.runs} runs; in the first"
    head = f"Why: {ms(ahead)} ms faster than {rival.name}, {what}{over}"
    new, old = (
        account(outcome.best.plan, host, outcome.best.timeline),
        account(rival.plan, host, rival.timeline),
    )
    reasons = sorted(_reasons(new, old, outcome.best, rival), reverse=True)
    span = max(1.0, rival.makespan_ns - outcome.best.makespan_ns)
    told = [text for gain, text in reasons if gain >= 0.02 * span]
    lost = [text for gain, text in reasons if gain <= -0.02 * span]
    text = "; ".join(told) or "in warm runs, not in the first one"
    return f"{head}: {text}{'; but ' + '; '.join(lost) if lost else ''}."


def _launched(plan: Plan) -> str:
    if plan.launch is Launch.EAGER:
        return "is issued from the host, op by op"
    layers = "layer" if plan.opening == 1 else f"{plan.opening} layers"
    return (
        f"is launched as two graphs, the first {layers} ahead" if plan.opening else "is launched as one graph"
    )


def _reasons(new: Account, old: Account, best: Candidate, rival: Candidate) -> Iterator[tuple[float, str]]:
    """What each part of the makespan gained, in words that say by what."""
    gain = old.host_ns - new.host_ns
    how = ""
    if best.plan.launch is Launch.GRAPH and rival.plan.launch is Launch.EAGER:
        chunks = "1 chunk" if best.plan.head == 1 else f"{best.plan.head} chunks"
        graphs = "two graphs" if best.plan.opening else "one graph"
        alone = f"{graphs} launched in" if best.plan.opening else "one graph launch of"
        ahead = f"{chunks} issued and {graphs} launched in" if best.plan.head else alone
        how = f" ({ahead} {ms(new.issue_ns)} ms instead of {old.issued} operations issued in {ms(old.issue_ns)} ms)"
    elif new.issued != old.issued:
        how = f" ({new.issued} operations issued instead of {old.issued})"
    yield gain, f"{_change(gain)} waiting for the host and between operations{how}"
    gain = old.copies_ns - new.copies_ns
    how = f" ({', '.join(_copy_reasons(new, old))})" if gain > 0 else ""
    yield gain, f"{_change(gain)} waiting for bytes{how}"
    gain = old.run_ns - new.run_ns
    yield gain, f"{_change(gain)} in kernels, reads in place included"


def _copy_reasons(new: Account, old: Account) -> Iterator[str]:
    yield f"the last byte lands at {ms(new.landed_ns)} instead of {ms(old.landed_ns)} ms"
    if new.copies < old.copies:
        saved = ms(old.latency_ns - new.latency_ns)
        yield f"{new.copies} copies instead of {old.copies}: {saved} ms less of per-copy cost"
    if old.copied_bytes - new.copied_bytes >= 0.005 * old.copied_bytes:
        yield f"{size_words(old.copied_bytes - new.copied_bytes)} less to copy"
    if len(new.lanes) > len(old.lanes):
        yield f"{len(new.lanes)} links to host memory instead of {len(old.lanes)}"
    elif 1 < len(new.lanes) == len(old.lanes) and new.together > old.together + 0.02:
        yield f"its links work together {new.together:.0%} of the copying time, not {old.together:.0%}"


def gap_words(answer: Answer) -> str:
    outcome = answer.outcome
    budget = " (whatever the memory)" if answer.options.memory_budget_bytes is not None else ""
    keeps = " that keeps these weights" if outcome.best.plan.kept(answer.profile.network) else ""
    exact = (
        "every plan cut between storages was tried" if outcome.exact else f"{outcome.evaluated} plans tried"
    )
    return (
        f"Bound: no plan{keeps} on this host with these figures can be under {ms(outcome.bound_ns)} ms{budget}; the best is "
        f"{outcome.gap:.1%} over it ({exact}, {outcome.seconds:.2f} s)."
    )


def _copies_words(plan: Plan, done: Account) -> str:
    sizes = sorted(c.size_bytes for c in plan.chunks)
    ends = " to ".join(dict.fromkeys((size_words(sizes[0]), size_words(sizes[-1]))))
    chunks = "1 chunk" if len(sizes) == 1 else f"{len(sizes)} chunks of {ends}"
    lanes = [f"{size_words(size)} over GPU {gpu}'s lane{_onward(plan, gpu)}" for gpu, size in done.lanes]
    return f"copies {size_words(plan.copied_bytes)} in {chunks} ({', '.join(lanes)})"


def _onward(plan: Plan, gpu: int) -> str:
    paths = {c.path for c in plan.chunks if c.path[0] == gpu}
    relayed = any(p[-1] == plan.target for p in paths) and gpu != plan.target
    stay = any(p[-1] != plan.target for p in paths)
    return (" and on to the target" if relayed else "") + (" to stay there" if stay and not relayed else "")


def _layer_words(network: Network, layers: tuple[int, ...]) -> str:
    names = [network.layers[i].name or network.layers[i].kind for i in layers[:3]]
    count = f"{len(layers)} layers: " if len(layers) > 3 else ""
    return count + ", ".join(names) + (", ..." if len(layers) > 3 else "")


# JSON ----------------------------------------------------------------------------------------------------------------


def search_json(answer: Answer) -> str:
    """One object: what was asked, then what was found.

    `latency_ms` is what was minimised: of one cold start, or with --runs the mean; `cold_ms` is the cold start itself. `gap` is
    best / bound - 1. `gpus_asked`, target first, and `memory_budget_bytes` are null where nothing was asked. What to keep is there
    where it was asked, of `keep_bytes` and `keep_ratio` one not null.
    """
    outcome, network, options = answer.outcome, answer.profile.network, answer.options
    gpus = None if options.partners is None else [options.target, *options.partners]
    asked = {"keep_bytes": options.keep_bytes, "keep_ratio": options.keep_ratio} if options.keeps else {}
    best = strategy_object(outcome.best, network, kept=options.keeps)
    return json.dumps(
        {
            "model": network.model,
            "dtype": network.dtype,
            "batch": network.batch,
            "seq": network.seq,
            "host": answer.host.name,
            "profile_kind": answer.profile.kind,
            "gpus_asked": gpus,
            "memory_budget_bytes": options.memory_budget_bytes,
            "runs": options.runs,
            **asked,
            "strategies": [strategy_object(c, network, kept=options.keeps) for c in outcome.strategies],
            "not_shown": dict(outcome.left_out),
            "best": {**best, "launch": outcome.best.plan.launch.value},
            "bound_ms": outcome.bound_ns / 1e6,
            "gap": outcome.gap,
            "search_seconds": outcome.seconds,
        },
        allow_nan=False,
    )


def strategy_object(candidate: Candidate, network: Network, *, kept: bool) -> dict[str, object]:
    plan = candidate.plan
    return {
        "name": candidate.name,
        "latency_ms": candidate.mean_ns / 1e6,
        "cold_ms": candidate.makespan_ns / 1e6,
        "copied_bytes": plan.copied_bytes,
        "direct_bytes": plan.direct_bytes(network),
        **({"kept_bytes": plan.kept_bytes(network)} if kept else {}),
        "held_bytes": plan.held_bytes(network),
        "chunks": len(plan.chunks),
        "gpus": list(plan.gpus),
    }


def _in_place_bytes(plan: Plan, network: Network) -> int:
    return in_place(plan, network).size_bytes + in_place(plan, network, Access.PEER).size_bytes


def ms(time_ns: float) -> str:
    return f"{time_ns / 1e6:.2f}"


def _change(gain_ns: float) -> str:
    return f"{ms(abs(gain_ns))} ms {'less' if gain_ns >= 0 else 'more'}"


def mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f}"
