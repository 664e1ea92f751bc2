"""Files of records: formats by name, equal bytes, all or nothing."""

import errno
import sys
from datetime import date

import pytest

from engine.data.sources import RECORD_SUFFIXES, find_sources
from recipes.data_making.rows import SUFFIXES, beside, check_name, row_writer

RECORDS = [{"text": "語", "n": [1, 2]}, {"text": "b\n", "more": {"x": 1.5}}, {"text": "", "n": []}]


def write(path, records=RECORDS):
    with row_writer(path) as add:
        for record in records:
            add(record)


def read(path) -> list[dict]:
    [source] = find_sources([str(path)], RECORD_SUFFIXES)
    return [record.value for record in source.records("blank")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_again_and_the_bytes_depend_on_the_records_alone(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    write(one)
    write(other)
    assert one.read_bytes() == other.read_bytes()
    found = [{name: value for name, value in row.items() if value is not None} for row in read(one)]
    assert found == RECORDS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([one.name, other.name])


def failing(error: BaseException):
    yield {"a": 1}
    raise error


def test_an_error_of_the_caller_leaves_the_old_file_and_passes_unchanged(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write(path)
    before = path.read_bytes()
    for error in (ConnectionError("https://x: cannot be reached"), KeyboardInterrupt(), ValueError("no")):
        with pytest.raises(type(error)) as raised:
            write(path, failing(error))
        assert raised.value is error
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write(path)

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(type(path), "open", lambda *_: Full())
    with pytest.raises(OSError, match=r"a\.jsonl: could not be written: No space left on device; free the disk"):
        write(path)
    monkeypatch.undo()
    assert read(path) == RECORDS


def test_a_name_of_no_known_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv: unknown type of file: must end in one of \.jsonl, \.jsonl\.gz, \.parquet"):
        check_name(tmp_path / "a.csv")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a\.jsonl: its folder cannot be made"):
        check_name(tmp_path / "file" / "a.jsonl")


def test_parquet_without_a_common_type_names_the_field(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"the values of 'a' have no common type"):
        write(tmp_path / "a.parquet", [{"a": 1}, {"a": "x"}])
    assert not list(tmp_path.iterdir())


def test_parquet_without_its_package_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"Parquet needs the optional packages of 'data'"):
        check_name(tmp_path / "a.parquet")


def test_a_part_stands_beside_its_result():
    for suffix in SUFFIXES:
        assert str(beside(f"x/a.ja{suffix}", "journal")) == "x/a.ja.journal"


def test_dates_and_half_surrogate_pairs_are_written(tmp_path):
    write(tmp_path / "a.jsonl", [{"when": date(2026, 1, 2), "text": "語\ud800"}])
    assert read(tmp_path / "a.jsonl") == [{"when": "2026-01-02", "text": "語\ud800"}]
