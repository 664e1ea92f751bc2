"""A folder in an endpoint's place: its answers are those of generation, drawn again the same way."""

import shutil
import time
from pathlib import Path

import pytest

from engine.inference.asking import Answer, Asker, ChatRequest, Unanswered
from engine.inference.endpoint import Endpoint, EndpointSettings, open_responder
from engine.inference.local import LocalModel, cut_at, read_parameters
from model.generate import generate
from model.sampling import Sampling
from model.vocabulary.chat import encode_prompt


@pytest.fixture(scope="module")
def model(tiny_model) -> LocalModel:
    return LocalModel(str(tiny_model), device="cpu")


def user(text: str) -> list:
    return [{"role": "user", "content": text}]


def test_an_answer_is_what_generation_gives(model, tmp_path):
    with Asker(tmp_path / "journal") as asker:
        requests = [ChatRequest(user(text), {"temperature": 0, "max_tokens": 6}) for text in ("the cat", "ねこ は", "it runs")]
        answers = asker.ask_all(model, requests)
    for request, answer in zip(requests, answers, strict=True):
        prompt = encode_prompt(model.tokenizer, request.messages)
        ends = {model.tokenizer.eos_id}
        ids = list(generate(model._model, prompt, Sampling(temperature=0, max_new_tokens=6), stop_ids=ends))
        assert answer == Answer(
            model.tokenizer.decode([token for token in ids if token not in ends]).strip(" "),
            "stop" if ids[-1] in ends else "length",
            len(prompt),
            len(ids),
        )


def test_draws_differ_and_each_is_drawn_again_the_same_way(model, tmp_path):
    requests = [ChatRequest(user("the cat"), {"max_tokens": 8}, draw) for draw in range(4)]
    texts = []
    for journal in ("one", "two"):
        with Asker(tmp_path / journal) as asker:
            texts.append([answer.text for answer in asker.ask_all(model, requests)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    with Asker(tmp_path / "seeds") as asker:
        seeded = [
            ChatRequest(user("the cat"), {"max_tokens": 8, "seed": seed}, draw) for seed, draw in ((3, 0), (3, 1), (4, 0))
        ]
        one, same, other = (answer.text for answer in asker.ask_all(model, seeded))
    assert one == same != other


def test_an_answer_ends_before_a_stop_text(model, tmp_path):
    with Asker(tmp_path / "journal") as asker:
        [whole] = asker.ask_all(model, [ChatRequest(user("the cat"), {"temperature": 0, "max_tokens": 30})])
        word = whole.text[len(whole.text) // 2 :][:3]
        [cut] = asker.ask_all(model, [ChatRequest(user("the cat"), {"temperature": 0, "max_tokens": 30, "stop": [word]})])
    assert cut.text == whole.text[: whole.text.index(word)].strip(" ")
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < whole.completion_tokens
    assert cut_at("abcabc", ["ca", "bc"]) == "a"


def test_what_one_request_got_wrong_fails_alone_and_wrong_settings_end_the_run(model, tmp_path):
    with Asker(tmp_path / "journal") as asker:
        wrong = [ChatRequest([{"role": "assistant", "content": "a"}]), ChatRequest(user("the cat " * 100))]
        outcomes = asker.ask_all(model, [*wrong, ChatRequest(user("it"), {"max_tokens": 2})])
        assert [type(outcome) for outcome in outcomes] == [Unanswered, Unanswered, Answer]
        assert "leaves no room for an answer; shorten it" in str(outcomes[1])
        with pytest.raises(
            ValueError, match="temprature: no parameter of generation in this process; the nearest one is temperature"
        ):
            asker.ask_all(model, [ChatRequest(user("it"), {"temprature": 1})])
    with Asker(tmp_path / "journal") as asker, pytest.raises(ValueError, match="top_p = 2: must lie in"):
        asker.ask_all(model, [ChatRequest(user("it"), {"top_p": 2})])


def test_parameters_have_the_samplers_meaning():
    sampling, stop = read_parameters({"max_tokens": 5, "min_p": 0.1, "stop": "x", "temperature": None}, 7)
    assert (sampling, stop) == (Sampling(max_new_tokens=5, min_p=0.1, seed=7), ("x",))
    # Greedy: the filters change nothing.
    assert read_parameters({"temperature": 0, "top_p": 0.9}, 7)[0] == Sampling(temperature=0, seed=7)


def test_a_folder_of_other_weights_is_another_model_to_the_journal_and_a_copied_file_is_not(tiny_model, model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    first = LocalModel(str(folder), device="cpu").model
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert LocalModel(str(folder), device="cpu").model == first
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert LocalModel(str(folder), device="cpu").model != first


def test_settings_without_an_address_name_a_folder(tiny_model, model):
    assert open_responder(EndpointSettings(model=str(tiny_model), device="cpu")).model == model.model
    assert isinstance(open_responder(EndpointSettings(model="m", url="http://127.0.0.1:1/v1")), Endpoint)
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        open_responder(EndpointSettings(model="no-such-folder"))


def test_a_run_that_stops_begins_no_further_answer_and_leaves_nobody_waiting(model, tmp_path):
    with Asker(tmp_path / "journal") as asker:

        async def job(number: int) -> str:
            answer = await asker.ask(model, ChatRequest(user("the cat"), {"max_tokens": 40}, number))
            if number == 3:
                raise ZeroDivisionError
            return answer.text

        with pytest.raises(ZeroDivisionError):
            list(asker.run(job, range(200)))
        assert 0 < asker.given < 200
        given = asker.given
        # The model goes on for a run that follows.
        assert len(asker.ask_all(model, [ChatRequest(user("the cat"), {"max_tokens": 40}, 0)])) == 1
        assert asker.given == given
        assert len(asker.ask_all(model, [ChatRequest(user("the dog"), {"max_tokens": 4})])) == 1


def test_a_second_ctrl_c_does_not_wait_for_whole_answers(model, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    def endless(model, prompts):
        [prompt] = prompts
        while True:
            prompt.ends(5)
            time.sleep(0.001)
            yield from ()

    monkeypatch.setattr("engine.inference.generation.answers", endless)
    asker = Asker(tmp_path / "journal")
    asker._loop.call_later(0.1, interrupt)
    with pytest.raises(KeyboardInterrupt), asker:
        asker.ask_all(model, [ChatRequest(user("the cat"))])


def test_scores_that_are_not_finite_end_the_run(tiny_model, tmp_path):
    broken = LocalModel(str(tiny_model), device="cpu")
    broken._model.lm_head.weight.data.fill_(float("nan"))
    with Asker(tmp_path / "journal") as asker, pytest.raises(ValueError, match="scores that are not finite"):
        asker.ask_all(broken, [ChatRequest(user(f"the cat {i}"), {"max_tokens": 4}) for i in range(50)])
