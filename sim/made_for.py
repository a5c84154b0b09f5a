"""Whether a plan file was made for the network and the host at hand: one wording for every command that reads one."""

from __future__ import annotations

from sim.catalog import find_host, host_names
from sim.errors import InputError, require
from sim.files import PlanFile
from sim.hints import run_words
from sim.host import Host
from sim.network import Network
from sim.plan import Plan


def host_named(path: str, name: str, given: str | None) -> Host:
    """The host `given`, else the one that a file names: one that ships, since only the user may name a path to open."""
    require(
        given is not None or name in host_names(),
        f"{path}: made for host {name!r}, which does not ship; pass its file with --host",
    )
    return find_host(name if given is None else given)


def check_host(path: str, file: PlanFile, host: Host, instead: str = "") -> None:
    """Raises InputError where the plan was made for another host, or by other constants of this one; `instead` ends the remedy."""
    differs = other_host(file, host)
    require(
        not differs,
        f"{path}: {differs}; search again for {host.name}, or pass the file of the host that it was made for with --host"
        f"{instead}",
    )


def other_host(file: PlanFile, host: Host) -> str:
    """How `host` is not the one that the plan was made for; empty where it is."""
    if host.digest == file.host_digest:
        return ""
    if host.name != file.host:
        return f"made for host {file.host}, not for {host.name}"
    return (
        f"made for {file.host} when it had other links, GPUs or costs than {host.name} has now "
        f"(sha256 {_short(file.host_digest)}, now {_short(host.digest)})"
    )


def check_name(path: str, plan: Plan) -> None:
    """Raises InputError of a plan whose name cannot be printed: what a terminal obeys is no part of one."""
    require(
        bool(plan.name.strip()) and plan.name.isprintable(),
        f"{path}: the plan's name {plan.name!r} cannot be printed; change it",
    )


def check_network(path: str, file: PlanFile, network: Network, module: str | None = None) -> None:
    """Raises InputError where the plan was made for another network; what differs is told as far as can be told.

    `module`: what the network is, where it is not the one that the file names but a caller's own.
    """
    if network.digest == file.network_digest:
        return
    there = run_words(file.model, file.dtype, file.batch, file.seq)
    here = run_words(network.model, network.dtype, network.batch, network.seq)
    require(there == here, f"{path}: made for {there}, not for {here}; pass a plan for that, or search one")
    what, remedy = file.model, "search again with the packages installed here"
    if module is not None:
        what, remedy = module, "give the module that it was made for, or search a plan for this one"
    raise InputError(
        f"{path}: made for another network than {what} is here: {_differs(file, network, what)}; {remedy}"
    )


def _differs(file: PlanFile, network: Network, what: str) -> str:
    there, here = file.plan.access, network.layers
    if len(there) != len(here):
        return f"it has {len(there)} layers, {what} has {len(here)} here"
    odd = next((i for i, layer in enumerate(here) if len(layer.reads) != len(there[i])), None)
    if odd is None:
        digests = f"sha256 {_short(file.network_digest)}, here {_short(network.digest)}"
        return f"layers, storages or their names differ ({digests})"
    return f"layer {odd} ({here[odd].name}) reads {len(here[odd].reads)} storages here and {len(there[odd])} there"


def _short(digest: str) -> str:
    return f"{digest[:12]}..."
