"""The detector marks foreign text without a reason, and leaves alone what has one."""

import gzip
import json
import random
import re

import pytest

from recipes.evaluation.leakage.detector import detect
from recipes.evaluation.leakage.languages import asked_language


def ask(question, system=None):
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]


def marked(question, response):
    return [response[start:end] for start, end in detect(ask(question), response).spans]


JA, EN = "日本の夏について教えてください。", "Tell me about summer in Japan."


@pytest.mark.parametrize(
    ("question", "response", "spans"),
    [
        (EN, "It is hot and 湿気 is everywhere.", ["湿気"]),
        (EN, "Because it always leaves aコース-less golfer.", ["コース"]),
        (EN, "Many people visit the coast. 多くの人が海へ行きます。", ["多くの人が海へ行きます"]),
        (EN, "People like ледяной tea and 수박 very much.", ["ледяной", "수박"]),
        (EN, "The weather ร้อน makes people tired.", ["ร้อน"]),
        (EN, "1. Aマイスター: the main figure of the story.", ["マイスター"]),
        (EN, "It is hot.\n```\nここに貼り付けます\n```", ["ここに貼り付けます"]),
        (JA, "夏は暑く、使用наются扇風機が多いです。", ["наются"]),
        (JA, "命运は変わりません。首先、水を飲みましょう。", ["运", "首先"]),
        (JA, "人々は木を守るために trees を植えます。", ["trees"]),
        (JA, "意思決定makingが大切です。", ["making"]),
        (
            JA,
            "夏は暑いです。In summer many people go to the beach and swim. 海は青いです。",
            ["In summer many people go to the beach and swim"],
        ),
        (JA, "夏は더운暑いです。", ["더운"]),
        (JA, "夏は暑\ufffd\ufffdいです。", ["\ufffd\ufffd"]),
        (JA, "成本管理が大切です。", ["成本"]),
        (JA, "夏は热くて、一种の祭りです。", ["热", "种"]),
        ("レインボーブリッジの工事は？", "Rainbow Bridgeは東京にあります。", ["Rainbow Bridge"]),
        (JA, "Foggy morningsは、山の朝です。", ["Foggy mornings"]),
        (JA, "どういうStepsがあるかを考えます。", ["Steps"]),
        (JA, "Dear [友人],\n夏の会のお知らせです。", ["Dear"]),
        (JA, "住宅のフurnitureを選びます。", ["urniture"]),
        ("여름에 대해 알려 주세요.", "여름은 とても 덥습니다.", ["とても"]),
        ("Расскажи о лете.", "Летом очень 热, и люди едут на море.", ["热"]),
        ("请介绍一下日本的夏天。", "日本的夏天很热，とても人们喜欢去海边。", ["とても"]),
    ],
)
def test_foreign_text_without_a_reason_is_marked(question, response, spans):
    assert marked(question, response) == spans


@pytest.mark.parametrize(
    ("question", "response"),
    [
        (JA, "In Japan the summer is hot and humid, and people go to the sea."),
        (EN, "日本の夏はとても暑いです。多くの人が海へ行きます。"),
        (EN, "El verano en Japón es muy húmedo. Las personas van a la playa para nadar con sus familias."),
        (EN, "Natsu wa totemo atsui desu kara minna umi ni ikimasu. Sore de mizu mo nomimasu."),
        ("Расскажи о лете.", "The summer is hot, and the people go to the sea."),
        ("Please answer in English: 日本の夏は？", "日本の夏はとても暑いです。"),
        ("夏について英語で答えてください。", "日本の夏はとても暑いです。多くの人が海へ行きます。"),
    ],
)
def test_a_whole_answer_in_the_wrong_language_is_one_span(question, response):
    assert marked(question, response) in ([response], [response.rstrip("。.")])


