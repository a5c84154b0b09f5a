"""YAML text to plain data and back: one document, strictly read, compactly written.

Reading builds mappings, lists and scalars from parser events, one by one and without recursion, so that neither depth nor
aliases can hurt. libyaml does the parsing where PyYAML was built with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from sim.errors import InputError

MAX_DEPTH = 32
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels; no file of this project is"

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan, ".NaN": math.nan,
}  # fmt: skip
CONSTANTS: dict[Any, str] = {None: "null", True: "true", False: "false"}
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@+-]*")
"""Strings written without quotes, where they are none of `_WORDS`."""


class _Document:
    """One YAML document of mappings, sequences and scalars, built without recursion."""

    def __init__(self, text: bytes) -> None:
        self.bytes = text

    def read(self) -> Any:
        try:
            text = self.bytes.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"is not UTF-8 text (byte {error.start}); is it a YAML file?") from None
        try:
            found = self.build(yaml.parse(text, Loader=_LOADER))
        except yaml.YAMLError as error:
            raise self.broken(error) from None
        if text and text[-1] not in "\n}]\"'":
            last = text[text.rfind("\n") + 1 :]
            raise InputError(
                f"seems cut off: its last line {last[:40]!r} has no end of line; write the file again"
            )
        return found

    def broken(self, error: yaml.YAMLError) -> InputError:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        where = f"line {mark.line + 1}: " if mark is not None else ""
        if "nesting depth" in problem:  # libyaml 0.2.6 has a limit of its own, and looks ahead past ours
            return InputError(where + _TOO_DEEP)
        return InputError(f"{where}not valid YAML, or cut off ({problem}); mend it or write the file again")

    def refuse(self, event: Any, what: str) -> InputError:
        return InputError(f"line {event.start_mark.line + 1}: {what}")

    def build(self, events: Iterator[Any]) -> Any:
        root: list[Any] = []
        stack: list[tuple[Any, Any]] = []
        """Open collections outside the present one, each with the key it stood at."""
        here: Any = root
        key: Any = None
        for event in events:
            kind = type(event)
            if kind is yaml.ScalarEvent:
                if event.anchor is not None or event.tag is not None:
                    raise self.refuse(event, "anchors and tags are not used here; write the value itself")
                if type(here) is dict and key is None:
                    key = event.value
                    if key in here:
                        raise self.refuse(event, f"key {key!r} is there twice; keep one")
                    continue
                value = _scalar(event.value) if event.implicit[0] else event.value
            elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
                if event.anchor is not None or event.tag is not None:
                    raise self.refuse(event, "anchors and tags are not used here; write the value itself")
                if type(here) is dict and key is None:
                    raise self.refuse(event, "a key must be a word, not a collection")
                if len(stack) >= MAX_DEPTH:
                    raise self.refuse(event, _TOO_DEEP)
                stack.append((here, key))
                here, key = ({} if kind is yaml.MappingStartEvent else []), None
                continue
            elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
                value = here
                here, key = stack.pop()
            elif kind is yaml.AliasEvent:
                raise self.refuse(
                    event, f"alias *{event.anchor}: aliases are not used here; write the value itself"
                )
            elif kind is yaml.DocumentStartEvent and root:
                raise self.refuse(event, "a second document starts; keep one per file")
            else:
                continue
            if type(here) is dict:
                here[key] = value
                key = None
            else:
                here.append(value)
        return root[0] if root else None


def _scalar(text: str) -> Any:
    """The value of a plain scalar, by YAML 1.2's core schema (without octal and hexadecimal)."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "0123456789+-.":
        try:
            if _INT.fullmatch(text):
                return int(text)
            if _FLOAT.fullmatch(text):
                return float(text)
        except ValueError:  # more digits than Python reads into an int
            return text
    return text


def _emit(value: Any, flow: bool = False) -> Iterator[yaml.Event]:
    """Events of plain data. Mappings get a line per key, small ones and every item of a list one line in all."""
    if isinstance(value, dict):
        yield yaml.MappingStartEvent(None, None, True, flow_style=flow)
        for key, item in value.items():
            yield from _emit(key)
            yield from _emit(item, flow or (isinstance(item, dict) and _small(item)))
        yield yaml.MappingEndEvent()
    elif isinstance(value, list | tuple):
        flow = flow or not any(isinstance(item, dict | list | tuple) for item in value)
        yield yaml.SequenceStartEvent(None, None, True, flow_style=flow)
        for item in value:
            yield from _emit(item, flow=True)
        yield yaml.SequenceEndEvent()
    elif isinstance(value, str):
        value = str.__str__(value)  # the bare text of a StrEnum
        plain = value not in _WORDS and _PLAIN.fullmatch(value) is not None
        yield yaml.ScalarEvent(None, None, (plain, not plain), value, style=None if plain else '"')
    else:
        yield yaml.ScalarEvent(None, None, (True, False), _bare(value))


def _bare(value: Any) -> str:
    """The text of a constant or a number. A subclass, like NumPy's float64, puts its own name in its `repr`, for no reader."""
    if value is None or type(value) is bool:
        return CONSTANTS[value]
    for kind in (int, float):
        if isinstance(value, kind):
            return kind.__repr__(value)
    raise TypeError(f"a file cannot hold {value!r}, a {type(value).__name__}")


def _small(value: dict[str, Any]) -> bool:
    return len(value) <= 5 and not any(isinstance(item, dict | list | tuple) for item in value.values())


def load(text: bytes) -> Any:
    """Raises InputError with the line and what is wrong there."""
    return _Document(text).read()


def dump(plain: dict[str, Any]) -> str:
    """The text of a file. Floats round-trip exactly. Raises InputError where a string cannot stand in a text file."""
    events: list[yaml.Event] = [
        yaml.StreamStartEvent(),
        yaml.DocumentStartEvent(),
        *_emit(plain),
        yaml.DocumentEndEvent(),
        yaml.StreamEndEvent(),
    ]
    try:
        text: str = yaml.emit(events, Dumper=_DUMPER, width=2**30, allow_unicode=True)
        text.encode()
    except (yaml.YAMLError, UnicodeError) as error:
        raise InputError(f"a file cannot hold this text ({error}); use printable characters") from None
    return text
