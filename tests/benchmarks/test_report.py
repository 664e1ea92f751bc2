"""The page of results: that it is what the committed files give, and says nothing else."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.plot import Bar, bar_chart
from benchmarks.report import View, filled, generated, page, read_results, slug, stale
from benchmarks.rows import KEYS

ROOT = Path(__file__).resolve().parents[2]
FILE = "finetune-quick-cpu-3-00ghz"


@pytest.fixture(autouse=True)
def view(monkeypatch):
    """How the results of these tests are shown."""
    view = View("Fine-tuning", "What it is.", "name", brief=("name", "speed"), bars=(("speed", "Tokens a second", 0),))
    monkeypatch.setitem(report.VIEWS, "finetune", view)
    monkeypatch.setitem(KEYS, "finetune", ("task", "shape", "same", "name"))


@pytest.fixture
def checkout(tmp_path, make_result, spread):
    """A checkout of nothing but one result file and a README with a region."""
    rows = [
        {
            "shape": 7,
            "seconds": 0.0021,
            "name": "komainu",
            "speed": spread(1900.0, 2000.0, 2100.0),
            "same": "x",
            "plan": {"missing": "no plan exists"},
            "watts": {"missing": "no NVML"},
        },
        {
            "shape": 7,
            "seconds": 0.25,
            "name": "trl|padded",
            "speed": spread(900.0, 1000.0, 1100.0),
            "same": "x",
            "plan": {"missing": "no plan exists"},
            "watts": 7.0,
        },
        {"shape": 7, "name": "liger", "missing": "liger-kernel is not installed"},
    ]
    _write(tmp_path, FILE, make_result(rows))
    (tmp_path / "README.md").write_text("# Top\n\n<!-- results:finetune -->\nold\n<!-- end -->\n\nrest 123 tokens/s\n")
    return tmp_path


def _write(root: Path, name: str, content: dict) -> Path:
    path = root / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _save(root: Path) -> None:
    for path, text in generated(root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_checkouts_pages_and_plots_are_what_its_results_give(monkeypatch):
    monkeypatch.undo()
    names = [str(path.relative_to(ROOT)) for path in stale(ROOT)]
    assert not names, f"not what benchmarks/results gives: {', '.join(names)}; run python -m benchmarks.report"


def test_without_results_the_page_says_so(tmp_path):
    text = page([])
    assert "No result has been committed yet" in text
    assert ".json)" not in text
    assert not re.search(r"\|.* \d", text)
    assert read_results(tmp_path) == []


def test_a_result_gives_what_where_when_with_what(checkout):
    text = page(read_results(checkout / "benchmarks" / "results"))
    assert "## Fine-tuning\n\nWhat it is.\n" in text
    for part in ("Measured 2026-02-03", "Quick CPU @ 3.00GHz (2 cores, 2 threads, 7.8 GiB of main memory)", "torch 2.13.0",
                 "commit `0123456789ab`", "by `python -m benchmarks.finetune --steps 3`",
                 f"[{FILE}.json](results/{FILE}.json)"):  # fmt: skip
        assert part in text, part
    assert "trl None" not in text
    assert "model layers = 4\n" in text
    # What all rows share stands once; times share a unit; a bar cannot break the table.
    assert "All rows: shape 7, same x.\n" in text
    assert "| name | speed |\n| --- | --- |\n| komainu | 2,000 (1,900 to 2,100) |\n| trl\\|padded |" in text
    assert (
        "| name | time (ms) | watts |\n| --- | --- | --- |\n| komainu | 2.1 | missing |\n| trl\\|padded | 250 | 7 |\n" in text
    )
    assert "- liger: liger-kernel is not installed\n" in text
    assert "- plan: no plan exists\n" in text
    assert "- watts: no NVML\n" in text
    assert "cut off" not in text
    assert "not committed" not in text
    assert page(read_results(checkout / "benchmarks" / "results")) == text


def test_tasks_have_tables_of_their_own_and_units_stand_in_the_head(tmp_path, make_result, spread):
    rows = [
        {"task": "one", "name": "a", "of_ceiling": spread(0.1, 0.2, 0.3), "peak_gib": 1.5, "step_seconds": 2e-5, "sure": True},
        {"task": "two", "name": "a", "of_ceiling": spread(0.3, 0.4, 0.5), "peak_gib": 2.5, "step_seconds": 3e-5, "sure": False},
        {"task": "two", "name": "b", "missing": "none"},
    ]
    _write(tmp_path, FILE, make_result(rows))
    text = page(read_results(tmp_path / "benchmarks" / "results"))
    assert "| name | of ceiling (%) | peak (GiB) | step (µs) | sure |\n" in text
    one, two = text.split("**two**")
    assert "**one**" in one
    assert "| a | 20 (10 to 30) | 1.5 | 20 | yes |" in one
    assert "| a | 40 (30 to 50) | 2.5 | 30 | no |" in two
    assert "- two, b: none\n" in two


def test_a_result_that_is_not_clean_says_so(checkout, make_result):
    _write(checkout, FILE, make_result([{"name": "a", "x": 1.0}], commit="abc+", complete=False))
    text = page(read_results(checkout / "benchmarks" / "results"))
    assert "`abc` with changes that were not committed" in text
    assert "It was cut off; rows are lacking." in text


def test_check_finds_every_change(checkout, make_result):
    readme, plot = checkout / "README.md", checkout / "benchmarks" / "plots" / f"{FILE}-speed.svg"
    page_file = checkout / "benchmarks" / "README.md"
    assert stale(checkout) == [page_file, plot, readme]
    _save(checkout)
    assert stale(checkout) == []
    assert readme.read_text().endswith("<!-- end -->\n\nrest 123 tokens/s\n")
    assert "| komainu | 2,000 (1,900 to 2,100) |" in readme.read_text()
    assert "liger-kernel is not installed" in readme.read_text()
    for path in (readme, plot, page_file):
        good = path.read_text()
        path.write_text(good.replace("2,000", "3,000"))
        assert stale(checkout) == [path]
        path.write_text(good)
    extra = plot.with_name("claim.svg")
    extra.write_text("<svg/>")
    assert stale(checkout) == [extra]
    extra.unlink()
    _write(checkout, FILE, make_result([{"name": "a", "speed": 1.0}]))
    assert stale(checkout) == [page_file, plot, readme]


def test_regions_are_filled_by_benchmark_file_or_plot(checkout):
    results = read_results(checkout / "benchmarks" / "results")
    text = (
        f"<!-- results:{FILE} -->\n<!-- end -->\n<!-- plot:finetune -->\n<!-- end -->\n<!-- results:data -->\nx\n<!-- end -->\n"
    )
    once = filled(text, results)
    assert f"(benchmarks/results/{FILE}.json)" in once
    assert f"![Tokens a second](benchmarks/plots/{FILE}-speed.svg)" in once
    assert "No result of `benchmarks.data` has been committed yet.\n<!-- end -->" in once
    assert filled(once, results) == once
    with pytest.raises(ValueError, match="no benchmark or result file has this name"):
        filled("<!-- results:finetun -->\n<!-- end -->\n", results)
    with pytest.raises(ValueError, match="no <!-- end -->"):
        filled("<!-- results:data -->\n", results)
    with pytest.raises(ValueError, match="stands in another"):
        filled("<!-- results:data -->\n<!-- plot:data -->\n<!-- end -->\n", results)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("finetune-slow-cpu", {}, f"named {FILE}.json"),
        ("data-quick-cpu-3-00ghz", {}, f"named {FILE}.json"),
        (FILE, {"benchmark": "finetunes"}, "unknown benchmark 'finetunes'"),
        (FILE, {"rows": None}, "'rows' is not there or no list"),
    ],
)
def test_files_that_are_not_what_their_name_says_are_refused(tmp_path, make_result, name, change, says):
    _write(tmp_path, name, make_result([]) | change)
    with pytest.raises(ValueError, match=f"{name}.json: .*{says}"):
        read_results(tmp_path / "benchmarks" / "results")


def test_slugs():
    assert slug("AMD EPYC 7B13 @ 2.45GHz") == "amd-epyc-7b13-2-45ghz"


def _numbers(svg: str, tag: str, name: str) -> list[float]:
    return [float(element.get(name)) for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag)]


def test_bars_are_as_long_as_their_values():
    group = [Bar("a<b", 30.0, 25.0, 40.0, "30", ours=True), Bar("c", 60.0, 60.0, 60.0, "60")]
    svg = bar_chart("Speed & memory", [("one", group), ("two", [Bar("d", 15.0, 15.0, 15.0, "15")])])
    background, *widths = _numbers(svg, "rect", "width")
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(widths[0] / 2, abs=0.2)
    assert max(widths) < background
    starts, ends = _numbers(svg, "line", "x1"), _numbers(svg, "line", "x2")
    spans = [end - start for start, end in zip(starts, ends, strict=True) if end > start]
    assert spans == [pytest.approx(widths[0] * 15 / 30, abs=0.2)]
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Speed & memory", "a<b", "one", "two", "0", "10", "60"} <= set(texts)


def test_bars_are_named_by_what_tells_them_apart(tmp_path, monkeypatch, make_result):
    rows = [
        {"task": task, "shape": shape, "same": "x", "name": name, "speed": 1.0}
        for task in ("sft", "dpo") for shape in (1, 2) for name in ("komainu", "peer")
    ]  # fmt: skip
    _write(tmp_path, FILE, make_result(rows))

    def texts() -> list[str]:
        ((_, _, svg),) = report._plots(read_results(tmp_path / "benchmarks" / "results")[0])
        found = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        return [text for text in found if text[0].isalpha() and not text.startswith("Tokens")]

    assert texts()[:6] == ["sft, shape 1", "komainu", "peer", "sft, shape 2", "komainu", "peer"]
    rows[:] = [row for row in rows if row["shape"] == 1]
    _write(tmp_path, FILE, make_result(rows))
    assert texts() == ["sft", "komainu", "peer", "dpo", "komainu", "peer"]
    view = View("Fine-tuning", "What it is.", "name", bars=(("speed", "Tokens a second", 1),), only=("komainu",))
    monkeypatch.setitem(report.VIEWS, "finetune", view)
    assert texts() == ["sft", "dpo"]


def test_a_plot_holds_no_date_and_no_chance():
    groups = [("", [Bar("a", 1e-5, 0.9e-5, 1.1e-5, "x")]), ("zero", [Bar("b", 0.0, 0.0, 0.0, "0")])]
    assert bar_chart("t", groups) == bar_chart("t", groups)
    assert bar_chart("t", groups[1:])
    assert bar_chart("t", groups, 1.0) != bar_chart("t", groups)


def test_the_command_writes_and_checks(checkout, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROOT", checkout)
    with pytest.raises(SystemExit, match=r"benchmarks/README\.md"):
        report.main(["--check"])
    (checkout / "benchmarks" / "plots").mkdir()
    (checkout / "benchmarks" / "plots" / "claim.svg").write_text("<svg/>")
    report.main([])
    assert capsys.readouterr().out.split() == [
        "benchmarks/README.md", f"benchmarks/plots/{FILE}-speed.svg", "README.md", "benchmarks/plots/claim.svg",
    ]  # fmt: skip
    report.main(["--check"])
    assert not (checkout / "benchmarks" / "plots" / "claim.svg").exists()
    (checkout / "README.md").write_text("<!-- results:nothing -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=r"^error: .*README.md: <!-- results:nothing -->"):
        report.main([])