@pytest.mark.parametrize(
    ("question", "response"),
    [
        (EN, "The station (赤羽駅) opened in 1885. Its Japanese name: 赤羽駅."),
        (EN, 'The word "湿気" means moisture, and “蒸し暑い” means muggy.'),
        (EN, "1. 呪術廻戦\n2. Fate/Kaleid liner プリズマ☆イリヤ: a magical story\n3. Blue Note"),
        (EN, "Mötley Crüe plays in July. See https://example.jp/夏 and #夏 for π and 30 °C. ¯\\_(ツ)_/¯"),
        ("What does 湿気 mean?", "In summer 湿気 is moisture in the air."),
        ("How do you say summer in Japanese?", "You say 夏 and read it natsu."),
        ("Please translate this to Japanese: It is hot.", "暑いです。"),
        ("Can you understand Japanese?", "はい、日本語を理解できます。"),
        (JA, "東京はNHKやJRがあり、iPhoneでYouTubeを見ます。気温は35 kmの沖で30℃、DNAとAIは略語です。"),
        (JA, "任天堂のNintendo Switchと、Francis CrickやThe Beatlesのファンがいます。"),
        (JA, "基準率の無視（base rate neglect）は誤りです。「making」という語もあります。英語ではdecision makingといいます。"),
        (
            JA,
            "次の関数を使います。\n```python\ndef join_strings(values):\n    return values\n```\n`git reset`も同じです。",
        ),
        (JA, "git reset --hard HEAD を実行し、https://example.com/path を開きます。support@example.com へ。"),
        ("trees を植える理由は？", "trees は空気をきれいにします。"),
        ("この文を英語に訳してください：「一期一会」", "One meeting is worth a thousand."),
        ("英訳してください：夏は暑い。", "Summer is hot, and the people go to the sea."),
        ("夏について英語で答えてください。", "In Japan the summer is hot and humid."),
        (JA, "ロシア語ではлетоといい、ギリシア語のκαλοκαίριも夏です。"),
        (JA, "漢字の「说」は中国の字です。"),
        (JA, "応用力学と信用力の話です。"),
        (JA, "μ1、μ2、μ3の和は0です。y = cos t とします。"),
        (JA, "back number（バックナンバー）の曲です。generationsが好きです。Grabというアプリです。Grabは安いです。"),
        (JA, "英語の例です。It's all in the mind.（気の持ちよう。）mindは心です。"),
        (JA, "Rainbow Bridgeは東京にあります。"),
        (JA, ""),
        (EN, "42"),
    ],
)
def test_foreign_text_with_a_reason_is_left_alone(question, response):
    assert marked(question, response) == []


def test_a_character_that_the_last_token_cut_is_no_leak():
    assert not detect(ask(JA), "夏は暑\ufffd").leak
    assert detect(ask(JA), "夏\ufffdは暑い。").leak


@pytest.mark.parametrize(
    ("question", "system", "language"),
    [
        ("夏は？", None, "ja"),
        ("Summer?", None, "en"),
        ("Lifetime Movie Networkとは何ですか？", None, "ja"),
        ("夏について教えて。", "Always answer in English.", "en"),
        ("Explain the 夏 in French, please.", None, "fr"),
        ("次を中国語に翻訳してください：夏", None, "zh"),
        ("用英语回答：夏天是什么？", None, "en"),
        ("여름을 영어로 번역해 주세요.", None, "en"),
        ("Write about dragons in Chinese folklore.", None, "en"),
        ("英語で書かれた本を読む方法は？", None, "ja"),
    ],
)
def test_the_answers_language_is_the_one_asked_for_or_the_prompts(question, system, language):
    assert asked_language(ask(question, system)).language == language


def read(path, most=None):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [line for line, _ in zip(lines, range(most or 10**9), strict=False)]


def test_precision_and_recall_on_the_labels(shared_data):
    labels = [json.loads(line) for line in read(shared_data / "eval" / "leak_labels.jsonl.gz")]
    found = [detect(label["messages"], label["response"]) for label in labels]
    hits = sum(label["leak"] and verdict.leak for label, verdict in zip(labels, found, strict=True))
    assert hits / sum(verdict.leak for verdict in found) >= 0.95
    assert hits / sum(label["leak"] for label in labels) >= 0.90
    # Of the characters in labelled spans, and in marked ones.
    wanted = [{place for span in label["spans"] for place in range(*span)} for label in labels]
    given = [{place for span in verdict.spans for place in range(*span)} for verdict in found]
    common = sum(len(one & other) for one, other in zip(wanted, given, strict=True))
    assert common / sum(map(len, given)) >= 0.90
    assert common / sum(map(len, wanted)) >= 0.85


