"""Tables where there is little room: words are folded, figures never cut."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from calibrate import show as calibrated
from hwexec.sweep_report import as_text, table_of
from sim.catalog import Request, find_host, find_profile, host_names
from sim.listing import host_table, hosts_table, layers_table
from sim.tables import put
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
    assert "55.38" in text


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


def test_a_range_has_its_unit_once_and_small_networks_a_size() -> None:
    p3 = find_host("p3.8xlarge")
    ranges = tuple(host_table(p3).columns[2].cells)
    assert "47.9 to 48 GB/s" in map(str, ranges)
    assert str(layers_table(network(3072, 100)).title).endswith("2 layers, 3.1 KiB")
