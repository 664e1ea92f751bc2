"""Folders and files that appear under their name only when complete."""

import os

import pytest

from model.folder import complete_file, complete_folder, replace_folder, write_file


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with complete_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("whole")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "whole"
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    def interrupted():
        with complete_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


def test_an_error_leaves_the_old_folder_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")

    def interrupted():
        with complete_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "file").write_text("half")
            raise ValueError

    with pytest.raises(ValueError):
        interrupted()
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_remains_of_a_killed_attempt_are_removed(tmp_path):
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "stale").write_text("")
    with complete_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("")
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_existing_folder_is_replaced_only_on_request(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(FileExistsError, match=r"out: exists already; .* ask to overwrite"), complete_folder(tmp_path / "out"):
        pytest.fail("the block was entered")
    with complete_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("")
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_path_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "out"
    with pytest.raises(OSError, match=rf"{target}: cannot be written: .*; choose a writable folder"), complete_folder(target):
        pytest.fail("the block was entered")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="out: cannot be written"), complete_folder(tmp_path / "out"):
            pytest.fail("the block was entered")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "out").write_text("precious")
    for overwrite in (False, True):
        with (
            pytest.raises(FileExistsError, match="out: is a file; name a folder"),
            complete_folder(tmp_path / "out", overwrite=overwrite),
        ):
            pytest.fail("the block was entered")
    assert (tmp_path / "out").read_text() == "precious"


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for content in ("first", "second", "third"):
        with complete_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "file").write_text(content)
        assert (tmp_path / "disk" / "file").read_text() == content
        assert (tmp_path / "out").is_symlink()
        assert names(tmp_path) == ["disk", "out"]


def test_the_old_or_the_new_folder_exists_at_every_moment(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    seen = []
    rename = type(source).rename

    def watched(path, to):
        result = rename(path, to)
        seen.append(sorted(file.read_text() for file in tmp_path.rglob("file")))
        return result

    monkeypatch.setattr(type(source), "rename", watched)
    replace_folder(source, target)
    assert seen == [["new", "old"], ["new", "old"]]
    assert names(tmp_path) == ["target"]
    assert (target / "file").read_text() == "new"


def test_a_file_is_replaced_all_at_once(tmp_path, monkeypatch):
    write_file(tmp_path / "latest", "one\n")
    write_file(tmp_path / "latest", "二\n")
    assert (tmp_path / "latest").read_bytes() == "二\n".encode()
    assert names(tmp_path) == ["latest"]
    monkeypatch.setattr("model.folder.sync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="/latest: could not be written: disk full; free the disk or choose another folder"):
        write_file(tmp_path / "latest", "three\n")
    assert names(tmp_path) == ["latest"]
    assert (tmp_path / "latest").read_text() == "二\n"


def test_only_one_process_writes_a_folder(tmp_path):
    """A lock is of an opened file: two of one process stand for two processes."""
    with (
        complete_folder(tmp_path / "out"),
        pytest.raises(BlockingIOError, match="out: another process is writing it now; wait for it"),
        complete_folder(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == ["out"]
    with complete_folder(tmp_path / "out", overwrite=True):
        pass


def test_writers_of_the_same_file_do_not_disturb_each_other_even_with_one_process_id(tmp_path):
    """Two preference runs that share a cache of reference log-probabilities; containers often have the same process ids."""
    file = tmp_path / "table"
    with complete_file(file) as first:
        first.write_text("first")
        with complete_file(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
    assert file.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
