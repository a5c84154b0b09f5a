"""The only reader and writer of files between commands: YAML, read strictly, written whole or not at all.

Every file names its `kind` and `schema`. cattrs makes records of the plain data in it, primitives taken as they are and
never converted, and the records' constructors check them. A package adds a file of its own with one `FileKind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import StrEnum
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from sim.document import CONSTANTS, dump, load
from sim.errors import InputError, require
from sim.host import LARGEST, Figure, Host
from sim.network import Read
from sim.output import write_file
from sim.plan import Plan
from sim.profile import Profile, ProfileKind, Provenance, Timing

MAX_BYTES = 64 * 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileKind(Generic[T]):
    """What a file holds: its `kind:` and `schema:` and the record of all else. The record has no fields of those names.

    `last` is the field that stands last, or "" for the record's own last: one whose loss or shortening is always
    noticed, so that a file that was cut off is never taken for a whole one.
    """

    kind: str
    schema: int
    record: type[T]
    last: str = ""


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan with what it is for and what was predicted for it. `mean_ns`: over several runs, where that was asked."""

    model: str
    dtype: str
    batch: int
    seq: int | None
    network_digest: str
    host: str
    host_digest: str
    profile_kind: ProfileKind
    provenance: Provenance
    plan: Plan
    mean_ns: float | None
    predicted_ns: float
    bound_ns: float

    def __post_init__(self) -> None:
        for time_ns in (self.mean_ns or 0.0, self.predicted_ns, self.bound_ns):
            require(
                0 <= time_ns <= LARGEST,
                f"plan of {self.model!r}: {time_ns} ns; a prediction is from 0 to {LARGEST}",
            )


HOST = FileKind("host", 1, Host, last="costs")
PROFILE = FileKind("profile", 2, Profile, last="layers")
PLAN = FileKind("plan", 1, PlanFile, last="bound_ns")


def read_host(path: str | Path) -> Host:
    return read_record(path, HOST)


def write_host(path: str | Path, host: Host, *, force: bool = False) -> None:
    write_record(path, HOST, host, force=force)


def read_profile(path: str | Path) -> Profile:
    return read_record(path, PROFILE)


def write_profile(path: str | Path, profile: Profile, *, force: bool = False) -> None:
    write_record(path, PROFILE, profile, force=force)


def read_plan(path: str | Path) -> PlanFile:
    return read_record(path, PLAN)


def write_plan(path: str | Path, plan: PlanFile, *, force: bool = False) -> None:
    write_record(path, PLAN, plan, force=force)


def read_record(path: str | Path, kind: FileKind[T]) -> T:
    """Raises InputError, one line that names the file, the place in it, the rule and the remedy."""
    try:
        return parse_record(_read(Path(path)), kind)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_record(path: str | Path, kind: FileKind[T], record: T, *, force: bool = False) -> None:
    """Raises InputError where the path exists (unless `force`) or cannot be written."""
    write_file(path, format_record(kind, record).encode(), force=force)


def parse_record(text: bytes, kind: FileKind[T]) -> T:
    document = load(text)
    if not isinstance(document, dict):
        raise InputError(f"holds no mapping; a {kind.kind} file starts with `kind: {kind.kind}`")
    found = document.pop("kind", None)
    require(
        found == kind.kind,
        f"kind is {_show(found)}; a {kind.kind} file says `kind: {kind.kind}`: pass the right file",
    )
    schema = document.pop("schema", None)
    require(
        type(schema) is int and schema == kind.schema,
        f"schema is {_show(schema)}; this version reads schema {kind.schema} of {kind.kind} files: write the file again with it",
    )
    try:
        return _READER.structure(document, kind.record)
    except BaseValidationError as error:
        raise InputError(_explain(error)) from None


def format_record(kind: FileKind[T], record: T) -> str:
    """The file's text. Items of lists stand on a line each; floats round-trip exactly."""
    plain = _WRITER.unstructure(record, kind.record)
    last = kind.last or next(reversed(plain))
    plain[last] = plain.pop(last)
    return dump({"kind": kind.kind, "schema": kind.schema, **plain})


def _read(path: Path) -> bytes:
    try:
        require(path.is_file() or not path.exists(), "is not a regular file; pass the path of a YAML file")
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError("there is no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read ({reason}); check the path and its permissions") from None
    require(len(text) <= MAX_BYTES, f"is larger than {MAX_BYTES >> 20} MiB; no file of this project is")
    return text


# Records to plain data and back ---------------------------------------------------------------------------------------


def _float(value: Any, _: Any) -> float:
    if type(value) is not float:
        if type(value) is not int:
            raise InputError(f"is {_show(value)}; it must be a number")
        if abs(value) > 2**1000:
            raise InputError("is a number too large to count with")
        return float(value)
    if not math.isfinite(value):
        raise InputError(f"is {value}; it must be a finite number")
    return value


def _int(value: Any, _: Any) -> int:
    if type(value) is not int:
        raise InputError(f"is {_show(value)}; it must be a whole number")
    return value


def _str(value: Any, _: Any) -> str:
    if type(value) is not str:
        raise InputError(f"is {_show(value)}; it must be text: quote it if it looks like a number")
    return value


def _bool(value: Any, _: Any) -> bool:
    if type(value) is not bool:
        raise InputError(f"is {_show(value)}; it must be true or false")
    return value


def _choice(value: Any, cl: Any) -> Any:
    """A Literal of strings or a StrEnum."""
    options = {o: o for o in get_args(cl)} or {o.value: o for o in cl}
    if type(value) is not str or value not in options:
        raise InputError(f"is {_show(value)}; it must be one of {', '.join(map(str, options))}")
    return options[value]