def paragraphs(path, count):
    return [line for line in read(path) if len(line) > 40][:count]


def documents(path):
    return "".join(read(path)).split("\n\n")


def alarms(question, texts):
    return sum(detect(ask(question), text).leak for text in texts)


@pytest.mark.parametrize(
    ("name", "question", "count"),
    [
        ("text/ja_heldout.txt.gz", JA, 1200),
        ("text/en_heldout.txt.gz", EN, 600),
        pytest.param("text/ja_heldout.txt.gz", JA, 10**6, marks=pytest.mark.slow),
        pytest.param("text/en_heldout.txt.gz", EN, 10**6, marks=pytest.mark.slow),
    ],
)
def test_human_text_gives_few_alarms(shared_data, name, question, count):
    texts = paragraphs(shared_data / name, count)
    assert alarms(question, texts) <= 0.005 * len(texts)


@pytest.mark.slow
@pytest.mark.parametrize(("language", "question"), [("ja", JA), ("en", EN)])
def test_whole_documents_and_encyclopedia_and_questions_give_few_alarms(shared_data, language, question):
    sets = {"documents": documents(shared_data / "text" / f"{language}_heldout.txt.gz")}
    if language == "ja":
        for name, key in (("jsquad_valid", "context"), ("jmmlu_test", "question")):
            records = map(json.loads, read(shared_data / "bench" / f"{name}.jsonl.gz"))
            sets[name] = sorted({record[key].partition("[SEP]")[2] or record[key] for record in records})
    for name, texts in sets.items():
        assert alarms(question, texts) <= 0.005 * len(texts), name


def test_words_and_sentences_spliced_into_human_text_are_found(shared_data):
    """The words are those of questions that the word lists were not made from."""
    draw = random.Random(3)
    records = map(json.loads, read(shared_data / "bench" / "social_i_qa_test.jsonl.gz", 300))
    english = " ".join(record["instruction"].partition(":")[2].partition("\n")[0] for record in records)
    sentences = [sentence for sentence in english.split(". ") if sentence.count(" ") > 4]
    japanese = [line for line in paragraphs(shared_data / "text" / "ja_heldout.txt.gz", 3000) if line.isascii() is False]
    runs = [run for line in japanese for run in re.findall("[\u3041-\u30ff\u4e00-\u9fff]{2,14}", line)]
    foreign = {
        "ja": (
            ["используется", "그리고", "应该说", "सुंदर"],
            [word for word in english.split() if re.fullmatch("[a-z]{5,}", word)],
            sentences,
        ),
        "en": (["которые", "우리는", "无效的"], runs, runs),
    }
    for language, question in (("ja", JA), ("en", EN)):
        texts = [text for text in paragraphs(shared_data / "text" / f"{language}_heldout.txt.gz", 1500) if len(text) < 400]
        texts = [text for text in texts if not re.search(r"[A-Za-z_]{2}|`" if language == "ja" else r"[`_(){}]", text)]
        spliced = found = 0
        for text in texts[: len(texts) // 2 : 3]:
            word = draw.choice(draw.choice(foreign[language]))
            place = draw.choice([place for place, mark in enumerate(text) if mark in "、。 はを"] or [0])
            changed = text[: place + 1] + word + text[place + 1 :]
            spliced += 1
            found += any(
                start < place + 1 + len(word) and place + 1 < end for start, end in detect(ask(question), changed).spans
            )
        assert spliced >= 50
        assert found >= 0.9 * spliced


@pytest.mark.slow
def test_rates_of_the_published_generations_rise_with_temperature(shared_data):
    leaks = {}
    for line in read(shared_data / "eval" / "sampler_generations.jsonl.gz"):
        record = json.loads(line)
        if record["language"] == "en":
            found = detect(record["messages"], record["response"]).leak
            leaks.setdefault(record["temperature"], []).append(found)
    rates = [sum(found) / len(found) for _, found in sorted(leaks.items())]
    assert rates == sorted(rates)
    assert rates[-1] > 1.5 * rates[0]
