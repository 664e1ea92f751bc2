"""Two results side by side: which rows meet, what their ratio is, and whether the ratio means anything."""

import json

import pytest

from benchmarks import compare as command
from benchmarks.compare import compare
from benchmarks.results import RESULTS, read_result


def cells(text: str, start: str) -> list[list[str]]:
    """The cells of the table's lines that begin so; cells are two spaces apart."""
    return [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines() if line.startswith(start)]


def test_ratios_are_shown_with_their_noise(make_result, spread):
    old = make_result(
        [
            {"name": "alpha", "places": 64, "speed": spread(90.0, 100.0, 110.0), "memory": {"peak": 2.0}},
            {"name": "beta", "places": 64, "speed": spread(90.0, 100.0, 110.0)},
            {"name": "gone", "places": 64, "speed": spread(1.0, 1.0, 1.0)},
        ]
    )
    new = make_result(
        [  # in another order: rows meet by what they measure
            {"name": "beta", "places": 64, "speed": spread(105.0, 120.0, 130.0)},
            {"name": "alpha", "places": 64, "speed": spread(180.0, 200.0, 220.0), "memory": {"peak": 1.0}},
            {"name": "alpha", "places": 128, "speed": spread(1.0, 1.0, 1.0)},
        ]
    )
    text = compare(old, new)
    speed, peak = cells(text, "alpha, places 64")
    row = "alpha, places 64"
    assert speed == [row, "speed", "100 (90 to 110)", "200 (180 to 220)", "2.000", "1.636", "2.444", "-"]
    assert peak == [row, "memory peak", "2", "1", "0.500", "-", "-", "-"]
    (beta,) = cells(text, "beta")
    assert beta[-4:] == ["1.200", "0.955", "1.444", "within noise"]
    assert "only in old: gone, places 64" in text
    assert "only in new: alpha, places 128" in text


@pytest.mark.parametrize(
    ("low", "high", "within"), [(111.0, 120.0, False), (110.0, 120.0, True), (80.0, 90.0, True), (80.0, 89.0, False)]
)
def test_ranges_that_touch_are_noise(make_result, spread, low, high, within):
    old = make_result([{"name": "alpha", "speed": spread(90.0, 100.0, 110.0)}])
    new = make_result([{"name": "alpha", "speed": spread(low, (low + high) / 2, high)}])
    assert ("within noise" in compare(old, new)) == within
    assert ("within noise" in compare(new, old)) == within


def test_one_sample_has_no_range(make_result, spread):
    old = make_result([{"name": "alpha", "speed": spread(100.0, 100.0, 100.0) | {"samples": 1}}])
    new = make_result([{"name": "alpha", "speed": spread(90.0, 100.0, 110.0)}])
    assert cells(compare(old, new), "alpha")[0][-1] == "1.000"


def test_a_row_that_is_measured_now_says_why_it_was_missing(make_result, spread):
    old = make_result([{"name": "alpha", "missing": "not installed"}])
    new = make_result([{"name": "alpha", "speed": spread(1.0, 2.0, 3.0)}])
    assert "missing in old: alpha: not installed" in compare(old, new)
    assert "missing in new: alpha: not installed" in compare(new, old)
    assert "missing in" not in compare(old, old)


def test_changed_settings_and_versions_are_named(make_result):
    old = make_result([])
    new = make_result([], settings={"steps": 3, "model": {"layers": 8}}, commit="ffff", machine=old["machine"] | {"trl": "1.0"})
    text = compare(old, new)
    for line in ("setting model layers: 4 and 8", "trl: None and 1.0", "commit 0123456789ab", "commit ffff"):
        assert line in text
    assert "steps" not in text


def test_results_of_other_machines_or_benchmarks_and_equal_rows_are_refused(make_result):
    old = make_result([])
    with pytest.raises(ValueError, match="different machines: cores 2 and 4; --other-machine"):
        compare(old, make_result([], machine=old["machine"] | {"cores": 4}))
    assert "new / old" in compare(old, make_result([], machine=old["machine"] | {"cores": 4}), other_machine=True)
    with pytest.raises(ValueError, match="different benchmarks: quick and data"):
        compare(old, make_result([], benchmark="data"), other_machine=True)
    with pytest.raises(ValueError, match=r"two rows of the result of .* are 'alpha'"):
        compare(make_result([{"name": "alpha", "seconds": 1.0}, {"name": "alpha", "seconds": 2.0}]), old)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_compare_with_themselves(path):
    """Their rows can be told apart, and every measurement has a ratio of 1."""
    content = read_result(path)
    ratios = [line for line in compare(content, content).splitlines() if "  1.000" in line]
    assert ratios
    assert path.stem.startswith(f"{content['benchmark']}-")


def test_the_command_prints_the_comparison_or_a_one_line_error(make_result, tmp_path, capsys):
    for name, content in (("old", make_result([])), ("new", make_result([])), ("other", make_result([], benchmark="data"))):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "torn").write_text("{")
    (tmp_path / "list").write_text("[]")
    command.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert capsys.readouterr().out.startswith("quick, new / old\n")
    wrong = {"other": "different benchmarks", "torn": "torn: not valid JSON", "list": "list: 'benchmark' is missing"}
    for name, says in (wrong | {"none": "none: no such result file"}).items():
        with pytest.raises(SystemExit, match=f"^error: .*{says}"):
            command.main([str(tmp_path / "old"), str(tmp_path / name)])