def _optional(value: Any, cl: Any) -> Any:
    if value is None:
        return None
    (inner,) = (a for a in get_args(cl) if a is not type(None))
    return _READER.structure(value, inner)


def _show(value: Any) -> str:
    """A value as its file has it, cut to fit a line."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = CONSTANTS[value] if value is None or type(value) is bool else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_ROWS: tuple[tuple[type, tuple[tuple[str, Callable[[Any, Any], Any]], ...]], ...] = (
    (Read, (("storage", _int), ("touched_bytes", _int))),
    (Timing, (("median_ns", _float), ("spread_ns", _float), ("samples", _int))),
)
"""Records written as a bare list of their fields: they are many, and their lines stay readable."""
_RENAMED: dict[tuple[type, str], str] = {(Profile, "kind"): "profile_kind"}
"""Fields under another key, since `kind` is the file's own."""


def _row(cl: Any, columns: tuple[tuple[str, Callable[[Any, Any], Any]], ...]) -> Callable[[Any, Any], Any]:
    names = ", ".join(name for name, _ in columns)

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not list or len(value) != len(columns):
            raise InputError(f"must be a list of {len(columns)}: [{names}]")
        cells = []
        for at, (cell, (_, check)) in enumerate(zip(value, columns, strict=True)):
            try:
                cells.append(check(cell, None))
            except InputError as error:
                error.add_note(IterableValidationNote("", at, None))
                raise IterableValidationError("", [error], cl) from None
        return cl(*cells)

    return structure


def _tuple(cl: Any) -> Callable[[Any, Any], Any]:
    """Lists of any length, or of a fixed one."""
    *inner, last = get_args(cl)
    length = None if last is Ellipsis else len(inner) + 1
    types = inner if length is None else [*inner, last]
    handlers = [_READER.get_structure_hook(t) for t in types]

    def structure(value: Any, _: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != (length or len(value)):
            raise InputError(f"is {_show(value)}; it must be a list" + (f" of {length}" if length else ""))
        first, kind = handlers[0], types[0]
        cells = []
        try:
            for at, item in enumerate(value):
                cells.append(first(item, kind) if length is None else handlers[at](item, types[at]))
        except (InputError, BaseValidationError) as error:
            error.add_note(IterableValidationNote("", len(cells), None))
            raise IterableValidationError("", [error], cl) from None
        return tuple(cells)

    return structure


def _record(cl: Any) -> Callable[[Any, Any], Any]:
    make = make_dict_structure_fn(cl, _READER, _cattrs_forbid_extra_keys=True, **_renamed(cl))

    def structure(value: Any, _: Any) -> Any:
        if type(value) is not dict:
            raise InputError(f"is {_show(value)}; it must be a mapping of {', '.join(_keys(cl))}")
        return make(value, cl)

    return structure


def _unstructure(cl: Any) -> Callable[[Any], Any]:
    return make_dict_unstructure_fn(cl, _WRITER, _cattrs_omit_if_default=cl is Figure, **_renamed(cl))


def _renamed(cl: Any) -> Any:
    return {name: override(rename=key) for (owner, name), key in _RENAMED.items() if owner is cl}


def _keys(cl: Any) -> list[str]:
    return [_RENAMED.get((cl, field.name), field.name) for field in fields(cl) if field.init]


def _explain(error: BaseException) -> str:
    """The first thing wrong, with the path to it."""
    path = ""
    while isinstance(error, BaseValidationError):
        cl = error.cl
        inner = next(
            (e for e in error.exceptions if isinstance(e, ForbiddenExtraKeysError)), error.exceptions[0]
        )
        for note in getattr(inner, "__notes__", ()):
            if isinstance(note, AttributeValidationNote):
                path += "." + _RENAMED.get((cl, note.name), note.name)
            elif isinstance(note, IterableValidationNote):
                path += f"[{note.index}]"
        error = inner
    where = path.lstrip(".")
    if isinstance(error, ForbiddenExtraKeysError):
        key = min(error.extra_fields)
        close = get_close_matches(key, _keys(error.cl), 1)
        remedy = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(_keys(error.cl))}"
        return f"{where + ': ' if where else ''}unknown key {key!r}; {remedy}"
    if isinstance(error, KeyError):
        return f"{where}: is missing; add it, or make the file again: it was cut off, or another version wrote it"
    says = str(error)
    return f"{where} {says}" if says.startswith(("is ", "must ")) else f"{where}{': ' if where else ''}{says}"


def _is_record(cl: Any) -> bool:
    return isinstance(cl, type) and is_dataclass(cl)


def _is_tuple(cl: Any) -> bool:
    return get_origin(cl) is tuple


def _is_choice(cl: Any) -> bool:
    return get_origin(cl) is Literal


def _is_optional(cl: Any) -> bool:
    return get_origin(cl) in (Union, UnionType) and type(None) in get_args(cl)


_READER = Converter()
_WRITER = Converter(unstruct_collection_overrides={tuple: list})
_READER.register_structure_hook(float, _float)
_READER.register_structure_hook(int, _int)
_READER.register_structure_hook(str, _str)
_READER.register_structure_hook(bool, _bool)
_READER.register_structure_hook(StrEnum, _choice)  # by class: the hook for str would match it first
_READER.register_structure_hook_factory(_is_record, _record)
_READER.register_structure_hook_factory(_is_tuple, _tuple)
_READER.register_structure_hook_func(_is_choice, _choice)
_READER.register_structure_hook_func(_is_optional, _optional)
_WRITER.register_unstructure_hook_factory(_is_record, _unstructure)
for _cl, _columns in _ROWS:
    _READER.register_structure_hook(_cl, _row(_cl, _columns))
    _WRITER.register_unstructure_hook(_cl, attrgetter(*(name for name, _ in _columns)))
