"""The report's page: its size, what it embeds, the command, and the page in a real browser."""

import base64
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from recipes.report import __main__ as command
from recipes.report.page import page, write_report
from recipes.report.reading import RunRecord, read_run
from tests.recipes.browser import PROGRAM, Browser
from tests.recipes.report.runs import EVIL, write_run

LIMIT = 5_000_000  # bytes of a page


def embedded(page):
    """The data in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def record(steps, columns, *, samples=None, spikes=()):
    """A run of many steps, with normal noise in each column."""
    rng = np.random.default_rng(0)
    table = {name: rng.normal(2, 0.5, steps) for name in columns}
    table |= {"step": np.arange(1.0, steps + 1), "loss": rng.normal(2, 0.5, steps)}
    return RunRecord(Path("run"), table, {}, samples or {}, list(spikes), {}, [])


def test_a_run_of_50_000_steps_fits_5_megabytes_and_keeps_its_extremes():
    run = record(50_000, [f"value{number}" for number in range(29)])
    run.steps["loss"][31_415] = 77.7
    run.steps["loss"][27_182] = -77.7
    text = page([run])
    assert len(text) < LIMIT
    (table,) = embedded(text.decode())["runs"]
    loss = table["steps"]["columns"]["loss"]
    assert (max(loss["high"]), min(loss["low"])) == (77.7, -77.7)
    assert len(loss["mean"]) > 2000
    assert any("50,000 steps are drawn in groups of" in note for note in table["notes"])


def test_many_samples_spikes_and_documents_are_limited_and_noted():
    samples = {step: [{"prompt": f"question {number}", "answer": "日本" * 2000} for number in range(20)] for step in range(100)}
    documents = [{"source": "data", "document": number, "start": 0, "tokens": 100} for number in range(1000)]
    spikes = [{"step": step, "loss": 9.0, "deviations": 8.0 + step, "documents": documents} for step in range(1, 901)]
    text = page([record(20_000, map(str, range(60)), samples=samples, spikes=spikes)])
    assert len(text) < LIMIT
    (table,) = embedded(text.decode())["runs"]
    answers = table["samples"][0]["answers"]
    assert (answers[0][0], answers[-1][0]) == (0, 99)
    assert len(answers) < 100
    assert [spike["at"]["step"] for spike in table["spikes"]] == list(range(501, 901))
    assert {spike["count"] for spike in table["spikes"]} == {1000}
    assert all(spike["more"] == 1000 - len(spike["documents"]["data"]) > 0 for spike in table["spikes"])
    assert sum(note.endswith("has all of them") for note in table["notes"]) == 2


def test_texts_of_a_run_cannot_become_markup_or_script(tmp_path):
    folder = write_run(tmp_path / "<script>@data@&amp;")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 42, "samples": [{"prompt": "\\ud83d alone\\u2028", "answer": {"not": "text"}}]}\n')
    text = page([read_run(folder)]).decode()
    assert text.count("</script>") == 2
    assert "<title>&#60;script&#62;@data@&#38;amp;</title>" in text
    (table,) = embedded(text)["runs"]
    assert table["name"] == folder.name
    assert table["samples"][0]["prompt"] == EVIL
    assert table["samples"][-1] == {"prompt": "\ud83d alone\u2028", "answers": [[42, '{"not": "text"}']]}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'")
    for name in ("style", "script"):
        content = re.search(rf"<{name}>(.*?)</{name}>", text, re.S)[1]
        assert f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy


def test_the_command_names_the_page_and_what_it_could_not_read(tmp_path, capsys):
    one, other = write_run(tmp_path / "runs" / "one"), write_run(tmp_path / "runs" / "other", seed=1)
    command.main([str(one)])
    said = capsys.readouterr().out
    assert f"{one}: metrics.jsonl: line 51 could not be read" in said
    assert f"{one / 'report.html'}: 0." in said
    before = (one / "report.html").read_bytes()
    command.main([str(one), str(other)])
    assert [run["name"] for run in embedded((tmp_path / "runs" / "comparison.html").read_text())["runs"]] == ["one", "other"]
    assert (one / "report.html").read_bytes() == before
    command.main([str(other), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").is_file()
    for arguments, said in [
        ([str(one), "--out", str(other)], r"--out .*other: must end in \.html"),
        ([str(one), str(tmp_path / "three")], "three: no such run folder"),
        ([str(one), "--out", str(tmp_path / "nowhere" / "page.html")], "nowhere"),
    ]:
        with pytest.raises(SystemExit, match=said):
            command.main(arguments)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / parent / "sft", 3) for parent in ("a", "b")]
    write_report(folders, tmp_path / "page.html")
    assert [run["name"] for run in embedded((tmp_path / "page.html").read_text())["runs"]] == ["a/sft", "b/sft"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        for domain in ("Page", "Runtime", "Log"):
            opened(f"{domain}.enable")
        yield opened


@pytest.fixture
def opened(browser, tmp_path):
    """opened(folders, width, theme) -> the browser with the page of these runs, drawn. Its complaints are errors."""

    def open_page(folders, width=1200, theme="light"):
        write_report(folders, tmp_path / "page.html")
        browser("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        browser("Page.navigate", url=(tmp_path / "page.html").as_uri())
        browser.wait("typeof view === 'object' && document.readyState === 'complete'")
        browser.run("view.charts[0].element.scrollIntoView({block: 'center'})")
        browser.wait("!!view.charts[0].box")
        return browser

    browser.complaints.clear()
    yield open_page
    # An aid to looking at the page: KOMAINU_SCREENSHOTS names a folder.
    if folder := os.environ.get("KOMAINU_SCREENSHOTS"):
        (Path(folder) / f"{tmp_path.name}.png").write_bytes(browser.screenshot())
    assert not browser.complaints


def mouse(browser, kind, x, y):
    browser("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)


def test_one_run_in_a_browser(opened, tmp_path):
    run = write_run(tmp_path / "run")
    browser = opened([run])
    titles = browser.run("view.charts.map((chart) => chart.panel.title)")
    assert titles[:3] == ["Loss", "Learning rate", "Gradient norm"]
    assert "Scores" in titles
    assert "Share of the ceiling" not in titles
    assert "not measured: share of the ceiling" in browser.run("at('notes').textContent")
    # Markup in samples stays text.
    assert EVIL in browser.run("document.querySelector('#samples').textContent")
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert "owned" not in browser.run("document.title")
    # The mouse reads the values below it.
    x, y = browser.run(
        "(({left, top}) => [left + view.charts[0].place(20), top + 60])(view.charts[0].above.getBoundingClientRect())"
    )
    mouse(browser, "Moved", x, y)
    browser.wait("!view.charts[0].tip.hidden")
    shown = browser.run("view.charts[0].tip.innerText")
    lines = {
        (line["step"], "loss" in line): line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[:-1])
    }
    assert shown.startswith("step 20, 2,000 tokens, 1 min")
    assert f"{lines[20, True]['loss']:.5g}" in shown
    # Dragging zooms in, and a double click shows the whole run again.
    mouse(browser, "Pressed", x, y)
    mouse(browser, "Moved", x + 200, y)
    mouse(browser, "Released", x + 200, y)
    low, high = browser.run("view.range")
    assert low == pytest.approx(20, abs=0.1)
    assert 20 < high < 40
    # The part in sight fills the height, also between two evaluations, where a line has no point.
    for chart, between in ((0, [20, 29]), (titles.index("Scores"), [21, 24])):
        low, high = browser.run(f"(view.zoom(...{between}), view.charts[{chart}].heights({between}))")
        if chart:
            assert [low, high] == pytest.approx([21 / 40 - 0.06 * 3 / 40, 24 / 40 + 0.06 * 3 / 40])
        else:
            losses = [lines[step, True]["loss"] for step in range(20, 30)] + [2 + 5 * np.exp(-2), 2 + 5 * np.exp(-2.9)]
            assert low < min(losses)
            assert high == pytest.approx(max(losses) + 0.06 * (max(losses) - min(losses)), rel=0.01)
    browser.run("view.charts[1].above.dispatchEvent(new MouseEvent('dblclick'))")
    assert browser.run("view.range") is None
    # Keys do the same and are read aloud.
    browser.run("view.charts[0].above.focus()")
    browser.key("Home", 36)
    for _ in range(6):
        browser.key("ArrowRight", 39)
    said = browser.run("at('said').textContent")
    assert said.startswith("step 7, 700 tokens, 21 s; training ")
    browser.key("+", 187)
    low, high = browser.run("view.range")
    assert high - low < 20
    browser.key("Escape", 27)
    assert browser.run("view.range") is None
    # The spike is shown in the curves.
    browser.run("document.querySelectorAll('#spikes button')[1].click()")
    assert browser.run("view.cursor") == 7
    browser.wait("view.charts[0].tip.innerText.includes('spike, 12.5 deviations')")
    browser.run("document.querySelector('#spikes details').open = true")
    browser.wait("document.querySelector('#spikes details').innerText.includes('data/chat')")
    # Samples of an earlier evaluation.
    browser.run(
        "(slider => { slider.value = 1; slider.dispatchEvent(new Event('input')); })(document.querySelector('.stepper input'))"
    )
    assert f"{EVIL} 10" in browser.run("document.querySelector('.answers').textContent")
    # The other axes.
    for axis, end in (("tokens", 4000), ("seconds", 120)):
        browser.run(f"document.querySelector('input[value={axis}]').click()")
        assert browser.run("view.extent[1]") == end
    assert browser.run("new Set(view.charts.map((chart) => chart.panel.title)).size") == len(titles)


def test_several_runs_in_a_browser_on_a_narrow_dark_screen(opened, tmp_path):
    folders = [
        write_run(tmp_path / f"run{seed}", 40 - 5 * seed, seed=seed, peak=1e-3 * (1 + seed), pairs=True) for seed in range(3)
    ]
    browser = opened(folders, width=390, theme="dark")
    assert browser.run("document.documentElement.scrollWidth") == 390
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.run("at('theme').click()")
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", back))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))
    titles = browser.run("view.charts.map((chart) => chart.panel.title)")
    assert titles[:4] == ["Loss", "Reward margin", "Accuracy", "Rewards"]
    different = browser.run("[...document.querySelectorAll('#settings tbody th')].map((cell) => cell.textContent)")
    assert different == ["seed", "steps", "schedule.peak"]
    assert browser.run("view.charts[0].shown().map((curve) => curve.run)") == [0, 1, 2, 0, 1, 2]
    browser.run("document.querySelectorAll('#runs button')[1].click()")
    assert browser.run("view.charts[0].shown().map((curve) => curve.run)") == [0, 2, 0, 2]
    # The colours of the curves are on the canvas, and that of the hidden run is not.
    seen = """[0, 1, 2].map((number) => view.color(number).match(/[0-9]+/g).map(Number)).map((color) => {
        for (let at = 0; at < dots.length; at += 4) {
          if (dots[at + 3] === 255 && color.every((part, index) => part === dots[at + index])) return true;
        }
        return false;
    })"""
    dots = "view.charts[0].below.getContext('2d').getImageData(0, 0, view.charts[0].below.width, view.charts[0].below.height)"
    assert browser.run(f"((dots) => {seen})({dots}.data)") == [True, False, True]


def test_the_scripts_of_the_page_count_and_write_numbers_rightly(opened, tmp_path):
    """Smoothing is an exponential mean by steps; ticks are few, in range, in order, and all written differently."""
    browser = opened([write_run(tmp_path / "run")])
    rng = np.random.default_rng(0)
    steps, values = np.cumsum(rng.integers(1, 5, 50)), rng.normal(size=50)
    half = 7.0
    found = browser.run(f"smooth({steps.tolist()}, {values.tolist()}, {half})")
    for place in range(50):
        # The weight of a value is the sum of the weights of the steps that it stands for.
        starts = np.concatenate(([0], steps[:place]))
        ends = steps[: place + 1]
        weights = 2 ** ((ends - steps[place]) / half) - 2 ** ((starts - steps[place]) / half)
        assert found[place] == pytest.approx(np.average(values[: place + 1], weights=weights), rel=1e-9, abs=1e-12)
    for kind in ("number", "whole", "seconds", "share"):
        for scale in 10 ** rng.uniform(0 if kind == "whole" else -8, 9, 40):
            low = scale * rng.uniform(-1 if kind == "number" else 0, 1)
            high = low + scale * rng.uniform(3 if kind == "whole" else 0.01, 9)
            self_low, self_high = float(low), float(high)
            ticks, texts = browser.run(
                f"(({{ticks, text}}) => [ticks, ticks.map(text)])(linearAxis({self_low}, {self_high}, 6, '{kind}'))"
            )
            slack = 1e-6 * (high - low)
            assert ticks == sorted(ticks)
            assert len(ticks) <= 7
            assert all(low - slack <= tick <= high + slack for tick in ticks)
            if kind != "seconds" or scale > 1:
                assert len(set(texts)) == len(texts), (low, high, texts)
