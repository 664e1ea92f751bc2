"""The list for a short GPU visit: settings that need no command line, limits, tasks that are skipped because they are whole."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu import TASKS, is_whole
from benchmarks.results import ROOT


def test_the_settings_of_every_task_need_no_optional_package():
    lacking = ["tyro", "tomli_w", "psutil", "matplotlib", "mistral_common", "datasets", "trl", "liger_kernel", "tensorboard"]
    lacking += ["transformers", "tokenizers"]
    program = (
        f"import sys; sys.modules |= dict.fromkeys({lacking})\n"
        "from benchmarks import gpu, kernels, own\n"
        "for name, task in gpu.TASKS.items():\n"
        "    if task.module != 'tests':\n"
        "        settings, run = gpu.settings_of(name, 'cuda', 'file')\n"
        "        print(name, settings.device, settings.out, callable(run))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n") == [f"{name} cuda file True" for name in TASKS if name != "tests"] + [""]


def test_complete_tasks_are_skipped_and_others_run_within_their_limits(tmp_path, monkeypatch, capsys):
    ran = []

    def run_apart(arguments, *, limit):
        name = arguments[arguments.index("--task") + 1]
        ran.append((name, round(limit)))
        complete = name != "peers"
        (tmp_path / f"{name}.json").write_text(json.dumps({"complete": complete, "rows": []}))
        return "done" if complete else f"cut off after {limit:.0f} s"

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    chosen = ["--out", str(tmp_path), "--minutes", "6", "--tasks", "whole", "peers", "ladder"]
    with pytest.raises(SystemExit, match="1"):
        gpu.main(chosen)
    assert ran == [("whole", 240), ("peers", 150), ("ladder", 150)]
    assert "peers.json is not whole" in capsys.readouterr().out
    ran.clear()
    with pytest.raises(SystemExit):
        gpu.main(chosen)
    assert [name for name, _ in ran] == ["peers"]
    with pytest.raises(SystemExit):
        gpu.main([*chosen, "--minutes", "0.01"])
    assert "not started: no time left" in capsys.readouterr().out


def test_a_file_is_whole_when_it_says_so(tmp_path):
    for content, whole in (("", False), ("{", False), ('{"complete": false}', False), ('{"complete": true}', True)):
        path = tmp_path / "task.json"
        path.write_text(content)
        assert is_whole(path) is whole
    assert not is_whole(tmp_path / "none.json")
    assert len(TASKS) < 9  # files that one visit may bring back


@pytest.mark.slow
def test_only_files_with_gpu_tests_are_collected(tmp_path):
    mark = "pytest.mark." + "gpu"  # written in two parts, so that this file does not count as a file with gpu tests
    (tmp_path / "conftest.py").write_text("def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: x')\n")
    (tmp_path / "test_some.py").write_text(
        f"import pytest\ndef test_unmarked():\n    assert False\n@{mark}\ndef test_good():\n    pass\n"
        f"@{mark}\ndef test_bad():\n    assert 1 == 2\n"
    )
    (tmp_path / "test_other.py").write_text("import there_is_no_such_module\n")
    program = "import pathlib, sys; from benchmarks.gpu import run_tests; run_tests(*map(pathlib.Path, sys.argv[1:]))"
    arguments = [str(tmp_path / "o.xml"), str(tmp_path)]
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, check=True)
    report = (tmp_path / "o.xml").read_text()
    assert 'tests="2"' in report
    assert 'failures="1"' in report
    assert "test_bad" in report
