"""The chat recipe: its output, its memory of the conversation, its end."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipes.chat as chat
from model.config import MistralConfig
from model.generate import generate
from model.mistral import Mistral, initialize
from model.sampling import Sampling
from model.vocabulary.chat import encode_prompt
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import load_model, save_model

CONFIG = MistralConfig(
    vocab_size=32128,
    unpadded_vocab_size=32000,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sliding_window=8,
    max_position_embeddings=200,
    initializer_range=0.5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported model with Mistral's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model = Mistral(CONFIG)
    initialize(model, 0)
    save_model(model, path)
    write_tokenizer_folder(path, mistral_tokenizer_path().read_bytes())
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(mistral_tokenizer_path())


@pytest.fixture(scope="module")
def silent_model() -> Mistral:
    with torch.device("meta"):
        return Mistral(CONFIG)


@pytest.fixture
def scripted(monkeypatch, silent_model, tokenizer):
    """scripted(*answers) -> (speaker, prompts): the model gives the answers in turn, and `prompts` collects its prompts.

    An answer is a text, which ends as the chat template ends it, or a list of tokens, where KeyboardInterrupt is raised.
    """

    def build(*answers, **changes):
        prompts, script = [], iter(answers)

        def speak(model, prompt_ids, sampling, *, stop_ids, past):
            prompts.append(prompt_ids)
            answer = next(script)
            tokens = [*tokenizer.encode(f"{answer} "), tokenizer.eos_id] if isinstance(answer, str) else answer
            for token in tokens:
                if token is KeyboardInterrupt:
                    raise KeyboardInterrupt
                yield token

        monkeypatch.setattr("model.generate.generate", speak)
        silent_model.config = replace(CONFIG, **changes)
        return chat.Speaker(silent_model, tokenizer, Sampling(max_new_tokens=50)), prompts

    return build


def messages(*contents: str, system: str | None = None) -> list:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def talk(monkeypatch, text: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.main([*arguments, "--device", "cpu"])


@pytest.mark.parametrize("system", [None, "あなたは親切です。"])
def test_an_answer_is_what_transformers_generates_from_the_same_folder(folder, capsys, system):
    arguments = [] if system is None else ["--system", system]
    chat.main(
        [
            "--model",
            str(folder),
            "--prompt",
            "日本の首都は？",
            "--device",
            "cpu",
            "--sampling.temperature",
            "0",
            "--sampling.max-new-tokens",
            "20",
            *arguments,
        ]
    )
    shown = capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = theirs.apply_chat_template(messages("日本の首都は？", system=system), return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=20, pad_token_id=2)
    answer = theirs.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(answer) > 20
    assert shown == answer.strip(" ") + "\n"


def test_each_prompt_holds_the_whole_conversation_so_far(scripted, tokenizer, capsys):
    speaker, prompts = scripted("Tokyo, 東京.", "Kyoto.", "Nara.")
    history = messages(system="Be brief.")
    for question in ("Where?", "And before?", "And before that?"):
        speaker.converse(history, question)
    assert capsys.readouterr().out == "Tokyo, 東京.\nKyoto.\nNara.\n"
    everything = messages("Where?", "Tokyo, 東京.", "And before?", "Kyoto.", "And before that?", "Nara.", system="Be brief.")
    assert history == everything
    assert prompts == [encode_prompt(tokenizer, everything[:end]) for end in (2, 4, 6)]


def test_text_streams_in_whole_characters(scripted, monkeypatch, capsys):
    speaker, _ = scripted("Hi 🦁 there")
    shown = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: shown.append("".join(text)))
    speaker.converse([], "Hello")
    assert "".join(shown) == "Hi 🦁 there"
    assert len([piece for piece in shown if piece]) >= 3
    assert not any("\ufffd" in piece for piece in shown)


def test_an_interrupted_answer_stays_in_the_conversation_up_to_the_interruption(scripted, tokenizer, monkeypatch, capsys):
    whole = tokenizer.encode("One two three")
    speaker, prompts = scripted([*whole[:2], KeyboardInterrupt], [KeyboardInterrupt], "Four.")
    monkeypatch.setattr(chat, "Speaker", lambda *_, **__: speaker)
    monkeypatch.setattr("engine.inference.opening.open_model", lambda *_: (Path(), tokenizer, None))
    talk(monkeypatch, "Count\nOn\nOn!\n", "--model", ".")
    output = capsys.readouterr()
    assert output.out == "One two\n\nFour.\n"
    assert output.err.count("[answer stopped]") == 2
    # The second question got no answer, so it is not part of the conversation.
    assert prompts[-1] == encode_prompt(tokenizer, messages("Count", "One two", "On!"))


def test_ctrl_c_ends_a_single_answer_with_the_shells_status(scripted, tokenizer, monkeypatch, capsys):
    speaker, _ = scripted([*tokenizer.encode("One"), KeyboardInterrupt])
    monkeypatch.setattr(chat, "Speaker", lambda *_, **__: speaker)
    monkeypatch.setattr("engine.inference.opening.open_model", lambda *_: (Path(), tokenizer, None))
    with pytest.raises(SystemExit) as ended:
        chat.main(["--model", ".", "--device", "cpu", "--prompt", "Count"])
    assert ended.value.code == 130
    assert capsys.readouterr().out == "One\n"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_input_and_ctrl_c_at_the_question_end_the_conversation(monkeypatch, end):
    lines = iter(["first", "   ", "", "second"])

    def ask(_):
        for line in lines:
            return line
        raise end

    monkeypatch.setattr("builtins.input", ask)
    assert list(chat.questions()) == ["first", "second"]


def test_an_empty_answer_is_not_part_of_the_conversation(scripted, capsys):
    speaker, _ = scripted("", " \n", "Yes.")
    history = []
    speaker.converse(history, "Are you there?")
    speaker.converse(history, "Hello?")
    assert history == []
    assert capsys.readouterr().err.count("ended its answer at once") == 2
    speaker.converse(history, "Hello??")
    assert history == messages("Hello??", "Yes.")


def test_a_conversation_that_outgrows_the_model_forgets_its_oldest_exchanges(scripted, tokenizer, capsys):
    """200 positions, 50 of them for the answer."""
    speaker, prompts = scripted(*(f"Answer {i}." for i in range(12)))
    history, everything = messages(system="Be brief."), messages(system="Be brief.")
    for i in range(12):
        speaker.converse(history, f"Question {i}?")
        everything += messages(f"Question {i}?", f"Answer {i}.")
        assert len(prompts[-1]) <= 150
        assert history[0] == everything[0]
        # The newest exchanges stay; one more would not fit.
        assert history[1:] == everything[len(everything) - len(history) + 1 :]
        if len(history) < len(everything):
            longer = [everything[0], *everything[len(everything) - len(history) - 1 : -1]]
            assert len(encode_prompt(tokenizer, longer)) > 150
    assert 4 < len(history) < len(everything)
    assert "the oldest 2 messages are left out" in capsys.readouterr().err


def test_a_question_that_is_too_long_by_itself_is_refused_and_the_conversation_goes_on(scripted, capsys):
    speaker, _ = scripted("Yes.", "Still here.")
    history = messages(system="Be brief.")
    speaker.converse(history, "Ready?")
    before = list(history)
    with pytest.raises(ValueError, match=r"system message and question take \d+ tokens; the model has room for 150 beside"):
        speaker.converse(history, "why " * 200)
    assert history == before
    speaker.converse(history, "And now?")
    assert history[-1]["content"] == "Still here."
    with pytest.raises(ValueError, match=r"the question takes \d+ tokens; the model has room for 150"):
        speaker.converse([], "why " * 200)


def test_errors_of_one_question_are_remarks_in_a_conversation_and_fatal_for_a_single_answer(folder, monkeypatch, capsys):
    arguments = ["--model", str(folder), "--sampling.max-new-tokens", "3"]
    talk(monkeypatch, "why " * 200 + "\nHello\n", *arguments)
    output = capsys.readouterr()
    assert "[error: the question takes" in output.err
    assert output.out.strip()
    with pytest.raises(SystemExit, match="error: the question takes"):
        chat.main([*arguments, "--device", "cpu", "--prompt", "why " * 200])
    with pytest.raises(SystemExit, match=r"error: message 1 \(user\) is empty"):
        chat.main([*arguments, "--device", "cpu", "--prompt", ""])


def test_a_completion_continues_the_text_and_keeps_its_spaces(scripted, tokenizer, capsys):
    speaker, prompts = scripted(tokenizer.encode("of Japan is")[:2])
    speaker.complete("The capital")
    assert capsys.readouterr().out == "The capital of Japan\n"
    assert prompts == [[tokenizer.bos_id, *tokenizer.encode("The capital")]]


def test_an_empty_text_can_be_completed(folder, capsys):
    chat.main(["--model", str(folder), "--device", "cpu", "--completion", "--prompt", "", "--sampling.max-new-tokens", "5"])
    assert len(capsys.readouterr().out.strip()) > 1


def test_a_cut_answer_is_reported_and_speed_is_printed_on_request(folder, monkeypatch, capsys):
    arguments = ["--model", str(folder), "--sampling.max-new-tokens", "4", "--prompt", "Hello", "--device", "cpu"]
    chat.main(arguments)
    quiet = capsys.readouterr().err
    assert "[cut after 4 tokens" in quiet
    assert "tokens/s" not in quiet
    chat.main([*arguments, "--show-speed"])
    assert " + 4 tokens: the first after " in capsys.readouterr().err


def test_a_seed_repeats_a_conversation_and_each_answer_draws_anew(folder, monkeypatch, capsys):
    arguments = ["--model", str(folder), "--sampling.max-new-tokens", "12", "--sampling.temperature", "20"]
    shown = []
    for seed in ("1", "1", "2"):
        talk(monkeypatch, "Hello\nHello\n", *arguments, "--sampling.seed", seed)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]
    # At this temperature all tokens are nearly equally likely, so equal draws would give equal answers.
    first, second = shown[0].split("\n")[:2]
    assert first != second


@pytest.mark.parametrize("completion", [False, True])
def test_choices_are_the_answers_of_as_many_seeds(folder, tokenizer, capsys, completion):
    arguments = ["--model", str(folder), "--prompt", "Once upon", "--device", "cpu", "--sampling.max_new_tokens", "9"]
    arguments += ["--completion"] if completion else ["--system", "Be brief."]
    alone = []
    for seed in range(3, 8):
        chat.main([*arguments, "--sampling.seed", str(seed)])
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    chat.main([*arguments, "--sampling.seed", "3", "--choices", "5"])
    assert capsys.readouterr().out == "".join(f"[{number}] {text}\n" for number, text in enumerate(alone, 1))


def test_a_run_folder_means_its_newest_checkpoint(folder, tmp_path, capsys):
    (tmp_path / "step-00000020").symlink_to(folder)
    (tmp_path / "step-00000010").mkdir()
    arguments = ["--device", "cpu", "--prompt", "Hello", "--sampling.max-new-tokens", "5"]
    chat.main(["--model", str(tmp_path), *arguments])
    of_the_run = capsys.readouterr().out
    chat.main(["--model", str(folder), *arguments])
    assert capsys.readouterr().out == of_the_run


def test_undeclared_padding_rows_are_not_sampled(folder, tmp_path, monkeypatch):
    """Also not by a repetition penalty, which marks tokens in a row of the vocabulary's size."""
    padded = shutil.copytree(folder, tmp_path / "padded")
    table = json.loads((padded / "config.json").read_text())
    del table["unpadded_vocab_size"]
    (padded / "config.json").write_text(json.dumps(table))
    seen = []
    monkeypatch.setattr(chat.Speaker, "converse", lambda speaker, *_: seen.append(speaker.model))
    chat.main(["--model", str(padded), "--prompt", "a", "--device", "cpu"])
    assert (seen[0].config.unpadded_vocab_size, seen[0].lm_head.pieces) == (32000, 32000)


