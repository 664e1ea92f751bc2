"""The page of results: every table has its rows, and the page agrees with the results."""

import pytest

from benchmarks import report
from benchmarks.report import TABLES, Table, draw, filled, rows_of, text_of


@pytest.mark.parametrize("name", TABLES)
def test_a_table_names_the_machine_and_the_commit_of_its_result(name):
    table = TABLES[name]
    text = text_of(table)
    assert rows_of(table)
    assert "| - |" * len(table.columns) not in text
    assert f"results/{table.result}.json" in text
    assert "commit `" in text


def test_regions_are_filled_and_everything_else_stays():
    page = "before\n<!-- table head -->\nold\n<!-- end -->\nafter\n"
    once = filled(page)
    assert once.startswith("before\n<!-- table head -->\n| forward and backward | ms |")
    assert once.endswith("<!-- end -->\nafter\n")
    assert "old" not in once
    assert filled(once) == once
    with pytest.raises(ValueError, match=r"no such table; choose from .*head"):
        filled(page.replace("head", "nothing"))


def test_cells_have_units():
    row = {"share": 0.5, "seconds": {"median": 0.002, "low": 0.001, "high": 0.003, "samples": 3}, "name": "a|b"}
    assert [report.cell(row, name) for name in ("share %", "seconds ms", "name", "none")] == ["50", "2 (1 to 3)", "a\\|b", "-"]


def test_bars_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw("head", TABLES["head"], tmp_path)
    assert "<svg" in (tmp_path / "head.svg").read_text()


def test_a_page_that_differs_from_the_results_is_reported(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    monkeypatch.setattr(report, "PAGE", page)
    page.write_text("<!-- table head -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="differs from the results"):
        report.main(["--check"])
    page.write_text(filled(page.read_text()))
    with pytest.raises(SystemExit) as ended:
        report.main(["--check"])
    assert ended.value.code is None
    assert isinstance(TABLES["head"], Table)
