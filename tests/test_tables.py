"""Tables where there is little room: words are folded, figures never cut."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from calibrate import show as calibrated
from hwexec.sweep_report import table_of
from sim.catalog import Request, find_host, find_profile, host_names
from sim.listing import host_table, hosts_table, layers_table
from sim.tables import as_text, plain, put, say, show
from tests.builders import network


def printed(width: int, *tables: Table) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False)
    for table in tables:
        put(console, table)
    assert console.width == width
    return out.getvalue()


def tables() -> list[Table]:
    p3 = find_host("p3.8xlarge")
    made = find_profile(p3, Request("resnet50"))
    assert made is not None
    hosts = tuple(find_host(name) for name in host_names())
    return [hosts_table(hosts), host_table(p3), layers_table(made.network)]


@pytest.mark.parametrize("width", [20, 60, 80])
def test_no_figure_is_cut(width: int) -> None:
    wide, narrow = printed(400, *tables()), printed(width, *tables())
    assert "…" not in narrow
    figures = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
    assert set(re.findall(figures, wide)) <= set(re.findall(figures, narrow))


def test_calibrates_tables_too() -> None:
    out = io.StringIO()
    calibrated.show(find_host("h200-pair"), Console(file=out, width=60))
    text = out.getvalue()
    assert "…" not in text
    assert "55.18" in text


def test_names_are_printed_as_they_are() -> None:
    """`hf:llama:layers=4` was a llama in a title, and a child called `[/x]` a traceback."""
    table = Table(title="hf:llama:layers=4")
    table.add_column("[red]")
    table.add_row("see [/x] and so on and on and on")
    text = as_text(table, ":smile:")
    assert all(word in text for word in ("hf:llama:layers=4", "[red]", "see [/x]", ":smile:"))
    console = plain(file=io.StringIO(), width=100)
    assert [console.render_str(word).plain for word in ("[/x]", ":llama:")] == ["[/x]", ":llama:"]


def test_a_table_keeps_to_the_screen_where_it_can() -> None:
    table = Table()
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("some words that go on and on and on", "1.25 ms")
    assert max(map(len, printed(30, table).splitlines())) == 30
    assert "1.25 ms" in printed(30, table)
    assert max(map(len, printed(10, table).splitlines())) == 5 + 5 + 7, "the longest words"
    assert len(printed(100, table).splitlines()) == 5, "and fits again where there is room"


def test_what_is_never_to_be_wrapped_takes_its_width() -> None:
    table = table_of("By launch", ("launch", "median error"), ("launch",))
    table.add_row("graph", "12.34 %")
    assert printed(10, table) == as_text(table)


def lines(capsys: pytest.CaptureFixture[str], *parts: Table | str) -> list[str]:
    show(*parts)
    return capsys.readouterr().out.splitlines()


WORDS = "Best plan: copies 95.6 MiB in 20 chunks over GPU 0's lane, reads 2.1 MiB in place (direct-host-access), as one graph."


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("60", 60), ("", 80), ("wide", 80), ("0", 24)])
def test_prose_breaks_between_words_as_wide_as_the_reader_says(
    columns: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    found = lines(capsys, WORDS)
    assert " ".join(line.strip() for line in found) == WORDS
    assert max(map(len, found)) <= width
    assert [line.startswith("  ") for line in found] == [False, *[True] * (len(found) - 1)]
    assert len(found) == {80: 2, 60: 2, 24: 6}[width], "and no line is shorter than it need be"


def test_paths_stay_whole_and_tables_stay_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "results/" + "x" * 60
    assert lines(capsys, f"wrote {path}, all of it") == ["wrote", f"  {path},", "  all of it"]
    assert lines(capsys, "one\n\ntwo") == ["one", "", "two"], "lines of its own stay apart"
    monkeypatch.setenv("COLUMNS", "80")
    wide = tables()[1]
    assert "\n".join(lines(capsys, wide)) + "\n" == printed(160, tables()[1])


def test_numbers_stay_with_their_units_and_commands_with_their_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    said = lines(capsys, "the last byte of it lands there at 1.25 ms; `sim hosts p3.8xlarge` has 10 GB/s")
    assert said == [
        "the last byte of it lands there at",
        "  1.25 ms; `sim hosts p3.8xlarge` has",
        "  10 GB/s",
    ]


def test_a_terminal_has_prose_as_wide_as_itself() -> None:
    out = io.StringIO()
    console = Console(file=out, width=50, force_terminal=True, color_system=None)
    say(console, WORDS, bold=10)
    assert max(len(re.sub(r"\x1b\[\d*m", "", line)) for line in out.getvalue().splitlines()) in range(40, 51)


def test_a_range_has_its_unit_once_and_small_networks_a_size() -> None:
    p3 = find_host("p3.8xlarge")
    ranges = tuple(host_table(p3).columns[2].cells)
    assert "47.9 to 48 GB/s" in map(str, ranges)
    assert str(layers_table(network(3072, 100)).title).endswith("2 layers, 3.1 KiB")
