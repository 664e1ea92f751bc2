"""Two results side by side: which rows meet, what their ratio is, and whether it means anything."""

import json

import pytest

from benchmarks import compare as command
from benchmarks.compare import compare
from benchmarks.rows import KEYS


@pytest.fixture(autouse=True)
def any_keys(monkeypatch):
    """The rows of these tests are told apart by all that they say."""
    monkeypatch.delitem(KEYS, "finetune")


def _lines(text: str, start: str) -> list[list[str]]:
    """The cells of the table's lines that begin so; cells are two spaces apart."""
    return [[cell for cell in line.split("  ") if cell] for line in text.splitlines() if line.startswith(start)]


def test_ratios_stand_beside_their_noise(make_result, spread):
    old = make_result([
        {"name": "alpha", "places": 64, "speed": spread(90.0, 100.0, 110.0), "memory": {"peak": 2.0}},
        {"name": "beta", "places": 64, "speed": spread(90.0, 100.0, 110.0)},
        {"name": "gone", "places": 64, "speed": spread(1.0, 1.0, 1.0)},
    ])  # fmt: skip
    new = make_result([
        # In another order, as rows are met by what they measure.
        {"name": "beta", "places": 64, "speed": spread(105.0, 120.0, 130.0)},
        {"name": "alpha", "places": 64, "speed": spread(180.0, 200.0, 220.0), "memory": {"peak": 1.0}},
        {"name": "alpha", "places": 128, "speed": spread(1.0, 1.0, 1.0)},
    ])  # fmt: skip
    text = compare(old, new)
    speed, peak = _lines(text, "alpha, places 64")
    assert [cell.strip() for cell in speed] == [
        "alpha, places 64", "speed", "100 (90 to 110)", "200 (180 to 220)", "2.000", "1.636", "2.444",
    ]  # fmt: skip
    assert [cell.strip() for cell in peak] == ["alpha, places 64", "memory peak", "2", "1", "0.500"]
    (beta,) = _lines(text, "beta")
    assert [cell.strip() for cell in beta][-4:] == ["1.200", "0.955", "1.444", "within noise"]
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
    assert [cell.strip() for cell in _lines(compare(old, new), "alpha")[0]][-1] == "1.000"


def test_a_row_that_is_measured_now_says_why_it_was_not(make_result, spread):
    old = make_result([{"name": "alpha", "missing": "not installed"}])
    new = make_result([{"name": "alpha", "speed": spread(1.0, 2.0, 3.0)}])
    assert "missing in old: alpha: not installed" in compare(old, new)
    assert "missing in new: alpha: not installed" in compare(new, old)
    assert "missing in" not in compare(old, old)


def test_what_else_changed_is_said(make_result):
    old = make_result([])
    new = make_result([], settings={"steps": 3, "model": {"layers": 8}}, commit="ffff", machine=old["machine"] | {"trl": "1.0"})
    text = compare(old, new)
    assert "setting model layers: 4 and 8" in text
    assert "trl: None and 1.0" in text
    assert "steps" not in text
    assert "commit 0123456789ab" in text
    assert "commit ffff" in text


def test_other_machines_only_when_asked(make_result, spread):
    old = make_result([{"name": "alpha", "speed": spread(90.0, 100.0, 110.0)}])
    new = make_result([{"name": "alpha", "speed": spread(90.0, 100.0, 110.0)}], machine=old["machine"] | {"cores": 4})
    with pytest.raises(ValueError, match="different machines: cores 2 and 4"):
        compare(old, new)
    assert "1.000" in compare(old, new, other_machine=True)


def test_other_benchmarks_never(make_result):
    with pytest.raises(ValueError, match="different benchmarks: finetune and data"):
        compare(make_result([]), make_result([], benchmark="data"), other_machine=True)


def test_rows_that_cannot_be_told_apart_are_refused(make_result):
    with pytest.raises(ValueError, match=r"two rows of the result of .* are 'alpha'"):
        compare(make_result([{"name": "alpha", "seconds": 1.0}, {"name": "alpha", "seconds": 2.0}]), make_result([]))


def test_the_command_prints_it_or_one_line_of_what_is_wrong(make_result, tmp_path, capsys):
    for name, content in (("old", make_result([])), ("new", make_result([])), ("other", make_result([], benchmark="data"))):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "torn").write_text("{")
    (tmp_path / "list").write_text("[]")
    command.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert capsys.readouterr().out.startswith("finetune, new / old\n")
    for name, says in (("other", "different benchmarks"), ("torn", "torn: not valid JSON"),
                       ("list", "list: 'benchmark' is not"), ("none", "none: no such result file")):  # fmt: skip
        with pytest.raises(SystemExit, match=f"^error: .*{says}"):
            command.main([str(tmp_path / "old"), str(tmp_path / name)])
