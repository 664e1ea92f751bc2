"""The chat's lines: commands that change the conversation in place, editing at a terminal, history, and the positional name."""

import os
import pty
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import recipes.chat as chat
from model.sampling import Sampling
from recipes.chat_lines import Conversation

ROOT = Path(__file__).resolve().parents[2]


class Parrot:
    """Answers each question with a number, and keeps what it was asked."""

    def __init__(self) -> None:
        self.sampling = Sampling(temperature=0.7)
        self.asked: list[list[str]] = []

    def converse(self, history, question) -> None:
        self.asked.append([*(message["content"] for message in history), question])
        answer = f"answer {len(self.asked)}"
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def complete(self, text) -> None:
        self.asked.append([text])


def talk(*lines: str, system: str | None = None, completion: bool = False) -> tuple[Conversation, Parrot]:
    parrot = Parrot()
    conversation = Conversation(parrot, system, completion=completion)
    for line in lines:
        assert conversation.take(line)
    return conversation, parrot


def test_samplers_change_in_place_for_the_answers_that_follow(capsys):
    _, parrot = talk("Hello", "/set temperature 0.3 top-p=0.9", "/set max_new_tokens 12")
    assert parrot.sampling == Sampling(temperature=0.3, top_p=0.9, max_new_tokens=12)
    assert "temperature 0.3, top_k 0, top_p 0.9" in capsys.readouterr().err
    assert len(parrot.asked) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperatur 1", "temperatur is no setting of the sampler; the nearest one is temperature"),
        ("/set temperature", "'temperature' stands alone"),
        ("/set temperature warm", "temperature takes a number, not 'warm'"),
        ("/set top_k 1.5", "top_k takes a whole number, not '1.5'"),
        ("/set top_p 2", r"top_p = 2.0: must lie in"),
        ("/set top_k 3 temperature 0", "top_k = 3 has no effect with temperature = 0"),
        ("/systm x", "/systm is no command here; the nearest one is /system"),
        ("/undo", "nothing was said yet"),
        ("/again", "there is no question yet"),
    ],
)
def test_a_wrong_command_changes_nothing_and_says_what_is_right(line, message):
    conversation, parrot = talk(system="Be brief.")
    with pytest.raises(ValueError, match=message):
        conversation.take(line)
    assert parrot.sampling == Sampling(temperature=0.7)
    assert [turn["content"] for turn in conversation.messages] == ["Be brief."]
    assert not parrot.asked


def test_the_system_message_changes_in_place_and_the_conversation_stays():
    _, parrot = talk("One", "/system Be brief.", "Two", "/system 短く。", "Three", "/system -", "Four")
    assert parrot.asked == [
        ["One"],
        ["Be brief.", "One", "answer 1", "Two"],
        ["短く。", "One", "answer 1", "Two", "answer 2", "Three"],
        ["One", "answer 1", "Two", "answer 2", "Three", "answer 3", "Four"],
    ]


def test_undo_again_and_reset():
    _, parrot = talk("One", "Two", "/again", "/undo", "Three", "/reset", "Four", "//etc?", system="S")
    assert parrot.asked == [
        ["S", "One"],
        ["S", "One", "answer 1", "Two"],
        ["S", "One", "answer 1", "Two"],
        ["S", "One", "answer 1", "Three"],
        ["S", "Four"],
        ["S", "Four", "answer 5", "/etc?"],
    ]


def test_an_unanswered_question_can_be_asked_again():
    conversation, parrot = talk("One")
    parrot.converse = lambda history, question: parrot.asked.append([question])  # answers nothing
    assert conversation.take("Two")
    assert conversation.take("/again")
    assert parrot.asked[1:] == [["Two"], ["Two"]]
    assert [turn["content"] for turn in conversation.messages] == ["One", "answer 1"]


def test_quit_ends_the_conversation():
    assert not talk()[0].take("/quit")
    assert not talk(completion=True)[0].take("/exit")


def test_help_lists_the_commands_that_work(capsys):
    talk("/help")
    of_talk = capsys.readouterr().err
    assert all(name in of_talk for name in ("/set NAME VALUE", "/system TEXT", "/again", "/undo", "/reset", "/quit"))
    conversation, _ = talk("/help", completion=True)
    assert "/system" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="/system is no command here"):
        conversation.take("/system x")


def test_the_model_may_be_the_first_argument(monkeypatch):
    seen = []
    monkeypatch.setattr(chat, "run", seen.append)
    chat.main(["runs/dpo", "--system", "S"])
    assert (seen[0].model, seen[0].system) == ("runs/dpo", "S")


class Terminal:
    """A process that reads questions at a pseudo-terminal and prints each as Python writes it."""

    def __init__(self, history: Path | str, **environment: str) -> None:
        program = (
            "import sys; from recipes.chat_lines import questions\n"
            "for line in questions(sys.argv[1]): print('got', ascii(line), flush=True)"
        )
        self.main, side = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LC_") and name != "LANG"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(history)],
            cwd=ROOT,
            stdin=side,
            stdout=side,
            stderr=side,
            env={**kept, "TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONPATH": str(ROOT), **environment},
            start_new_session=True,
        )
        os.close(side)
        self.shown = b""
        self.until(b"> ")

    def until(self, text: bytes) -> None:
        """Read up to the text."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.main], [], [], 1)[0]:
                self.shown += os.read(self.main, 4096)
        self.shown = self.shown.split(text, 1)[1]

    def type(self, keys: str, shows: str) -> None:
        os.write(self.main, keys.encode())
        self.until(b"got " + ascii(shows).encode())
        self.until(b"> ")

    def end(self) -> None:
        os.write(self.main, b"\x04")
        assert self.process.wait(60) == 0
        os.close(self.main)


LEFT, BACKSPACE, UP = "\x1b[D", "\x7f", "\x1b[A"


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_japanese_text_is_edited_by_characters(locale):
    """Also where the locale knows bytes only."""
    terminal = Terminal("", LC_ALL=locale)
    terminal.type(f"日本語です{LEFT}{LEFT}{BACKSPACE}人\r", "日本人です")
    terminal.type(f"🦁é{BACKSPACE}\r", "🦁")
    terminal.end()


def test_the_history_comes_back_in_the_next_conversation(tmp_path):
    file = tmp_path / "state" / "history"
    first = Terminal(file, LC_ALL="C.UTF-8")
    first.type("日本の首都は？\r", "日本の首都は？")
    first.end()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    second = Terminal(file, LC_ALL="C.UTF-8")
    second.type(f"{UP}\r", "日本の首都は？")
    second.end()


def test_a_history_that_cannot_be_written_is_a_remark(tmp_path):
    (tmp_path / "file").touch()
    terminal = Terminal(tmp_path / "file" / "history", LC_ALL="C.UTF-8")
    terminal.type("Hello\r", "Hello")
    os.write(terminal.main, b"\x04")
    terminal.until(b"--history names another file]")
    assert terminal.process.wait(60) == 0