def test_a_tokenizer_of_another_size_is_refused(folder, tiny_tokenizer, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    write_tokenizer_folder(other, (tiny_tokenizer / "tokenizer.model").read_bytes())
    with pytest.raises(SystemExit, match="rows for 32,000 pieces, the tokenizer has 340"):
        chat.main(["--model", str(other), "--prompt", "a", "--device", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-folder"], "error: no-such-folder: no such folder"),
        (["--model", "."], "error: no tokenizer at"),
    ],
)
def test_a_wrong_folder_gives_one_clear_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        chat.main([*arguments, "--device", "cpu", "--prompt", "Hello"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--completion", "--system", "Be brief."], "system has no effect with completion"),
        (["--sampling.temperature", "0", "--sampling.top-p", "0.9"], "top_p = 0.9 has no effect with temperature = 0"),
        (["--sampling.top-p", "2"], "top_p = 2.0: must lie in"),
        (["--choices", "3"], "choices = 3 answers one prompt several times: add --prompt"),
        (["--choices", "3", "--prompt", "a", "--sampling.temperature", "0"], "choices = 3 would all be the same"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        chat.main(["--model", "anything", *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@given(st.lists(st.text(alphabet=" a\n", max_size=4)))
def test_outer_spaces_are_dropped_and_other_text_is_kept(pieces):
    shown = list(chat.without_outer_spaces(pieces))
    assert "".join(shown) == "".join(pieces).strip(" ")
    assert all(shown)


def test_spaces_are_held_back_only_until_text_follows():
    stream = chat.without_outer_spaces(iter([" ", "  One", " ", "two ", " ", "\n", " "]))
    assert list(stream) == ["One", " two", "  \n"]


def test_an_answer_stops_at_every_end_that_generation_config_names(folder, tmp_path, tokenizer, capsys):
    arguments = ["--prompt", "Hello", "--device", "cpu", "--sampling.temperature", "0", "--sampling.max-new-tokens", "20"]
    model = load_model(folder)
    prompt = encode_prompt(tokenizer, messages("Hello"))
    ids = list(generate(model, prompt, Sampling(temperature=0.0, max_new_tokens=20), stop_ids=[tokenizer.eos_id]))
    place = next(place for place in range(4, 20) if ids[place] not in ids[:place])
    ending = shutil.copytree(folder, tmp_path / "ending")
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, ids[place]]}))
    chat.main(["--model", str(ending), *arguments])
    shown = capsys.readouterr()
    assert (
        shown.out.strip() == tokenizer.decode(ids[:place]).strip()
        or shown.out.strip() == tokenizer.decode(ids[: place + 1]).strip()
    )
    assert "[cut after" not in shown.err
    chat.main(["--model", str(folder), *arguments])
    assert len(capsys.readouterr().out) > len(shown.out)


def test_it_runs_as_a_module_on_piped_questions(folder):
    command = [sys.executable, "-m", "recipes.chat", "--model", str(folder), "--device", "cpu"]
    ended = subprocess.run(
        [*command, "--sampling.max-new-tokens", "3"],
        cwd=Path(__file__).parents[2],
        input="Hello\nAgain\n",
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("[cut after 3 tokens") == 2
    assert ended.stdout


def test_a_preset_has_nothing_to_say():
    with pytest.raises(SystemExit, match=r"error: preset:tiny: a preset has no weights and no tokenizer; name a folder"):
        chat.main(["--model", "preset:tiny", "--device", "cpu"])
