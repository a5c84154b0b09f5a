"""What a calibration keeps on disk, each file whole or not at all: a state file per case, then samples, host and profiles.

DIR/state/session.yaml, case-*.yaml     what has been measured: an interrupted run goes on from here
DIR/state/network-MODEL....yaml         of a network, what is timed without the profiler, until the rest is
DIR/samples/NAME.yaml                   identity, every case's raw samples, the fits and their residuals
DIR/samples/NAME/MODEL....yaml          raw layer times of one network
DIR/hosts/NAME.yaml                     the Host
DIR/profiles/NAME/MODEL....yaml         a Profile per network
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from calibrate.assemble import GpuFacts
from calibrate.fit import Fit
from calibrate.identity import GpuState, HostIdentity
from calibrate.layers import LayersResult, Unwatched
from calibrate.samples import CaseResult
from sim.catalog import Request, profile_name
from sim.errors import InputError, require
from sim.files import FileKind, read_record, write_host, write_profile, write_record
from sim.host import Host
from sim.network import Network
from sim.output import check_file_name, make_folder
from sim.profile import Profile, Provenance


@dataclass(frozen=True, slots=True)
class Session:
    """What a state folder belongs to: another host or another effort must not be mixed into it."""

    name: str
    about: str
    effort: str
    figures: bool
    gpus: tuple[GpuFacts, ...]
    uuids: tuple[str, ...]
    """Empty where nobody could ask."""
    provenance: Provenance

    def __post_init__(self) -> None:
        check_file_name(self.name, "name")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything about a host but its networks: what was asked of it and what was made of that."""

    name: str
    provenance: Provenance
    figures: bool
    """False where GPUs were only played, and no number means anything."""
    identity: HostIdentity | None
    before: tuple[GpuState, ...]
    after: tuple[GpuState, ...]
    flags: tuple[str, ...]
    """Reasons to distrust figures: throttled or busy GPUs, samples that scatter."""
    refused: tuple[str, ...]
    """Fits that explain their samples badly, in words."""
    cases: tuple[CaseResult, ...]
    fits: tuple[Fit, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class FirstHalf:
    """What of a network is on disk before its second half is measured."""

    network_digest: str
    unwatched: Unwatched


SESSION = FileKind("calibration-session", 1, Session)
CASE = FileKind("calibration-case", 1, CaseResult)
CALIBRATION = FileKind("calibration", 1, Calibration)
LAYERS = FileKind("layer-samples", 3, LayersResult, last="seconds")
FIRST_HALF = FileKind("layer-samples-first-half", 1, FirstHalf, last="network_digest")

Write = Callable[..., None]
T = TypeVar("T")


def _measured(path: Path, kind: FileKind[T]) -> T | None:
    """What a file of a calibration says, None where there is none."""
    try:
        return read_record(path, kind) if path.exists() else None
    except InputError as error:
        raise InputError(f"{error}; or remove it, and that is measured again") from None


class Store:
    """A calibration's folder. `write` is `sim.files.write_record`, or in tests one that fails."""

    def __init__(self, folder: Path, write: Write = write_record) -> None:
        self.folder = folder
        self._write = write

    # State

    def open(self, session: Session, *, fresh: bool) -> None:
        """Take up the folder. Raises InputError where it holds the state of another host or effort.

        `fresh` starts over what was measured by the same name; what has another is another host's, and stays.
        """
        path = self.folder / "state" / "session.yaml"
        found = self._before(path, fresh)
        if found is not None:
            require(
                found.name == session.name,
                f"{path.parent}: holds what was measured of {found.name}, and now it is {session.name}; choose another --out",
            )
        # what lies there without a session is left of a state that was being removed, whose host nobody knows
        if found is None or fresh:
            self._forget(session.name, everything=fresh)
            found = None
        if found is not None:
            same = "pass --quick" if found.effort == "quick" else "leave out --quick"
            for what, had, has, remedy in (
                ("effort", found.effort, session.effort, f"{same} to go on from it, --fresh"),
                ("GPUs", [g.name for g in found.gpus], [g.name for g in session.gpus], "pass --fresh"),
                ("GPUs", found.uuids, session.uuids, "pass --fresh"),
                ("driver", found.provenance.driver, session.provenance.driver, "pass --fresh"),
                ("PyTorch", found.provenance.torch, session.provenance.torch, "pass --fresh"),
            ):
                if had != has:
                    raise InputError(
                        f"{path.parent}: holds what was measured with {what} {had}, and now it is {has}; "
                        f"{remedy} to start over, or another --out"
                    )
            return
        self.put(path, SESSION, session)

    def _forget(self, name: str, *, everything: bool) -> None:
        """Remove what was measured and, with `everything`, what else was made for `name`; the session last."""
        state = self.folder / "state"
        try:
            for kept in (*state.glob("case-*.yaml"), *state.glob("network-*.yaml")):
                kept.unlink()
            folders = [self._layers(name)]
            if everything:
                for file in (self.samples_path(name), self.folder / "hosts" / f"{name}.yaml"):
                    file.unlink(missing_ok=True)
                folders += [self.folder / "profiles" / name, state]
            for folder in folders:
                if folder.exists():
                    shutil.rmtree(folder)
        except OSError as error:
            raise InputError(
                f"{self.folder}: what was measured before cannot be removed ({error}); remove it by hand, or choose another --out"
            ) from None

    def _before(self, path: Path, fresh: bool) -> Session | None:
        try:
            return read_record(path, SESSION) if path.exists() else None
        except InputError as error:
            remedy = (
                f"; whose state it is cannot be told: remove {path.parent} by hand, or choose another --out"
            )
            raise InputError(f"{error}{remedy if fresh else ''}") from None

    def session(self) -> Session:
        path = self.folder / "state" / "session.yaml"
        if not path.exists():
            raise InputError(
                f"{self.folder}: nothing was measured here; run `calibrate run --out` with this folder"
            )
        return read_record(path, SESSION)

    def case(self, name: str) -> CaseResult | None:
        path = self.folder / "state" / f"case-{name}.yaml"
        return _measured(path, CASE)

    def keep_case(self, result: CaseResult) -> None:
        self.put(self.folder / "state" / f"case-{result.case}.yaml", CASE, result)

    def keep_failure(self, error: BaseException) -> None:
        """Where an unexpected error came from, for whoever has to find out; the command itself says one line."""
        with suppress(OSError):
            text = "".join(traceback.format_exception(error))
            (self.folder / "state" / "last-error.txt").write_text(text)

    # Networks

    def _layers(self, name: str) -> Path:
        return self.folder / "samples" / name

    def layers(self, name: str, network: Network) -> LayersResult | None:
        """What was measured for this very network, None where nothing was, or for another of its name."""
        found = _measured(self._layers(name) / file_name(network), LAYERS)
        return found if found is not None and found.network.digest == network.digest else None

    def first_half(self, network: Network) -> Unwatched | None:
        """What of this very network was timed without the profiler, None where nothing was."""
        found = _measured(self._first_half(network), FIRST_HALF)
        return found.unwatched if found is not None and found.network_digest == network.digest else None

    def keep_first_half(self, network: Network, found: Unwatched) -> None:
        self.put(self._first_half(network), FIRST_HALF, FirstHalf(network.digest, found))

    def _first_half(self, network: Network) -> Path:
        return self.folder / "state" / f"network-{file_name(network)}"

    def all_layers(self, name: str) -> tuple[LayersResult, ...]:
        return tuple(read_record(path, LAYERS) for path in sorted(self._layers(name).glob("*.yaml")))

    def keep_layers(self, name: str, result: LayersResult) -> None:
        self.put(self._layers(name) / file_name(result.network), LAYERS, result)
        self._first_half(result.network).unlink(missing_ok=True)

    # Results

    def samples_path(self, name: str) -> Path:
        return self.folder / "samples" / f"{name}.yaml"

    def keep_calibration(self, calibration: Calibration) -> Path:
        path = self.samples_path(calibration.name)
        self.put(path, CALIBRATION, calibration)
        return path

    def keep_host(self, host: Host) -> Path:
        path = self.folder / "hosts" / f"{host.name}.yaml"
        make_folder(path.parent)
        write_host(path, host, force=True)
        return path

    def keep_profile(self, name: str, profile: Profile) -> Path:
        path = self.folder / "profiles" / name / file_name(profile.network)
        make_folder(path.parent)
        write_profile(path, profile, force=True)
        return path

    def put(self, path: Path, kind: FileKind[Any], record: object) -> None:
        make_folder(path.parent)
        try:
            self._write(path, kind, record, force=True)
        except InputError as error:
            raise InputError(f"{error}; what was measured before is kept in {self.folder}") from None


def kept_words(cases: int, networks: int) -> str:
    """`14 cases and 1 network that were measured`; empty of nothing."""
    counts = ((cases, "case"), (networks, "network"))
    parts = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts if count]
    return (
        f"{' and '.join(parts)} that {'was' if cases + networks == 1 else 'were'} measured" if parts else ""
    )


def file_name(network: Network) -> str:
    request = Request(network.model, network.batch, network.dtype, network.seq)
    return profile_name(request, network.seq)
