"""The journal: what is written stays, what a kill cuts short goes, and nobody else writes it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.inference.journal import Journal

ROOT = Path(__file__).resolve().parents[3]


def entries(path: Path) -> list[dict]:
    with Journal(path) as journal:
        return [entry for _, entry in journal.entries()]


def test_entries_come_back_in_order_and_by_their_place(tmp_path):
    path, written = tmp_path / "new" / "journal.jsonl", [{"text": "改行\n \u2028 🦁"}, {"text": "\ud800"}, {"value": 0.1}]
    with Journal(path) as journal:
        places = [journal.append(entry) for entry in written]
    with Journal(path) as journal:
        assert [begin for begin, _ in journal.entries()] == places
        assert [journal.at(begin) for begin in places] == written
        places.append(journal.append({"more": 1}))
        assert journal.at(places[-1]) == {"more": 1}
    assert entries(path) == [*written, {"more": 1}]


def test_a_line_cut_anywhere_is_dropped_and_the_lines_before_it_stay(tmp_path):
    path = tmp_path / "journal.jsonl"
    first, second = ((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode() for text in ("ねこ", "いぬ"))
    for length in range(len(second) + 1):
        path.write_bytes(first + second[:length])
        # Without its newline alone, a line is whole.
        expected = [{"text": "ねこ"}, *([{"text": "いぬ"}] if length >= len(second) - 1 else [])]
        assert entries(path) == expected
        with Journal(path) as journal:
            journal.append({"text": "next"})
        assert entries(path) == [*expected, {"text": "next"}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    for damage, fault in ((b'{"a": \n', "not a line of a journal"), (b"[1]\n", "holds a JSON list, not an object")):
        path.write_bytes(b'{"a": 1}\n' + damage + b'{"a": 2}\n')
        with pytest.raises(ValueError, match=rf"journal.jsonl:2: {fault}.*remove the line"):
            entries(path)


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path), pytest.raises(BlockingIOError, match=r"journal.jsonl: another process is writing it"):
        Journal(path)
    Journal(path).close()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/journal.jsonl: cannot be written: .*; name a file in a writable folder"):
        Journal(tmp_path / "file" / "journal.jsonl")
    with pytest.raises(IsADirectoryError, match="cannot be written"):
        Journal(tmp_path)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path, write = tmp_path / "journal.jsonl", os.write
    with Journal(path) as journal:
        journal.append({"a": 1})

        def half(file, data):
            if len(data) < 8:
                raise OSError(28, "No space left on device")
            return write(file, bytes(data)[: len(data) // 2])

        with monkeypatch.context() as patch:
            patch.setattr("os.write", half)
            with pytest.raises(OSError, match=r"journal.jsonl: could not be written: No space left"):
                journal.append({"text": "x" * 100})
        journal.append({"a": 2})
    assert entries(path) == [{"a": 1}, {"a": 2}]


def test_a_killed_process_loses_no_line_that_append_returned_from(tmp_path):
    path = tmp_path / "journal.jsonl"
    writer = (
        "import sys; from engine.inference.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for i in range(10**6): journal.append({'i': i, 'text': 'x' * 100}, synced=False); print(i, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", writer, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 50:
                process.send_signal(signal.SIGKILL)
                break
        last = max([50, *(int(line) for line in process.stdout if line.endswith("\n"))])
    assert [entry["i"] for entry in entries(path)][: last + 1] == list(range(last + 1))
