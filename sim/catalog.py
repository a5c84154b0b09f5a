"""What ships with the package, found by name: hosts, and profiles that spare the first answer torch and a trace."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

from sim.console import note
from sim.errors import InputError, require
from sim.files import read_host, read_profile
from sim.hints import options_words
from sim.host import Host
from sim.network import Network
from sim.profile import Profile
from sim.provenance import stamp

if TYPE_CHECKING:
    from sim.trace import Trace

DEFAULT_HOST = "p3.8xlarge"


@dataclass(frozen=True, slots=True)
class Request:
    """A model as a user asks for it. None where nothing was asked: batch 1, fp32, the model's own length."""

    model: str
    batch: int | None = None
    dtype: str | None = None
    seq: int | None = None

    @property
    def samples(self) -> int:
        return 1 if self.batch is None else self.batch

    @property
    def precision(self) -> str:
        return "fp32" if self.dtype is None else self.dtype


def host_names() -> tuple[str, ...]:
    """The shipped hosts, sorted."""
    found = (entry.name for entry in _folder("hosts").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


def host_file(name_or_path: str | None) -> str | None:
    """The path of a host file where that is what was given, not a name: it has a `/` or ends in .yaml."""
    if name_or_path is None or not ("/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))):
        return None
    return name_or_path


def host_path(name_or_path: str | None) -> str | None:
    """The path of a host's file, whether that was given or a name that ships; None of any other name, and of nothing."""
    path = host_file(name_or_path)
    if path is not None or name_or_path not in host_names():
        return path
    return str(_folder("hosts") / f"{name_or_path}.yaml")


def find_host(name_or_path: str) -> Host:
    """A shipped host by name, or any host by the path of its file."""
    path = host_file(name_or_path)
    if path is not None:
        return read_host(path)
    names = host_names()
    if name_or_path not in names:
        near = get_close_matches(name_or_path, names, 3, 0.3) or names[:3]
        raise InputError(
            f"host {name_or_path!r} is not known; nearest: {', '.join(near)}; "
            "`sim hosts` lists all, and a path to a host file works too"
        )
    with as_file(_folder("hosts") / f"{name_or_path}.yaml") as shipped:
        return read_host(shipped)


def profile_name(request: Request, seq: int | None) -> str:
    """Where a shipped profile lies, in its host's folder: `hf-bert-base.fp32.b1.s384.yaml`."""
    model = re.sub(r"[^A-Za-z0-9._=,+-]", "-", request.model)
    tokens = "" if seq is None else f".s{seq}"
    return f"{model}.{request.precision}.b{request.samples}{tokens}.yaml"


def find_profile(host: Host, request: Request) -> Profile | None:
    """The shipped profile of this model with these options on this very host, or None.

    Without a length asked for, the only one shipped is taken: profiles ship for a model's own length alone.
    """
    folder = _folder("profiles") / host.name
    if "/" in host.name or not folder.is_dir():
        return None
    exact = profile_name(request, request.seq)
    names = [exact]
    if request.seq is None:
        stem = exact.removesuffix(".yaml")
        lengths = [
            e.name for e in folder.iterdir() if re.fullmatch(re.escape(stem) + r"\.s\d+\.yaml", e.name)
        ]
        names += lengths if len(lengths) == 1 else []
    for name in names:
        try:
            if not (folder / name).is_file():
                continue
        except (OSError, ValueError):  # a name that no file can have
            continue
        with as_file(folder / name) as path:
            profile = read_profile(path)
        if profile.network.model == request.model and profile.host_digest == host.digest:
            return profile
    return None


def check_plans_model(
    path: str, model: str, given: str | None, *, profile: str | None = None, instead: str = ""
) -> None:
    """A plan's model may be code to import and call, which only the user may ask for, never a file: by `given`, its name, or
    by a `profile`, where that makes calling it needless. Raises InputError; `instead` ends its remedy."""
    require(
        given is None or given == model,
        f"{path}: made for model {model}, not {given}; pass the plan of {given}",
    )
    factory = ":" in model and not model.startswith("hf:")
    require(
        not factory or given is not None or profile is not None,
        f"{path}: made for {model}, which would be imported and called to trace it; pass --model {model} to allow that{instead}",
    )


def no_profile(host: Host, request: Request) -> str:
    """The line for a model that nobody measured on a host, and that nothing can be estimated for there."""
    folder = _folder("profiles") / host.name
    there = sorted(e.name for e in folder.iterdir()) if "/" not in host.name and folder.is_dir() else []
    models = dict.fromkeys(name.split(".")[0].replace("hf-", "hf:", 1) for name in there)
    have = f"; profiles ship of {', '.join(models)}" if models else ""
    if own := [words for name in there if (words := _measured(name, request)) is not None]:
        have = f"; of {request.model} profiles ship in {', and in '.join(own)}"
    if there and find_host(host.name).digest != host.digest:
        have = f"; profiles that ship hold for the shipped constants of {host.name} alone"
    asked = options_words(request.precision, request.samples, request.seq)
    return (
        f"{request.model} in {asked}: no profile for host {host.name!r}, whose "
        f"file has no roofline figures to estimate one from{have}; measure one there with `calibrate run` and "
        "pass it with --profile"
    )


def _measured(name: str, request: Request) -> str | None:
    """With which options the shipped profile of this name was measured; None where it is another model's."""
    stem = profile_name(replace(request, dtype="*"), None).split(".*.")[0]
    found = re.fullmatch(re.escape(stem) + r"\.(\w+)\.b(\d+)(?:\.s(\d+))?\.yaml", name)
    if found is None:
        return None
    dtype, batch, seq = found.groups()
    return options_words(dtype, int(batch), None if seq is None else int(seq))


def obtain_profile(host: Host, request: Request, path: str | None = None) -> Profile:
    """The profile at `path`, else the shipped one, else one traced and estimated now. Raises InputError for a wrong one."""
    if path is not None:
        profile = read_profile(path)
        _check(profile, host, request, path)
        return profile
    shipped = find_profile(host, request)
    if shipped is not None:
        return shipped
    require(host.roofline is not None, no_profile(host, request))
    from sim.estimate import estimate  # noqa: PLC0415 - torch takes seconds to import, and a shipped profile needs none

    trace = _trace(request, f"no profile at hand; tracing it and estimating one for {host.name}")
    inputs = (f"host:{host.digest}", f"network:{trace.network.digest}")
    return estimate(trace, host, stamp(host.name, host.gpus[0].name, inputs=inputs))


def obtain_network(request: Request) -> Network:
    """The network alone: from a shipped profile of any host, else traced now."""
    for name in host_names():
        profile = find_profile(find_host(name), request)
        if profile is not None:
            return profile.network
    return _trace(request, "tracing it").network


def _trace(request: Request, why: str) -> Trace:
    """Build on the meta device, and only then say what takes a while: a name that is wrong is one line."""
    from sim.models import build  # noqa: PLC0415 - torch takes seconds to import, and a shipped profile needs none
    from sim.trace import trace  # noqa: PLC0415 - the same

    built = build(request.model, batch=request.samples, dtype=request.dtype, seq=request.seq, device="meta")
    note(f"{request.model}: {why} (imports torch)")
    return trace(built)


def _check(profile: Profile, host: Host, request: Request, path: str) -> None:
    network = profile.network
    for what, asked, found in (
        ("model", request.model, network.model),
        ("batch", request.batch, network.batch),
        ("dtype", request.dtype, network.dtype),
        ("seq", request.seq, network.seq),
    ):
        require(
            asked is None or asked == found,
            f"{path}: a profile of another network: its {what} is {found}, not {asked}; "
            f"pass the profile of {request.model}, or ask for what it holds",
        )
    require(
        profile.host_digest == host.digest,
        f"{path}: a profile made on {profile.provenance.host or 'another host'}, not for {host.name} as its file has it "
        "now; pass its host with --host, or make the profile again",
    )


def _folder(name: str) -> Traversable:
    return files("scenarios") / name
