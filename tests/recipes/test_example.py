"""The embedded example: training data, questions, and the judgement of answers."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from model.config import read_config
from model.generate import generate
from model.mistral import Mistral, initialize, packed_attention
from model.sampling import Sampling
from model.vocabulary.chat import encode_chat, encode_prompt, render
from model.vocabulary.tokenizer import Tokenizer
from recipes.example import report
from recipes.example.evaluate import Outcome, Score, ask, score
from recipes.example.facts import FACT_RELATIONS, KINDS, LANGUAGES, PHRASINGS, SUM, all_facts, all_sums
from recipes.example.text import ExampleSettings, Question, conversations, make_example, phrases, write_example

ROOT = Path(__file__).resolve().parents[2]
REGISTERS = (True, False)


@pytest.fixture(scope="module")
def example():
    return make_example(ExampleSettings())


@pytest.fixture(scope="module")
def folder(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("example") / "files"
    write_example(folder, example)
    return folder


@pytest.fixture(scope="module")
def training_text(folder) -> str:
    """All training data in the form that the model sees: plain text, and conversations and pairs through the chat template."""
    texts = []
    for path in sorted(folder.glob("*.*")):
        if "heldout" in path.name:
            continue
        if path.suffix == ".txt":
            texts.append(path.read_text(encoding="utf-8"))
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            texts += [render(messages) for messages in messages_of(json.loads(line))]
    return "\n\n".join(texts)


def messages_of(record) -> list[list[dict[str, str]]]:
    if "messages" in record:
        return [record["messages"]]
    if "conversations" in record:
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        return [[{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]]
    prompt, *answers = (record[key] for key in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        answers = [[{"role": "assistant", "content": answer}] for answer in answers]
    return [prompt + answer for answer in answers]


def stands_in(sentence: str, text: str) -> bool:
    """Whether a sentence is in a text; a number at its end must not be a part of a longer number."""
    place = text.find(sentence)
    while place >= 0:
        end = place + len(sentence)
        if not text[max(0, place - 1) : place].isdigit() and not text[end : end + 1].isdigit():
            return True
        place = text.find(sentence, place + 1)
    return False


def spellings(question: Question) -> list[str]:
    """The question with its answer, in every form that training could use."""
    return [
        question.document,
        *(f"{question.text} [/INST] {question.answer(polite)} </s>" for polite in REGISTERS),
    ]


def test_no_evaluated_question_is_in_the_training_data(example, training_text):
    for question in example.held_out + example.unseen:
        assert not any(stands_in(spelling, training_text) for spelling in spellings(question)), question
        # The question alone, with any answer, is absent, too.
        assert not stands_in(question.text, training_text), question.text


def test_the_same_search_finds_every_trained_question(example, training_text):
    for question in example.trained:
        text, *chats = spellings(question)
        assert stands_in(text, training_text)
        assert any(stands_in(chat, training_text) for chat in chats)
        assert stands_in(question.text, training_text)


def test_unseen_sums_are_nowhere_and_unasked_facts_are_in_statements_only(example, training_text):
    unseen = {question.item.name: question.item for question in example.unseen}
    assert sorted(item.kind for item in unseen.values()) == ["fact"] * 8 + ["sum"] * 12
    for item in unseen.values():
        for language in LANGUAGES:
            statements = [item.statement(language, form) for form in range(len(item.relation.statements[language]))]
            asked = [item.question(language, phrasing) for phrasing in range(PHRASINGS)]
            assert not any(stands_in(text, training_text) for text in asked)
            assert all(stands_in(text, training_text) == (item.kind == "fact") for text in statements)


def test_the_split_is_a_latin_square_of_items_and_phrasings(example):
    cells = {(q.item.name, q.language, q.phrasing) for q in example.trained}
    asked = {(q.item.name, q.language, q.phrasing) for q in example.held_out}
    assert len(cells) == len(example.trained)
    assert len(asked) == len(example.held_out)
    assert not cells & asked
    names = {name for name, _, _ in asked}
    everything = {(name, language, p) for name in names for language in LANGUAGES for p in range(PHRASINGS)}
    assert cells | asked == everything
    for name in names:
        for language in LANGUAGES:
            assert len([cell for cell in asked if cell[:2] == (name, language)]) == 1
    for relation in (*FACT_RELATIONS, SUM):
        for language in LANGUAGES:
            trained = {q.phrasing for q in example.trained if q.item.relation is relation and q.language == language}
            held = {q.phrasing for q in example.held_out if q.item.relation is relation and q.language == language}
            assert trained == held == set(range(PHRASINGS))


def test_languages_and_kinds_are_covered_evenly(example):
    counts = {(la, kind): 0 for la in LANGUAGES for kind in KINDS}
    for question in example.held_out:
        counts[question.language, question.item.kind] += 1
    assert counts["en", "fact"] == counts["ja", "fact"] == 62
    assert counts["en", "sum"] == counts["ja", "sum"] == 84
    sentences = sum(len(messages) // 2 for la in LANGUAGES for messages in conversations(example, la))
    assert sentences > 2000


def test_sums_are_right_and_facts_are_distinct():
    for item in all_sums(12, 8):
        fields = item.fields["en"]
        assert int(fields["v"]) == int(fields["a"]) + int(fields["b"])
    for relation in FACT_RELATIONS:
        for language in (0, 1):
            subjects = [fact[language][0] for fact in relation.facts]
            assert len(set(subjects)) == len(subjects)
    names = [item.name for item in all_facts() + all_sums(12, 8)]
    assert len(set(names)) == len(names)
    questions = [item.question(la, p) for item in all_facts() for la in LANGUAGES for p in range(PHRASINGS)]
    assert len(set(questions)) == len(questions)


def test_registers_differ_in_politeness_alone(example):
    for question in example.held_out:
        polite, plain = (question.answer(register) for register in REGISTERS)
        assert question.item.value(question.language) in polite
        assert question.item.value(question.language) in plain
        if question.language == "en":
            assert polite == plain.removesuffix(".") + ", thank you for asking."
        else:
            assert polite.removesuffix("です。") == plain.removesuffix("だ。")


def test_the_conversations_hold_both_registers_and_some_system_messages(example):
    for language in LANGUAGES:
        chats = conversations(example, language)
        answers = [m["content"] for chat in chats for m in chat if m["role"] == "assistant"]
        ending = "thank you for asking." if language == "en" else "です。"
        assert 0.3 < sum(answer.endswith(ending) for answer in answers) / len(answers) < 0.4
        assert 0.15 < sum(chat[0]["role"] == "system" for chat in chats) / len(chats) < 0.25
        assert {sum(m["role"] == "user" for m in chat) for chat in chats} == {1, 2, 3}


def test_the_vocabulary_text_is_all_japanese_cut_at_word_borders(example):
    texts = set(phrases(example, "ja"))
    for item in example.told:
        assert item.value("ja") in texts
    assert {"です。", "だ。", "の首都はどこですか？"} <= texts


def test_files_are_a_function_of_the_settings(folder, tmp_path):
    """Another process with another hash seed writes the same bytes; another seed writes others."""
    script = "import sys; from recipes.example.__main__ import main; main(['--out', sys.argv[1]])"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "again")], cwd=ROOT, env=environment, check=True)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) > 13
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    write_example(tmp_path / "other", make_example(ExampleSettings(seed=21)))
    for name in ("text_en.txt", "chat_ja.jsonl", "pairs_en.jsonl", "text_ja_heldout.txt"):
        assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": 5}, r"example.unasked_facts = 8: must lie in 0 .. 4, as there are 5 facts"),
        ({"largest_first": 3, "largest_second": 4}, r"example.unseen_sums = 12: must lie in 0 .. 11"),
        ({"polite_share": 1.5}, r"example.polite_share = 1.5: must lie in 0 .. 1"),
        ({"preferences": 0}, r"example.preferences = 0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExampleSettings(**changes)


def test_an_existing_folder_is_replaced_only_on_request(example, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        write_example(tmp_path / "mine", example)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    write_example(tmp_path / "mine", example, overwrite=True)
    assert not (tmp_path / "mine" / "notes.txt").exists()


@pytest.fixture(scope="module")
def learned(tiny_model, example):
    """A model trained for a moment on some held-out questions: some of its answers are exact."""
    tokenizer = Tokenizer.load(tiny_model)
    config = dataclasses.replace(read_config(tiny_model), sliding_window=None, max_position_embeddings=512)
    model = Mistral(config)
    initialize(model, 2)
    english, japanese = ([q for q in example.held_out if q.language == language] for language in LANGUAGES)
    questions = english[::12] + japanese[::30]
    documents = []
    for index, question in enumerate(questions[: len(questions) * 3 // 4]):
        documents += [chat_ids(tokenizer, question, polite=index % 2 == 0), text_ids(tokenizer, question)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        (-token_log_probs(model, documents).sum()).backward()
        optimizer.step()
    return model, tokenizer, questions


def chat_ids(tokenizer, question, polite):
    turns = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer(polite)}]
    return encode_chat(tokenizer, turns).ids


def text_ids(tokenizer, question):
    return [tokenizer.bos_id, *tokenizer.encode(question.document), tokenizer.eos_id]


def token_log_probs(model, documents):
    """Log-probability of every token but the first of each document, given the tokens before it: [predicted tokens]."""
    lengths = [len(ids) - 1 for ids in documents]
    tokens = torch.tensor([id for ids in documents for id in ids[:-1]])
    labels = torch.tensor([id for ids in documents for id in ids[1:]])
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    hidden = model(tokens, positions, packed_attention(bounds, None))
    return model.logits(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]


@pytest.mark.slow
def test_exact_agrees_with_greedy_generation(learned):
    model, tokenizer, questions = learned
    sampling = Sampling(temperature=0.0, max_new_tokens=120)

    def says(prompt: list[int], expected: list[int]) -> bool:
        return list(generate(model, prompt, sampling, stop_ids=(tokenizer.eos_id,))) == expected

    found = set()
    for outcome in ask(model, tokenizer, questions, chat=True):
        question = outcome.question
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": question.text}])
        said = {polite: says(prompt, chat_ids(tokenizer, question, polite)[len(prompt) :]) for polite in REGISTERS}
        assert outcome.exact == any(said.values())
        assert outcome.polite == said[True]
        found.add((outcome.exact, outcome.polite))
    assert found == {(True, True), (True, False), (False, False)}

    exact = []
    for outcome in ask(model, tokenizer, questions, chat=False):
        prompt = [tokenizer.bos_id, *tokenizer.encode(outcome.question.prompt)]
        assert outcome.exact == says(prompt, text_ids(tokenizer, outcome.question)[len(prompt) :])
        assert not outcome.polite
        exact.append(outcome.exact)
    assert 0 < sum(exact) < len(exact)


def test_loss_is_minus_log_of_the_accepted_answers_total_probability(learned):
    model, tokenizer, questions = learned

    def log_prob(ids: list[int], start: int) -> torch.Tensor:
        return token_log_probs(model, [ids])[start - 1 :].sum().double()

    with torch.no_grad():
        for outcome in ask(model, tokenizer, questions, chat=True):
            question = outcome.question
            start = len(encode_prompt(tokenizer, [{"role": "user", "content": question.text}]))
            probability = sum(log_prob(chat_ids(tokenizer, question, polite), start).exp() for polite in REGISTERS)
            assert outcome.loss == pytest.approx(-float(probability.log()), rel=1e-4)
        for outcome in ask(model, tokenizer, questions, chat=False):
            start = 1 + len(tokenizer.encode(outcome.question.prompt))
            expected = -float(log_prob(text_ids(tokenizer, outcome.question), start))
            assert outcome.loss == pytest.approx(expected, rel=1e-4)


def test_scores_count_questions_and_judge_politeness_by_exact_answers(example):
    facts = [q for q in example.held_out if q.language == "ja" and q.item.kind == "fact"][:4]
    outcomes = [
        Outcome(facts[0], 1.0, True, True),
        Outcome(facts[1], 2.0, True, False),
        Outcome(facts[2], 3.0, False, False),
        Outcome(facts[3], 6.0, False, False),
    ]
    assert score(outcomes) == {("ja", "fact"): Score(4, 3.0, 0.5, 0.5)}
    assert score(outcomes[2:])["ja", "fact"].polite is None
    scores = {
        ("en", "fact"): Score(10, 0.0, 0.5, 0.4),
        ("en", "sum"): Score(30, 0.0, 0.1, None),
        ("ja", "sum"): Score(1, 0.0, 0.0, None),
    }
    assert report.language_share(scores, "en", "exact") == pytest.approx(8 / 40)
    assert report.language_share(scores, "en", "polite") == pytest.approx(2 / 8)
    assert report.language_share(scores, "ja", "polite") is None


@pytest.mark.parametrize(
    ("sft1", "sft2", "after", "expected"),
    [
        (0.9, 0.85, 0.6, []),
        (0.9, 0.84, 0.6, ["English lost 6.0 points in SFT 2, more than 5"]),
        (
            0.8,
            0.79,
            0.6,
            [
                f"{name} are 79.0% exact after SFT 2, below 80%"
                for name in ("English facts", "English sums", "Japanese facts", "Japanese sums")
            ],
        ),
        (
            0.9,
            0.9,
            0.3,
            [
                "the share of polite English answers did not rise in DPO",
                "the share of polite Japanese answers did not rise in DPO",
            ],
        ),
    ],
)
def test_missed_targets_are_named(sft1, sft2, after, expected):
    def model(exact: float, polite: float):
        return {"held_out": {(la, kind): Score(100, 0.0, exact, polite) for la in LANGUAGES for kind in KINDS}}

    models = {"SFT 1": model(sft1, 0.3), "SFT 2": model(sft2, 0.3), "DPO": model(sft2, after)}
    assert report.missed_targets(models) == expected
