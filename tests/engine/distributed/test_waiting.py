"""Work that rank 0 does alone: the others wait, hear its result, and end where it ends."""

import json
import time
from functools import partial

import pytest

from engine.distributed.waiting import Waiting
from tests.engine.forked_ranks import end_of, fork_ranks


def test_one_process_just_does_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    waiting = Waiting()
    assert waiting.main
    assert waiting.main_alone(lambda: [1, "a"]) == [1, "a"]
    with pytest.raises(ValueError, match="wrong"):
        waiting.main_alone(lambda: raised(ValueError("wrong")))
    waiting.leave()


def raised(error: BaseException):
    raise error


def test_the_other_ranks_hear_what_rank_0_has_done_alone(tmp_path):
    def body(rank: int) -> None:
        waiting = Waiting()
        assert waiting.main == (rank == 0)
        began = time.monotonic()
        heard = [waiting.main_alone(partial(work, rank, number)) for number in range(3)]
        (tmp_path / f"{rank}.json").write_text(json.dumps([heard, time.monotonic() - began]))
        waiting.leave()

    def work(rank: int, number: int) -> dict[str, int]:
        assert rank == 0
        time.sleep(0.1)
        return {"number": number}

    assert end_of(fork_ranks(3, body)) == [0, 0, 0]
    for rank in range(3):
        heard, seconds = json.loads((tmp_path / f"{rank}.json").read_text())
        assert heard == [{"number": 0}, {"number": 1}, {"number": 2}]
        assert seconds >= 0.3


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (ValueError("no such file\nsecond line"), "ConnectionError: rank 0 ended: no such file"),
        (SystemExit(143), "SystemExit: 143"),
        (KeyboardInterrupt(), "ConnectionError: rank 0 ended: KeyboardInterrupt"),
    ],
)
def test_the_other_ranks_end_where_rank_0_fails(error, heard, tmp_path):
    def body(rank: int) -> None:
        waiting = Waiting()
        try:
            waiting.main_alone(lambda: raised(error))
        except BaseException as found:
            (tmp_path / str(rank)).write_text(f"{type(found).__name__}: {found}")
        waiting.leave()

    assert end_of(fork_ranks(2, body)) == [0, 0]
    assert (tmp_path / "0").read_text() == f"{type(error).__name__}: {error}"
    assert (tmp_path / "1").read_text() == heard
