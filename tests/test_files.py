"""Files round-trip exactly, appear whole or not at all, and say in one line what is wrong with them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim import document, output
from sim.errors import InputError
from sim.files import (
    HOST,
    PLAN,
    PROFILE,
    FileKind,
    PlanFile,
    format_record,
    parse_record,
    read_host,
    read_plan,
    read_profile,
    read_record,
    write_host,
    write_plan,
    write_profile,
    write_record,
)
from sim.plan import Chunk
from tests import strategies as some
from tests.builders import copied, host, network, profile

NETWORK = network(3000, 0, (2000, 500))
MACHINE = host(2)


def plan_file() -> PlanFile:
    made = profile(NETWORK, MACHINE)
    plan = copied(NETWORK, Chunk(0, 3072, (0,)), Chunk(3072, NETWORK.arena_bytes, (1, 0)))
    return PlanFile(
        model="test",
        dtype="fp32",
        batch=1,
        seq=None,
        network_digest=NETWORK.digest,
        host="test",
        host_digest=MACHINE.digest,
        profile_kind="estimated",
        provenance=made.provenance,
        plan=plan,
        mean_ns=None,
        predicted_ns=1234.5,
        bound_ns=1000.0,
    )


# Round trips


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_record_round_trips_exactly(data: st.DataObject) -> None:
    machine = data.draw(some.hosts())
    net = data.draw(some.networks())
    made = data.draw(some.profiles(net, machine))
    plan = data.draw(some.plans(net, machine))
    file = PlanFile(
        net.model,
        net.dtype,
        net.batch,
        net.seq,
        net.digest,
        machine.name,
        machine.digest,
        made.kind,
        made.provenance,
        plan,
        data.draw(st.none() | some.durations),
        data.draw(some.durations),
        data.draw(some.durations),
    )
    cases: tuple[tuple[FileKind[Any], object], ...] = ((HOST, machine), (PROFILE, made), (PLAN, file))
    for kind, record in cases:
        again = parse_record(format_record(kind, record).encode(), kind)
        assert again == record
        assert repr(again) == repr(record)  # an enum member is no longer equal to its text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_any_float_survive_both_parsers(text: str, number: float) -> None:
    plain = {"text": text, "list": [text, number], "number": number}
    written = document.dump(plain).encode()
    before = document._LOADER
    try:
        for loader in (before, yaml.SafeLoader):
            document._LOADER = loader
            assert document.load(written) == plain
    finally:
        document._LOADER = before


def test_a_number_of_numpy_is_written_as_a_number_or_not_at_all() -> None:
    """`repr` of one is np.float64(0.5): a calibration wrote that, and nobody could read its profile."""
    assert document.dump({"number": np.float64(0.5)}) == document.dump({"number": 0.5})
    with pytest.raises(TypeError, match="float32"):
        document.dump({"number": np.float32(0.5)})


def test_files_are_read_back_from_disk(tmp_path: Path) -> None:
    made = profile(NETWORK, MACHINE)
    write_host(tmp_path / "host.yaml", MACHINE)
    write_profile(tmp_path / "profile.yaml", made)
    write_plan(tmp_path / "plan.yaml", plan_file())
    assert read_host(tmp_path / "host.yaml") == MACHINE
    assert read_profile(tmp_path / "profile.yaml") == made
    assert read_plan(tmp_path / "plan.yaml") == plan_file()


def test_another_package_adds_a_file_of_its_own(tmp_path: Path) -> None:
    kind = FileKind("samples", 3, _Samples)
    record = _Samples("copy", (1.0, 2.5), (0, "x"), 2)
    write_record(tmp_path / "s.yaml", kind, record)
    assert (tmp_path / "s.yaml").read_text() == (
        "kind: samples\nschema: 3\ncase: copy\nruns: [1.0, 2.5]\npair: [0, x]\ncount: 2\n"
    )
    assert read_record(tmp_path / "s.yaml", kind) == record


@dataclass(frozen=True)
class _Samples:
    case: str
    runs: tuple[float, ...]
    pair: tuple[int, str]
    count: int


def test_a_layer_takes_a_line(tmp_path: Path) -> None:
    sizes: list[int | tuple[int, ...]] = [100_000, (2048, 2048, 2048, 2048, 8), 0]
    net = network(*(sizes * 53)[:158])
    path = tmp_path / "profile.yaml"
    write_profile(path, profile(net, MACHINE))
    text = path.read_text()
    assert text.count("{name: layer") == text.count("{resident: ") == 158
    assert len(text.splitlines()) < 2 * 158 + len(net.storages) + 32
    assert read_profile(path) == profile(net, MACHINE)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_file_cut_off_anywhere_is_never_taken_for_a_whole_one(data: st.DataObject) -> None:
    cases: tuple[tuple[FileKind[Any], object], ...] = (
        (HOST, MACHINE),
        (PROFILE, profile(NETWORK, MACHINE)),
        (PLAN, plan_file()),
    )
    kind, record = data.draw(st.sampled_from(cases))
    text = format_record(kind, record).encode()
    cut = text[: data.draw(st.integers(0, len(text) - 2))]
    with pytest.raises(InputError) as caught:
        parse_record(cut, kind)
    assert "\n" not in str(caught.value)


# Bad content


def edited(pattern: str, new: str, kind: FileKind[Any] = HOST) -> bytes:
    records: dict[str, Any] = {"host": MACHINE, "profile": profile(NETWORK, MACHINE), "plan": plan_file()}
    text, count = re.subn(pattern, new, format_record(kind, records[kind.kind]), count=1, flags=re.M)
    assert count == 1
    return text.encode()


@pytest.mark.parametrize(
    ("pattern", "new", "says"),
    [
        (r"^(  copy_latency_ns: {value: )[^,]*", r"\1-5.0", "costs.copy_latency_ns: figure -5.0 (a test)"),
        (
            r"^(  copy_latency_ns: {value: )[^,]*",
            r"\1.nan",
            "costs.copy_latency_ns.value is nan; it must be a finite",
        ),
        (
            r"^(  copy_latency_ns: {value: )[^,]*",
            r"\1-.inf",
            "costs.copy_latency_ns.value is -inf; it must be a fin",
        ),
        (r"^(  copy_latency_ns: {value: )[^,]*", r"\g<1>" + "9" * 400, "is a number too large"),
        (
            r"^(  copy_latency_ns: {value: )[^,]*",
            r"\g<1>1.0e+300",
            "costs.copy_latency_ns: figure 1e+300 (a test): must be from 0 to 1e+18",
        ),
        (
            r"^(  copy_latency_ns: {value: )([^,]*)(.*)}$",
            r"\g<1>30.0\3, low: 1.0, high: 2.0}",
            "costs.copy_latency_ns: figure 30.0 (a test): is not between its low 1.0 and its high 2.0; give a range",
        ),
        (
            r"^(  copy_latency_ns: {value: )([^,]*)(.*)}$",
            r"\g<1>30.0\3, low: 31.0}",
            "is not between its low 31.0 and its high None",
        ),
        (
            r"bytes_per_s: {value: [^,]*",
            "bytes_per_s: {value: 1.0e-300",
            "links[0]: link 'pcie0': 1e-300 bytes/s; a rate is 1 or more",
        ),
        (
            r"direct_bytes_per_s: {value: [^,]*",
            "direct_bytes_per_s: {value: 0.0",
            "direct_bytes_per_s is 0.0, and a read in place would never end; a rate is 1 or more",
        ),
        (r"memory_bytes: \d+", "memory_bytes: -4", "gpus[0]: GPU 0: memory_bytes -4; must be 0 or more"),
        (
            r"^(  copy_latency_ns: {value: )[^,]*",
            r'\1"3"',
            "costs.copy_latency_ns.value is '3'; it must be a number",
        ),
        (
            r"^(  copy_latency_ns: {value: )[^,]*",
            r"\1true",
            "costs.copy_latency_ns.value is true; it must be a num",
        ),
        (
            r"^(  copy_latency_ns: {value: )[^,]*",
            r"\1null",
            "costs.copy_latency_ns.value is null; it must be a num",
        ),
        (
            r"kind: assumed",
            "kind: guessed",
            "kind is 'guessed'; it must be one of measured, published, derived",
        ),
        (r"index: 1", "index: 1.0", "gpus[1].index is 1.0; it must be a whole number"),
        (r"index: 1", "index: true", "gpus[1].index is true; it must be a whole number"),
        (r"name: GPU", "name: 12", "gpus[0].name is 12; it must be text"),
        (r"h2d: \[pcie0\]", "h2d: pcie0", "gpus[0].h2d is 'pcie0'; it must be a list"),
        (r"h2d: \[pcie0\]", "h2d: [pcie9]", "GPU 0 names link 'pcie9', which is not among its links"),
        (r"^about:", "abuot:", "unknown key 'abuot'; did you mean 'about'?"),
        (r"^about: .*\n", "", "about: is missing"),
        (r"^schema: 1", "schema: 2", "schema is 2; this version reads schema 1 of host files"),
        (r"^schema: 1\n", "", "schema is null; this version reads schema 1"),
        (r"^kind: host", "kind: profile", "kind is 'profile'; a host file says `kind: host`"),
        (r"^name: ", "name: x\nname: ", "line 4: key 'name' is there twice"),
        (r"^name: ", "name: &a ", "line 3: anchors and tags are not used here"),
        (r"^name: ", "name: !!python/name:os.system ", "line 3: anchors and tags are not used here"),
        (r"^name: .*", "name: *a", "line 3: alias *a"),
        (r"^costs:\n", "costs: 3\nmore:\n", "unknown key 'more'"),
        (r"\Z", "---\nkind: host\n", "a second document starts; keep one per file"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(pattern: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "host.yaml"
    path.write_bytes(edited(pattern, new))
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read_host(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_rows_of_numbers_are_as_strict() -> None:
    first = r"\{resident: \[1000, 0.0, 0\]"
    for new, says in (
        (
            "{resident: [1000.0, 0.0]",
            "layers[0].resident must be a list of 3: [median_ns, spread_ns, samples]",
        ),
        ("{resident: [-1.0, 0.0, 0]", "layers[0].resident: timing -1.0 ns: must be from 0 to 1e+18"),
        ("{resident: [1000.0, .nan, 0]", "layers[0].resident[1] is nan; it must be a finite number"),
        ("{resident: [1000.0, 0.0, 0.5]", "layers[0].resident[2] is 0.5; it must be a whole number"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            parse_record(edited(first, new, PROFILE), PROFILE)


def test_whole_numbers_are_numbers() -> None:
    again = parse_record(edited(r"^(  copy_latency_ns: {value: )[^,]*", r"\g<1>7"), HOST)
    assert again.costs.copy_latency_ns.value == 7.0
    assert type(again.costs.copy_latency_ns.value) is float


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**6,
        b"kind: host\nschema: 1\nname: " + b"[" * 10**6 + b"\n",
        b"{a: " * 250_000,
        b"- " * 500_000,
        b"? " * 500_000,
        b"".join(b" " * i + b"a:\n" for i in range(1400)),
        b'"' + b"a" * 10**6,
        bytes(range(256)) * 4000,
        b"\x00" * 1000,
        b"\xff\xfe" + "kind: host\n".encode("utf-16-le"),
        b"",
        b"\n",
        b"just words\n",
        b"- a list\n",
        b"{[1, 2]: 3}\n",
        b"kind: host\nschema: " + b"9" * 10_000 + b"\n",
    ],
    ids=lambda content: repr(content[:12]),
)
@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_hostile_files_are_one_quick_line(
    content: bytes, loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "_LOADER", getattr(yaml, loader, yaml.SafeLoader))
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_host(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_paths_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, says in (
        (tmp_path, "is not a regular file"),
        (tmp_path / "fifo", "is not a regular file"),
        (tmp_path / "none.yaml", "there is no such file"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
        (Path("/dev/zero"), "is not a regular file"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            read_host(path)
    monkeypatch.setattr("sim.files.MAX_BYTES", 1000)
    (tmp_path / "big.yaml").write_bytes(b"#" * 1001)
    with pytest.raises(InputError, match="is larger than"):
        read_host(tmp_path / "big.yaml")


# Writing


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "host.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"host\.yaml: exists; choose another path or pass --force"):
        write_host(path, MACHINE)
    assert path.read_text() == "mine"
    write_host(path, MACHINE, force=True)
    assert read_host(path) == MACHINE
    assert [p.name for p in tmp_path.iterdir()] == ["host.yaml"]


def test_force_keeps_a_link_and_writes_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("old")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    write_host(tmp_path / "link.yaml", MACHINE, force=True)
    assert (tmp_path / "link.yaml").is_symlink()
    assert read_host(tmp_path / "real.yaml") == MACHINE


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, says, force in (
        (tmp_path, "is a directory; name a file in it", True),
        (tmp_path / "none" / "h.yaml", "there is no folder", False),
        (tmp_path / "file" / "h.yaml", "there is no folder", False),
        (Path("/dev/null"), "is not a regular file", True),
        (Path("/proc/host.yaml"), "cannot be written", False),
        (tmp_path / ("x" * 300), "cannot be written (File name too long)", False),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            output.check_output(path, force=force)
        with pytest.raises(InputError, match=re.escape(says)):
            write_host(path, MACHINE, force=force)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_full_disk_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "host.yaml"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        write_host(path, MACHINE, force=True)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        write_host(tmp_path / "new.yaml", MACHINE)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["host.yaml"]


def test_a_file_made_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "host.yaml"
    monkeypatch.setattr(os, "fsync", lambda _: path.write_text("theirs"))
    with pytest.raises(InputError, match="exists"):
        write_host(path, MACHINE)
    assert path.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["host.yaml"]


def test_text_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a file cannot hold this text"):
        write_host(tmp_path / "h.yaml", replace(MACHINE, about="\ud800"))
    assert list(tmp_path.iterdir()) == []
