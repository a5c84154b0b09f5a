"""Stories of `calibrate run` on a device of threads: whole, broken half way, gone on with, and read back."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from calibrate import show
from calibrate.bench import Bench, Case
from calibrate.cases import CASES
from calibrate.cli import main
from calibrate.compare import compare
from calibrate.run import NO_FIGURE, Ask, Watch, finish, run
from calibrate.samples import CaseResult, Point
from calibrate.store import Store
from hwexec.cpu import CpuDevice
from sim.errors import InputError
from sim.files import read_host, read_profile
from tests.calibrating import MODEL, Told, ask, broken, good


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    made = CpuDevice(2, delay_us=0.0)
    yield made
    made.close()


def test_a_gpu_is_lost_half_way_and_the_same_command_goes_on_to_the_end(
    device: CpuDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")
    cases = [broken(c.name, lost) if c.name == "launch" else c for c in CASES]
    with pytest.raises(InputError, match=r"launch: the GPU failed \(RuntimeError: CUDA error: .*go on$"):
        run(ask(MODEL), device, Watch(None), Store(tmp_path), Told(), cases=cases)

    told = Told()
    outcome = run(ask(MODEL), device, Watch(None), Store(tmp_path), told)
    assert told.begun[:4] == ["launch", "start", "head", "first-replay"]
    assert outcome.flags == (NO_FIGURE,)

    host = read_host(outcome.host)
    assert [(p.source, p.destination) for p in host.peers] == [(0, 1), (1, 0)]
    assert {host.costs.wait_ns.kind, host.links[0].bytes_per_s.kind} == {"assumed"}
    (profile_path,) = outcome.profiles
    profile = read_profile(profile_path)
    assert profile.host_digest == host.digest
    assert (profile.kind, len(profile.layers), len(profile.layers[0].peer)) == ("played", 4, 2)
    assert profile.start is None, "threads have no start of their own"
    assert profile_path == tmp_path / "profiles" / "fake" / "tests.calibrating-tiny.fp32.b1.yaml"

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


def test_a_state_that_was_cut_off_says_how_to_go_on(tmp_path: Path) -> None:
    store, kept = Store(tmp_path), tmp_path / "state" / "case-h2d.yaml"
    result = CaseResult("h2d", "copies", (Point("h2d:0", 0, 1, (1.0,)),))
    store.keep_case(result)
    assert store.case("h2d") == result
    kept.write_text(kept.read_text()[:60])
    with pytest.raises(InputError, match=r"case-h2d.yaml: .*; or remove it, and that is measured again"):
        store.case("h2d")
    kept.unlink()
    assert store.case("h2d") is None


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


def test_what_is_measured_afresh_leaves_nothing_made_of_what_was_measured_before(
    device: CpuDevice, tmp_path: Path
) -> None:
    """A profile of the host as it was stayed beside the host as it is, which then refused it."""
    cases = [good("h2d", []), broken("d2h", KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        run(ask(), device, Watch(None), Store(tmp_path), Told(), cases=cases)
    for path in ("samples/fake", "profiles/fake", "samples/other", "profiles/other"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "resnet50.fp32.b1.yaml").write_text("what was")
    with pytest.raises(KeyboardInterrupt):
        run(ask(fresh=True), device, Watch(None), Store(tmp_path), Told(), cases=cases[1:])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.yaml")) == [
        "profiles/other/resnet50.fp32.b1.yaml",
        "samples/other/resnet50.fp32.b1.yaml",
        "state/session.yaml",
    ]


def test_networks_of_nobody_knows_which_session_are_measured_again(device: CpuDevice, tmp_path: Path) -> None:
    """They were taken up, and their profiles told as this session's."""
    run(ask(MODEL), device, Watch(None), Store(tmp_path), Told())
    assert len(list((tmp_path / "samples" / "fake").iterdir())) == 1
    (tmp_path / "state" / "session.yaml").unlink()
    assert run(ask(), device, Watch(None), Store(tmp_path), Told()).profiles == ()
    assert not (tmp_path / "samples" / "fake").exists()


