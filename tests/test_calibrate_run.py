"""Stories of `calibrate run` on a device of threads: whole, broken half way, gone on with, and read back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from calibrate import launches, layers, show
from calibrate import run as calibrate_run
from calibrate.bench import FULL, NO_FIGURES, Bench, Case, Mismatch, has_peers
from calibrate.beside import h2d_together, p2p
from calibrate.cli import main
from calibrate.compare import compare
from calibrate.identity import read_identity, visible
from calibrate.launches import START_ROUNDS, launch, start
from calibrate.links import h2d
from calibrate.run import CASES, NO_FIGURE, Ask, Watch, choose_gpus, finish, run
from calibrate.samples import CaseResult, Point
from calibrate.store import Store
from calibrate.topology import Topology, Wire
from hwexec import host_memory
from hwexec.cpu import CpuDevice
from hwexec.executor import ColdStart
from hwexec.starts import tensors
from hwexec.timing import Samples
from sim.catalog import Request
from sim.errors import InputError
from sim.files import read_host, read_profile, write_record
from tests.test_calibrate_identity import FakeNvml, pair

PAIR = Topology(2, (Wire(0, 1, 18, "SYS"),), (None, None))


def tiny() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A network of four layers for `--model`."""
    layers = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.LayerNorm(32)
    )
    return layers, (torch.ones(1, 64),)


MODEL = "tests.test_calibrate_run:tiny"