def test_what_cannot_be_removed_is_not_mixed_in(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ask(MODEL), device, Watch(None), Store(tmp_path), Told())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(InputError, match=r"cannot be removed \(.*Permission denied\); remove it by hand"):
        run(ask(fresh=True), device, Watch(None), Store(tmp_path), Told())


def test_cases_of_nobody_knows_which_session_are_measured_again(device: CpuDevice, tmp_path: Path) -> None:
    """What is left of a state that was being removed may be another host's."""
    counts: list[str] = []
    cases, state = [good("h2d", counts), broken("d2h", KeyboardInterrupt())], tmp_path / "state"
    for turn in (1, 2):
        told = Told()
        with pytest.raises(KeyboardInterrupt):
            run(ask(), device, Watch(None), Store(tmp_path), told, cases=cases)
        assert (told.notes, counts) == ([], ["h2d"] * turn)
        assert {path.name for path in state.iterdir()} == {"session.yaml", "case-h2d.yaml"}
        (state / "session.yaml").unlink()
        (state / "case-issue.yaml").write_bytes((state / "case-h2d.yaml").read_bytes())


def test_what_another_pytorch_measured_is_not_mixed_in(device: CpuDevice, tmp_path: Path) -> None:
    cases = [good("h2d", []), broken("d2h", KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        run(ask(), device, Watch(None), Store(tmp_path), Told(), cases=cases)
    session = tmp_path / "state" / "session.yaml"
    text = session.read_text()
    assert text.count(torch.__version__) == 1
    session.write_text(text.replace(torch.__version__, "1.0.1"))
    with pytest.raises(
        InputError, match=r"measured with PyTorch 1\.0\.1, and now it is .*; pass --fresh"
    ) as caught:
        run(ask(), device, Watch(None), Store(tmp_path), Told(), cases=cases[:1])
    assert "\n" not in str(caught.value)
    assert Store(tmp_path).case("h2d") is not None


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


@pytest.mark.parametrize("option", ["--dtype bf16", "--batch 3", "--seq 5"])
def test_an_option_of_every_model_needs_one(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["run", "--name", "x", "--device", "cpu", "--out", str(out), *option.split()]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"calibrate: {option}: it is of every --model, and none is named; name one, or leave it out\n"
    )
    assert not out.exists()


def test_what_is_kept_of_an_earlier_run_is_told_with_its_effort(device: CpuDevice, tmp_path: Path) -> None:
    """Threads have one effort, whatever --quick says; on GPUs neither effort is mixed into the other."""
    counts: list[str] = []

    def go(*, quick: bool, fresh: bool = False) -> list[str]:
        told, cases = Told(), [good("h2d", counts), broken("d2h", KeyboardInterrupt())]
        with pytest.raises(KeyboardInterrupt):
            run(
                replace(ask(fresh=fresh), quick=quick),
                device,
                Watch(None),
                Store(tmp_path),
                told,
                cases=cases,
            )
        return told.notes

    assert go(quick=True) == []
    assert go(quick=False) == [
        f"{tmp_path}: going on from 1 case that was measured before, with the one effort that threads have; "
        "pass --fresh to measure all again"
    ]
    assert counts == ["h2d"]
    assert go(quick=False, fresh=True) == []
    device.figures = True
    assert go(quick=True, fresh=True) == []
    (line,) = go(quick=True)
    assert "1 case that was measured before, with effort quick; pass" in line
    for quick, had, remedy in (
        (False, "quick", "pass --quick to go on from it"),
        (True, "full", "leave out --quick"),
    ):
        with pytest.raises(
            InputError, match=rf"measured with effort {had}, and now it is .*; {remedy}.*, --fresh to"
        ):
            go(quick=quick)
        if not quick:
            go(quick=False, fresh=True)