class Told:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.notes: list[str] = []
        self.planned = 0.0

    def plan(self, seconds: float) -> None:
        self.planned = seconds

    def begins(self, what: str) -> None:
        self.begun.append(what)

    def ended(self, what: str, seconds: float, said: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    made = CpuDevice(2, delay_us=0.0)
    yield made
    made.close()


def ask(*models: str, fresh: bool = False, name: str = "fake") -> Ask:
    return Ask(name, tuple(Request(m) for m in models), fresh=fresh)


def broken(name: str, error: BaseException) -> Case:
    def measure(_: Bench) -> tuple[Point, ...]:
        raise error

    return Case(name, "breaks", measure)


def good(name: str, counts: list[str]) -> Case:
    def measure(_: Bench) -> tuple[Point, ...]:
        counts.append(name)
        return (Point(name, 0, 1, (1.0, 2.0)),)

    return Case(name, "works", measure)


def test_a_gpu_is_lost_half_way_and_the_same_command_goes_on_to_the_end(
    device: CpuDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")
    cases = [broken(c.name, lost) if c.name == "launch" else c for c in CASES]
    with pytest.raises(InputError, match=r"launch: the GPU failed \(RuntimeError: CUDA error: .*go on$"):
        run(ask(MODEL), device, Watch(None), Store(tmp_path), Told(), cases=cases)

    told = Told()
    outcome = run(ask(MODEL), device, Watch(None), Store(tmp_path), told)
    assert told.begun[:3] == ["launch", "start", "first-replay"]
    assert outcome.flags == (NO_FIGURE,)

    host = read_host(outcome.host)
    assert [(p.source, p.destination) for p in host.peers] == [(0, 1), (1, 0)]
    assert {host.costs.wait_ns.kind, host.links[0].bytes_per_s.kind} == {"assumed"}
    (profile_path,) = outcome.profiles
    profile = read_profile(profile_path)
    assert profile.host_digest == host.digest
    assert (profile.kind, len(profile.layers), len(profile.layers[0].peer)) == ("played", 4, 2)
    assert profile.start is None, "threads have no start of their own"
    assert profile_path == tmp_path / "profiles" / "fake" / "tests.test_calibrate_run-tiny.fp32.b1.yaml"

    again = Told()
    assert run(ask(MODEL), device, Watch(None), Store(tmp_path), again).host == outcome.host
    assert (again.begun, again.planned) == ([], 0)
    assert read_profile(finish(Store(tmp_path), keep_bad=True).profiles[0]) == profile

    assert device.pinned == {}
    read_and_drawn(tmp_path, outcome.samples, capsys)


def read_and_drawn(folder: Path, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file that was written can be shown, compared with itself and, where it has samples, drawn."""
    files = [
        samples,
        *folder.glob("hosts/*"),
        *folder.glob("profiles/fake/*"),
        *folder.glob("samples/fake/*"),
    ]
    assert len(files) == 4
    for path in files:
        console = Console(width=160, record=True, quiet=True)
        show.show(show.read(str(path)), console)
    changes = compare(show.read(str(samples)), show.read(str(samples))).changes
    assert changes
    assert not any(c.beyond for c in changes)
    picture = folder / "bandwidth.png"
    assert main(["show", str(samples), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    odd = samples.with_suffix(".png")
    os.link(samples, odd)
    for more, said in (
        ((str(picture),), f"{picture}: exists; choose another path or pass --force"),
        ((str(odd), "--force"), "is read by this command"),
    ):
        assert main(["show", str(samples), "--plot", *more]) == 2
        printed = capsys.readouterr()
        assert (printed.out, said in printed.err) == ("", True), "refused before anything is printed"
    odd.unlink()
    assert main(["show", str(samples), "--plot", str(picture), "--force"]) == 0
    for state in ("session", "case-h2d"):
        assert main(["show", str(folder / "state" / f"{state}.yaml")]) == 2
        said = capsys.readouterr().err
        assert "which `calibrate run` keeps to go on from; look at samples/NAME.yaml" in said
    (folder / "plan.yaml").write_text("kind: plan\n")
    assert main(["show", str(folder / "plan.yaml")]) == 2
    assert "kind is 'plan'; `calibrate show` takes calibration, host, profile" in capsys.readouterr().err
    (folder / "notes").write_text("hello\n")
    assert main(["diff", str(folder / "notes"), str(samples)]) == 2
    assert "no kind at its top" in capsys.readouterr().err
    with pytest.raises(InputError, match="samples files only"):
        show.plottable(show.read(str(files[1])), str(picture))
    for file, path, said in (
        (files[1], picture, "samples files only"),
        (samples, "out.bmp", "ends in '.bmp'"),
    ):
        capsys.readouterr()
        assert main(["show", str(file), "--plot", str(path)]) == 2
        printed = capsys.readouterr()
        assert (printed.out, said in printed.err) == ("", True), "refused before anything is printed"


def test_interrupted_it_goes_on_where_it_was(device: CpuDevice, tmp_path: Path) -> None:
    counts: list[str] = []
    cases = [good("h2d", counts), broken("d2h", KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        run(ask(), device, Watch(None), Store(tmp_path), Told(), cases=cases)
    with pytest.raises(InputError, match="points cannot give"):
        run(
            ask(),
            device,
            Watch(None),
            Store(tmp_path),
            Told(),
            cases=[good("h2d", counts), good("d2h", counts)],
        )
    assert counts == ["h2d", "d2h"]
    with pytest.raises(KeyboardInterrupt):
        run(ask(fresh=True), device, Watch(None), Store(tmp_path), Told(), cases=cases)
    assert counts == ["h2d", "d2h", "h2d"]


def test_a_full_disk_is_one_line_and_keeps_what_there_was(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[str] = []
    store = Store(tmp_path)

    def fill(_: Bench) -> tuple[Point, ...]:
        def refuse(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", refuse)
        return (Point("d2h", 0, 1, (1.0,)),)

    cases = [good("h2d", counts), Case("d2h", "fills the disk", fill)]
    with pytest.raises(
        InputError, match=r"case-d2h.yaml: .*No space left on device.*; what was measured before is kept in"
    ):
        run(ask(), device, Watch(None), store, Told(), cases=cases)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["case-h2d.yaml", "session.yaml"]


def test_the_state_of_another_host_is_not_mixed_in(device: CpuDevice, tmp_path: Path) -> None:
    def go(given: Ask, on: CpuDevice) -> None:
        run(given, on, Watch(None), Store(tmp_path), Told(), cases=[broken("h2d", KeyboardInterrupt())])

    with pytest.raises(KeyboardInterrupt):
        go(ask(), device)
    for fresh in (False, True):
        with pytest.raises(InputError, match=r"measured of fake, and now it is other; choose another --out"):
            go(ask(name="other", fresh=fresh), device)
    with pytest.raises(InputError, match="measured with GPUs"):
        go(ask(), CpuDevice(3, delay_us=0.0))
    session = tmp_path / "state" / "session.yaml"
    kept = session.read_text()
    for wrong, says in (("../fake", "it becomes a file's name"), ("", "it becomes a file's name")):
        session.write_text(kept.replace("name: fake", f'name: "{wrong}"'))
        with pytest.raises(InputError, match=rf"session.yaml: name '{wrong}': {says}"):
            finish(Store(tmp_path), keep_bad=True)
        with pytest.raises(InputError, match=r"whose state it is cannot be told: remove .* by hand"):
            go(ask(fresh=True), device)
    session.write_text(kept)
    with pytest.raises(KeyboardInterrupt):
        go(ask(fresh=True), CpuDevice(3, delay_us=0.0))


def test_a_name_that_is_wrong_costs_nothing_that_was_measured(device: CpuDevice, tmp_path: Path) -> None:
    """Not even with --fresh; and where there was nothing, nothing is made."""
    with pytest.raises(InputError, match="'resnet5': not known"):
        run(ask("resnet5"), device, Watch(None), Store(tmp_path / "new"), Told(), cases=[])
    assert not (tmp_path / "new").exists()
    run(ask(), device, Watch(None), Store(tmp_path), Told())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.yaml")}
    with pytest.raises(InputError, match="'resnet5': not known"):
        run(ask("resnet5", fresh=True), device, Watch(None), Store(tmp_path), Told())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.yaml")} == before


def test_a_case_that_this_host_cannot_show_is_waived_with_its_reason(tmp_path: Path) -> None:
    strangers = CpuDevice(2, delay_us=0.0, strangers=frozenset({(0, 1), (1, 0)}))
    assert (
        has_peers(Bench(strangers, PAIR, NO_FIGURES)) == "no GPU can read another's memory (no peer access)"
    )
    strangers.close()
    small = CpuDevice(1, delay_us=0.0, memory_bytes=2**20)
    store = Store(tmp_path)
    with pytest.raises(InputError):
        run(
            ask(),
            small,
            Watch(None),
            store,
            Told(),
            cases=[c for c in CASES if c.name in ("h2d", "h2d-together")],
        )
    small.close()
    together, alone = store.case("h2d-together"), store.case("h2d")
    assert together is not None
    assert alone is not None
    assert together.waived == "one GPU: there is nothing beside it"
    assert "not enough GPU memory" in str(alone.waived)


def test_a_host_of_one_gpu_is_measured_without_peers(tmp_path: Path) -> None:
    single = CpuDevice(1, delay_us=0.0)
    outcome = run(ask(MODEL), single, Watch(None), Store(tmp_path), Told())
    single.close()
    host = read_host(outcome.host)
    assert (len(host.gpus), host.peers) == (1, ())
    assert host.costs.wait_land_ns.source.startswith("no peers here")
    assert {host.costs.start_graph_ns.kind, host.costs.launch_first_ns.kind} == {"assumed"}
    assert host.costs.peer_latency_ns.source.startswith("no peers here")
    assert read_profile(outcome.profiles[0]).layers[0].peer == ()


class Liar(CpuDevice):
    """Loses the last byte of every copy."""

    def copy(self, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        super().copy(stream, destination[:-1], source[:-1])


@pytest.mark.parametrize(
    "case",
    [
        lambda b: h2d(b, False),
        lambda b: p2p(b, False),
        lambda b: p2p(b, True),
        h2d_together,
        launch,
    ],
)
def test_bytes_that_do_not_arrive_are_noticed(case: Any, tmp_path: Path) -> None:
    liar = Liar(2, delay_us=0.0)
    with pytest.raises(InputError, match="the bytes that arrived differ from those sent"):
        run(
            ask(),
            liar,
            Watch(None),
            Store(tmp_path),
            Told(),
            cases=[Case("h2d", "", case)],
        )
    liar.close()
    assert Store(tmp_path).case("h2d") is None


def test_starts_are_the_executors_own_with_their_copy_ahead_of_the_graph_and_in_it(device: CpuDevice) -> None:
    ahead, inside = start(Bench(device, PAIR, NO_FIGURES))
    assert [p.label for p in (ahead, inside)] == ["copy ahead", "copy in the graph"]
    assert ahead.size_bytes == inside.size_bytes > 0
    assert [len(p.samples_ns) for p in (ahead, inside)] == [START_ROUNDS * NO_FIGURES.repeats] * 2
    assert min(*ahead.samples_ns, *inside.samples_ns) >= 1
    assert device.pinned == {}


def test_each_start_finds_the_arenas_filled_and_its_answer_is_compared(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `hwexec verify` makes them: a start right behind another finds the host's caches warm, and no request does."""
    filled = []
    fill = ColdStart.evict
    monkeypatch.setattr(ColdStart, "evict", lambda cold: (filled.append(cold.plan.head), fill(cold)))
    start(Bench(device, PAIR, NO_FIGURES))
    each = NO_FIGURES.repeats + 2  # one when it is prepared, one that warms up
    assert filled == [*[1] * each, *[0] * each] * START_ROUNDS
    monkeypatch.setattr(launches, "kept", lambda output: [torch.zeros_like(t) for t in tensors(output)])
    with pytest.raises(Mismatch, match="the answer of a cold start is not that of a resident run"):
        start(Bench(device, PAIR, NO_FIGURES))
    assert device.pinned == {}


def test_launches_vary_kernels_copies_waits_and_edges_apart_from_each_other(device: CpuDevice) -> None:
    bench = Bench(device, PAIR, NO_FIGURES)
    rows = [(1, p.count, p.copies, p.waits, p.edges) for p in launch(bench)]
    assert np.linalg.matrix_rank(np.array(rows)) == 5
    single = Bench(device, Topology(1, (), (None,)), NO_FIGURES)
    rows = [(1, p.count, p.copies, p.waits) for p in launch(single)]
    assert np.linalg.matrix_rank(np.array(rows)) == 4


def test_what_copies_add_to_a_launch_is_the_hosts_own_call_with_copies_as_large_as_plans_have(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, moved = Bench(device, PAIR, NO_FIGURES), list[int]()
    monkeypatch.setattr(launches, "call_ns", lambda *_, **__: Samples((7.0,)))
    monkeypatch.setattr(Bench, "verify", lambda _, found, *__: moved.append(found.numel()))
    points = launch(bench)
    size = NO_FIGURES.largest_bytes // 64
    assert moved == [size * (p.copies - p.edges) for p in points]
    assert FULL.largest_bytes // 64 > launches.LAUNCH_COPY_BYTES == 256 * 1024
    assert {p.samples_ns == (7.0,) for p in points if p.copies or p.waits} == {True}
    assert {(p.label, p.samples_ns == (7.0,)) for p in points if not (p.copies or p.waits)} == {
        ("graph", False)
    }


def test_a_network_that_fails_costs_the_others_nothing(device: CpuDevice, tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(ask(), device, Watch(None), store, Told())
    device._fault, device._countdown = "pin", 1
    with pytest.raises(InputError, match=r"all but 1 of the networks .*refuses to pin"):
        run(ask(MODEL), device, Watch(None), store, Told())
    assert len(run(ask(MODEL), device, Watch(None), store, Told()).profiles) == 1


@pytest.mark.parametrize(
    "refused", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_network_that_the_host_has_no_memory_for_costs_the_others_nothing(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Exception
) -> None:
    """It was called a GPU that failed, ended in a traceback, or filled memory until the process was killed."""

    def refuse(*_: object, **__: object) -> Any:
        raise refused

    store = Store(tmp_path)
    run(ask(), device, Watch(None), store, Told())
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_run, "build", refuse)
        with pytest.raises(InputError, match=r"all but 1 of the networks .*out of host memory \("):
            run(ask(MODEL), device, Watch(None), store, Told())
        patch.setattr(host_memory, "free_bytes", lambda: 1000)
        with pytest.raises(
            InputError, match=r"bytes are needed for 3 times the weights of .*, and 1000 are free"
        ):
            run(ask(MODEL), device, Watch(None), store, Told())
    assert len(run(ask(MODEL), device, Watch(None), store, Told()).profiles) == 1


def test_no_host_time_is_taken_after_the_profiler_has_run(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a process it makes every later launch slower, those of other networks too."""
    story: list[str] = []
    trace, clocked = device.trace, layers._issue
    monkeypatch.setattr(device, "trace", lambda call: (story.append("profiler"), trace(call))[1])
    monkeypatch.setattr(layers, "_issue", lambda *given: (story.append("issue"), clocked(*given))[1])
    small = "hf:llama-1b:hidden=32,layers=1,heads=2,kv_heads=1,ffn=64,vocab=50"
    run(ask(MODEL, small), device, Watch(None), Store(tmp_path), Told())
    assert story[:2] == ["issue", "issue"]
    assert set(story[2:]) == {"profiler"}


def test_identity_and_flags_reach_the_files(device: CpuDevice, tmp_path: Path) -> None:
    nvml = pair()
    nvml.busy[0] = 50
    told = Told()
    device.figures = True  # as if its times meant something: then flags and refusals are told
    outcome = run(
        replace(ask(), quick=True, keep_bad=True), device, Watch(nvml), Store(tmp_path), told, cases=_small()
    )
    assert told.notes[0] == "GPU 0 was 50 % busy before measuring: stop its other users"
    assert outcome.flags[0] == told.notes[0]
    host = read_host(outcome.host)
    assert host.about.endswith("PCIe 5.0 x16, NVLink NV18 between GPUs 0 and 1, driver 580.95.05")
    record = show.read(str(outcome.samples))
    assert isinstance(record, show.Calibration)
    assert record.identity == read_identity(nvml)
    assert (len(record.before), len(record.after)) == (2, 2)


def test_a_profile_has_its_networks_own_start(device: CpuDevice, tmp_path: Path) -> None:
    device.figures = True
    given = replace(ask(MODEL), quick=True, keep_bad=True)
    outcome = run(given, device, Watch(pair()), Store(tmp_path), Told(), cases=_small())
    profile, costs = read_profile(outcome.profiles[0]), read_host(outcome.host).costs
    assert profile.start is not None
    assert {profile.start.kind, costs.launch_first_ns.kind} == {"measured"}
    assert profile.start.value > costs.start_ns.value
    assert read_profile(finish(Store(tmp_path), keep_bad=True).profiles[0]) == profile


def _small() -> list[Case]:
    """Every case, cut down to what the device of threads can do quickly, whatever it is told of its figures."""

    def cut(case: Case) -> Case:
        def measure(bench: Bench) -> tuple[Point, ...]:
            bench.effort = NO_FIGURES
            return case.measure(bench)

        return replace(case, measure=measure)

    return [cut(case) for case in CASES]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (True, "what was measured is kept in cal; run the same command to go on"),
        (False, "nothing was measured yet"),
    ],
)
def test_an_interruption_says_whether_anything_is_kept(
    kept: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_ask: Ask, device: CpuDevice, _watch: Watch, store: Store, *_: object) -> None:
        if kept:
            store.keep_case(CaseResult("h2d", "works"))
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_run, "run", interrupted)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--device", "cpu", "--name", "x", "--out", "cal"]) == 130
    assert said in capsys.readouterr().err.splitlines()


def test_gpus_are_chosen_and_numbered_as_cuda_shows_them() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "3,1"}
    choose_gpus((1,), environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with pytest.raises(InputError, match=r"--gpus 2: CUDA_VISIBLE_DEVICES=1 shows 1"):
        choose_gpus((2,), environ)
    identity = read_identity(pair())
    turned = visible(identity, "GPU-2222,0")
    assert [(g.index, g.uuid[:8]) for g in turned.gpus] == [(0, "GPU-2222"), (1, "GPU-1111")]
    assert (turned.pairs[0].first, turned.pairs[0].nvlinks) == (0, 18)
    assert visible(identity, "1").pairs == ()


def test_commands_that_cannot_start_say_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "x")
    for words, line in (
        (["run", "--name", "x", "--out", folder, "--gpus", "0,zero"], "is no list of GPU numbers"),
        (["run", "--name", "a/b", "--out", folder], "it becomes a file's name"),
        (
            ["run", "--device", "cpu", "--name", "x", "--out", folder, "--gpus", "0,9"],
            "numbered from 0 without gaps; for 2 of them write --gpus 0,1",
        ),
        (
            ["run", "--device", "cpu", "--name", "x", "--out", folder, "--gpus", "7"],
            "numbered from 0 without gaps; for 1 of them write --gpus 0",
        ),
        (["estimate", "--model", "resnt", "--out", folder], "model 'resnt': not known"),
        (["fit", folder], "nothing was measured here"),
        (["show", str(tmp_path / "none")], "cannot be read"),
        (["show", __file__], "no kind at its top"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
        assert not Path(folder).exists()
    if not torch.cuda.is_available():
        assert main(["run", "--name", "x", "--out", folder]) == 2
        assert "NVIDIA driver" in capsys.readouterr().err


def test_no_permission_and_a_lost_gpu_stop_before_anything_is_written(
    tmp_path: Path, device: CpuDevice
) -> None:
    with pytest.raises(InputError, match="no permission to ask the NVIDIA driver"):
        Watch(pair(nvmlDeviceGetHandleByIndex=4))
    nvml: FakeNvml = pair()
    watch = Watch(nvml)
    nvml.fails["nvmlDeviceGetMemoryInfo"] = 15
    with pytest.raises(InputError, match="fallen off the bus"):
        run(ask(), device, watch, Store(tmp_path, write_record), Told())
    assert list(tmp_path.iterdir()) == []


CALM, WILD, WORSE = (100.0, 101.0, 102.0), (100.0, 150.0, 200.0), (100.0, 300.0, 500.0)


@pytest.mark.parametrize(
    ("takes", "figures", "kept", "count"),
    [
        ((CALM, WILD), True, CALM, 1),
        ((WILD, CALM, WORSE), True, CALM, 2),
        ((WORSE, WILD, WORSE, CALM), True, WILD, 3),
        ((WORSE, CALM), False, WORSE, 1),
    ],
)
def test_a_case_that_scatters_is_measured_again_and_the_steadiest_take_kept(
    device: CpuDevice,
    tmp_path: Path,
    takes: tuple[tuple[float, ...], ...],
    figures: bool,
    kept: tuple[float, ...],
    count: int,
) -> None:
    device.figures = figures
    left = [*takes]
    case = Case("h2d", "", lambda bench: (Point("a", 1, 1, CALM), Point("b", 1, 1, left.pop(0))))
    with pytest.raises(InputError):  # one case is no host
        run(ask(), device, Watch(None), Store(tmp_path), Told(), cases=[case])
    found = Store(tmp_path).case("h2d")
    assert found is not None
    assert (found.points[1].samples_ns, found.takes, len(left)) == (kept, count, len(takes) - count)
