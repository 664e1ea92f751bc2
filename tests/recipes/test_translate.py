"""Translation before a server in this process that translates as it is told to."""

import gzip
import json
import re
from itertools import islice

import pytest

from engine.data.records import read_conversation, read_pair
from engine.inference import endpoint
from recipes import translate
from recipes.data_making.protected import protect
from tests.engine.inference.servers import FakeServer, FaultProxy

pytest.importorskip("openai", reason="openai comes with the extra eval")

RECORDS = [
    {
        "id": 1,
        "messages": [{"role": "user", "content": "Where is `x`?"}, {"role": "assistant", "content": "Behind the *door*."}],
    },
    {"id": 2, "instruction": "Add the numbers.", "input": "two and three", "output": "5"},
    {
        "id": 3,
        "conversations": [{"from": "human", "value": "See https://a.org/b please"}, {"from": "gpt", "value": "I see it"}],
    },
]
ATTEMPT = '[[attempts]]\nmodel = "m"'
_WORD = re.compile(r"<k\d+/>|[A-Za-z]+")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def in_japanese(text: str) -> str:
    """A text whose words are others; marks stay."""
    return _WORD.sub(lambda match: match[0] if match[0][0] == "<" else "語" * len(match[0]), text)


def asked(body: dict) -> list[str]:
    """The marked texts of a request."""
    content = body["messages"][-1]["content"]
    return re.findall(r"<(?:source|message[^>]*)>\n(.*?)\n</(?:source|message)>", content, re.DOTALL)


def translating(body: dict) -> str:
    texts = [in_japanese(text) for text in asked(body)]
    if "<source>" in body["messages"][-1]["content"]:
        return texts[0]
    return "\n".join(f'<message number="{number}">\n{text}\n</message>' for number, text in enumerate(texts, 1))


def write(path, records=RECORDS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read(path) -> list[dict]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def call(tmp_path, url: str, attempts: str = ATTEMPT, *options: str, out: str = "ja.jsonl", validate: bool = False) -> None:
    config = f"""
kind = "conversations"
paths = ["{tmp_path}/en.jsonl"]
out = "{tmp_path}/{out}"
source = "en"
target = "ja"
validate = {str(validate).lower()}
{attempts}
"""
    config = re.sub(r"(?m)^\[\[attempts\]\]$", f'[[attempts]]\nurl = "{url}"\ntimeout = 5', config)
    (tmp_path / "translate.toml").write_text(config)
    translate.main([f"{tmp_path}/translate.toml", *options])


@pytest.mark.parametrize("unit", ["message", "conversation"])
@pytest.mark.parametrize("out", ["ja.jsonl", "ja.jsonl.gz"])
def test_records_come_out_in_their_form_with_spans_and_fields_as_they_were(tmp_path, capsys, unit, out):
    write(tmp_path / "en.jsonl")
    with FakeServer(answer=translating) as server:
        call(tmp_path, server.url, f'[[attempts]]\nmodel = "m"\nunit = "{unit}"', out=out)
    rows = read(tmp_path / out)
    assert [{name: row[name] for name in row if name != "translation"} for row in rows] == [
        {
            "id": 1,
            "messages": [
                {"role": "user", "content": "語語語語語 語語 `x`?"},
                {"role": "assistant", "content": "語語語語語語 語語語 *語語語語*."},
            ],
        },
        {"id": 2, "instruction": "語語語 語語語 語語語語語語語.", "input": "語語語 語語語 語語語語語", "output": "5"},
        {
            "id": 3,
            "conversations": [
                {"from": "human", "value": "語語語 https://a.org/b 語語語語語語"},
                {"from": "gpt", "value": "語 語語語 語語"},
            ],
        },
    ]
    assert rows[0]["translation"] == {
        "from": "en",
        "to": "ja",
        "verdicts": [{"message": number, "attempt": 1, "model": "m", "ok": True} for number in (1, 2)],
    }
    # A number alone is not asked for.
    assert len(server.log) == (6 if unit == "message" else 3)
    assert "3 of 3 records; 6 of 6 messages passed" in capsys.readouterr().out


def test_a_model_that_drops_or_changes_a_mark_is_caught_and_the_next_attempt_mends_it(tmp_path, capsys):
    write(tmp_path / "en.jsonl")

    def answer(body):
        said = translating(body)
        return said if body["model"] == "strong" else re.sub(r"<k\d+/>", "", said)

    attempts = '[[attempts]]\nmodel = "weak"\n[[attempts]]\nmodel = "strong"\nexplain = true'
    with FakeServer(answer=answer) as server:
        call(tmp_path, server.url, attempts)
    rows = read(tmp_path / "ja.jsonl")
    assert len(rows) == 3
    verdicts = rows[0]["translation"]["verdicts"]
    assert [(each["message"], each["attempt"], each["model"], each["ok"]) for each in verdicts] == [
        (1, 1, "weak", False),
        (2, 1, "weak", True),
        (1, 2, "strong", True),
    ]
    assert verdicts[0]["reasons"] == ["placeholder dropped: <k1/>, '`x`'"]
    assert verdicts[0]["text"] == "語語語語語 語語 ?"
    # The second attempt hears what was wrong, and is asked for the failed message alone.
    strong = [body for body, *_ in server.log if body["model"] == "strong"]
    assert len(strong) == 2
    assert all("placeholder dropped" in body["messages"][1]["content"] for body in strong)
    said = capsys.readouterr().out
    assert "attempt 1 (weak, message): 4 messages passed" in said
    assert "failed 2: placeholder dropped; first:" in said


@pytest.mark.parametrize("failed", ["drop", "keep"])
def test_a_conversation_with_a_message_that_never_passes_is_dropped_or_kept_as_told(tmp_path, capsys, failed):
    write(tmp_path / "en.jsonl")
    with FakeServer(answer=lambda body: re.sub(r"<k\d+/>", "", translating(body))) as server:
        call(tmp_path, server.url, ATTEMPT, "--failed", failed)
    rows, dropped = read(tmp_path / "ja.jsonl"), read(tmp_path / "ja.dropped.jsonl.gz")
    assert len(rows) + len(dropped) == 3
    if failed == "keep":
        assert [verdict["ok"] for verdict in rows[0]["translation"]["verdicts"]] == [False, True]
        return
    assert [row["id"] for row in rows] == [2]
    assert [row["record"] for row in dropped] == [RECORDS[0], RECORDS[2]]
    assert dropped[0]["reasons"] == ["message 1: placeholder dropped: <k1/>, '`x`'"]
    assert dropped[0]["place"].endswith("en.jsonl:1")
    assert "dropped 2, each with its reasons" in capsys.readouterr().out
    for row in dropped:
        with pytest.raises(Exception, match="no conversation"):
            read_conversation(row)


def test_a_whole_conversation_that_passes_replaces_single_messages_and_else_fills_the_gaps(tmp_path):
    write(tmp_path / "en.jsonl", RECORDS[:1])
    attempts = '[[attempts]]\nmodel = "one"\n[[attempts]]\nmodel = "all"\nunit = "conversation"'
    for lacking in ("", "2"):

        def answer(body, lacking=lacking):
            said = translating(body)
            if body["model"] == "one":
                return "" if "<k1/>" in said else said
            said = said.replace("語", "文")
            return re.sub(rf'<message number="{lacking}">.*?</message>', "", said, flags=re.DOTALL) if lacking else said

        with FakeServer(answer=answer) as server:
            call(tmp_path, server.url, attempts, out=f"ja{lacking}.jsonl")
        [row] = read(tmp_path / f"ja{lacking}.jsonl")
        question, reply = (turn["content"] for turn in row["messages"])
        assert question == "文文文文文 文文 `x`?"
        assert reply == ("語語語語語語 語語語 *語語語語*." if lacking else "文文文文文文 文文文 *文文文文*.")


def test_translations_that_went_wrong_are_found_and_mended_by_the_next_attempt(tmp_path, shared_data, capsys):
    """Real pairs of texts; the first model spoils four of five of them."""
    with gzip.open(shared_data / "eval" / "parallel_docs.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [(row["en"], row["ja"]) for row in map(json.loads, islice(file, 600))]
    translated, records = {}, []
    for source, target in pairs:
        marked = protect(source)
        for number, span in enumerate(marked.spans, 1):
            target = target.replace(span, f"<k{number}/>", 1)
        if len(source) > 80 and len(translated) < 100 and len(re.findall(r"<k\d+/>", target)) == len(marked.spans):
            records.append({"id": len(translated), "prompt": source, "completion": "42"})
            translated[marked.text] = target
    texts = [*translated]
    write(tmp_path / "en.jsonl", records)

    def answer(body):
        [text] = asked(body)
        right = translated[text]
        wrong = {
            0: text,
            1: "申し訳ありませんが、この文章を翻訳することはできません。",
            2: right + "\n" + right * 3,
            3: "以下は翻訳です：\n" + right,
        }
        return right if body["model"] == "strong" else wrong.get(texts.index(text) % 5, right)

    attempts = '[[attempts]]\nmodel = "weak"\n[[attempts]]\nmodel = "strong"'
    with FakeServer(answer=answer) as server:
        call(tmp_path, server.url, attempts, validate=True)
    rows = read(tmp_path / "ja.jsonl")
    assert len(texts) == 100
    assert len(rows) >= 95
    spoilt, right = [], []
    for row in rows:
        (right if row["id"] % 5 == 4 else spoilt).append(row["translation"]["verdicts"][0])
    assert sum(not verdict["ok"] for verdict in spoilt) >= 0.95 * len(spoilt)
    assert sum(verdict["ok"] for verdict in right) >= 0.9 * len(right)
    reasons = {reason.partition(":")[0] for verdict in spoilt for reason in verdict.get("reasons", ())}
    assert {"not translated", "refusal", "preamble", "repeated"} <= reasons
    assert "attempt 2 (strong, message)" in capsys.readouterr().out


def test_context_and_style_are_in_the_request(tmp_path):
    write(tmp_path / "en.jsonl", RECORDS[:1])
    with FakeServer(answer=translating) as server:
        call(tmp_path, server.url, '[[attempts]]\nmodel = "m"\ncontext = 1\ntemperature = 0', "--style", "Polite form.")
    bodies = sorted((body for body, *_ in server.log), key=lambda body: len(body["messages"][1]["content"]))
    assert all("- Polite form." in body["messages"][0]["content"] for body in bodies)
    assert "context" not in bodies[0]["messages"][1]["content"]
    assert "user: Where is `x`?" in bodies[1]["messages"][1]["content"]
    assert bodies[0]["temperature"] == 0
    assert bodies[0]["max_tokens"] == 2048


def test_pairs_are_translated_once_a_text_and_read_as_pairs(tmp_path):
    turns = [{"role": "user", "content": "Where is it?"}]
    sides = {side: [*turns, {"role": "assistant", "content": side}] for side in ("here", "there")}
    write(tmp_path / "en.jsonl", [{"prompt": "Where is it?", "chosen": sides["here"], "rejected": sides["there"]}])
    with FakeServer(answer=translating) as server:
        call(tmp_path, server.url, ATTEMPT, "--kind", "preferences")
    [row] = read(tmp_path / "ja.jsonl")
    assert len(server.log) == 3
    pair = read_pair(row)
    assert (pair.chosen, pair.rejected) == ("語語語語", "語語語語語")


def test_cut_and_refused_answers_are_failed_attempts(tmp_path):
    write(tmp_path / "en.jsonl", RECORDS[1:2])

    def fails(body):
        return (400, "too long") if "three" in body["messages"][1]["content"] else None

    nothing = r"ja\.jsonl: no record passed; the dropped file beside it holds all"
    with FakeServer(fails=fails) as server, pytest.raises(SystemExit, match=nothing):
        call(tmp_path, server.url, '[[attempts]]\nmodel = "m"\nmax_tokens = 3')
    [row] = read(tmp_path / "ja.dropped.jsonl.gz")
    assert row["reasons"][0] == "message 1: cut off"
    assert "not answered" in row["reasons"][1]
    assert "too long" in row["reasons"][1]


def test_messages_before_the_cut_of_a_whole_conversation_pass(tmp_path):
    write(tmp_path / "en.jsonl", RECORDS[:1])
    attempts = '[[attempts]]\nmodel = "all"\nunit = "conversation"\n[[attempts]]\nmodel = "one"'
    server = FakeServer(answer=translating)
    reply = server.text

    def text(body):
        said, tokens, reason = reply(body)
        return (said[:-15], tokens, "length") if body["model"] == "all" else (said, tokens, reason)

    server.text = text
    with server:
        call(tmp_path, server.url, attempts)
    [row] = read(tmp_path / "ja.jsonl")
    verdicts = [(each["message"], each["model"], each["ok"], each.get("reasons")) for each in row["translation"]["verdicts"]]
    assert verdicts == [
        (1, "all", True, None),
        (2, "all", False, ["cut off", "message missing in the answer"]),
        (2, "one", True, None),
    ]


def test_a_folder_translates_in_the_place_of_an_endpoint(tmp_path, tiny_model, capsys):
    """The tiny model has room for 128 tokens, and our prompt takes more: a failed attempt, and no end of the run."""
    write(tmp_path / "en.jsonl")
    attempts = f'attempts = [{{model = "{tiny_model}", device = "cpu", max_tokens = 8}}]'
    call(tmp_path, "", attempts, "--failed", "keep")
    rows = read(tmp_path / "ja.jsonl")
    assert [row["id"] for row in rows] == [1, 2, 3]
    assert rows[0]["messages"] == RECORDS[0]["messages"]
    reasons = {reason for row in rows for verdict in row["translation"]["verdicts"] for reason in verdict["reasons"]}
    assert all(re.match(r"not answered: prompt of \d+ tokens", reason) for reason in reasons)
    assert "failed 6: not answered" in capsys.readouterr().out


def test_unusable_records_are_skipped_and_named_and_broken_files_end_the_run_before_a_request(tmp_path, capsys):
    write(
        tmp_path / "en.jsonl",
        [*RECORDS, {"messages": []}, {**RECORDS[0], "translation": 1}, {**RECORDS[0], "score": float("nan")}],
    )
    with FakeServer(answer=translating) as server:
        call(tmp_path, server.url)
        said = capsys.readouterr().out
        assert "records to translate: 3" in said
        assert "skipped 1: no assistant turn; first: " in said
        assert "en.jsonl:4" in said
        assert "skipped 1: field 'translation' is taken" in said
        assert "skipped 1: a number that JSON lacks" in said
        asked = len(server.log)
        (tmp_path / "en.jsonl").write_text(json.dumps(RECORDS[0]) + "\n{broken\n")
        with pytest.raises(SystemExit, match=r"en\.jsonl:2: broken JSON"):
            call(tmp_path, server.url)
        assert len(server.log) == asked


def test_the_same_command_again_asks_nothing_and_other_settings_are_refused(tmp_path):
    write(tmp_path / "en.jsonl")
    with FakeServer(answer=translating) as server:
        call(tmp_path, server.url)
        before, asked = (tmp_path / "ja.jsonl").read_bytes(), len(server.log)
        # As a kill leaves it.
        (tmp_path / ".ja.jsonl.0123456789abcdef.partial").write_text("half")
        call(tmp_path, server.url)
        assert (tmp_path / "ja.jsonl").read_bytes() == before
        assert len(server.log) == asked
        assert not [*tmp_path.glob("*.partial")]
        with pytest.raises(SystemExit, match=r"ja\.jsonl: exists already, made with other settings; .* --overwrite"):
            call(tmp_path, server.url, ATTEMPT, "--style", "Brief.")
        call(tmp_path, server.url, ATTEMPT, "--style", "Brief.", "--overwrite")
        assert len(server.log) == 2 * asked


def test_a_budget_that_is_reached_leaves_no_file_and_more_of_it_goes_on(tmp_path):
    write(tmp_path / "en.jsonl")
    with FakeServer(answer=translating) as server:
        with pytest.raises(SystemExit, match=r"the budget of 4 requests is used up"):
            call(tmp_path, server.url, ATTEMPT, "--max-requests", "4")
        assert len(server.log) == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["en.jsonl", "ja.journal", "translate.toml"]
        call(tmp_path, server.url, ATTEMPT, "--max-requests", "6")
        assert len(server.log) == 6
    assert len(read(tmp_path / "ja.jsonl")) == 3


def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order(tmp_path):
    write(tmp_path / "en.jsonl", [{"id": i, "prompt": f"word {i}", "completion": "it"} for i in range(100)])
    found = []
    with FakeServer(answer=translating) as server:
        for seed in (0, 0, 1):
            call(tmp_path, server.url, ATTEMPT, "--sample", "20", "--seed", str(seed), "--overwrite")
            found.append([row["id"] for row in read(tmp_path / "ja.jsonl")])
    assert found[0] == found[1] == sorted(found[0])
    assert len(set(found[0])) == 20
    assert found[0] != found[2]


def test_a_dry_run_shows_the_requests_and_sends_none(tmp_path, capsys):
    write(tmp_path / "en.jsonl")
    call(tmp_path, "http://127.0.0.1:1/v1", '[[attempts]]\nmodel = "m"\nunit = "conversation"', "--dry-run")
    said = capsys.readouterr().out
    assert "7 messages" in said
    assert "2 protected spans" in said
    assert "Where is <k1/>?" in said
    assert not (tmp_path / "ja.jsonl").exists()


def test_through_faults_the_bytes_are_the_same(tmp_path):
    write(tmp_path / "en.jsonl", [{"prompt": f"word {i} `c`", "completion": f"number {i}"} for i in range(40)])
    with FakeServer(answer=translating) as server:
        call(tmp_path, server.url)
        with FaultProxy(server.url, share=0.3, kinds=("429", "500", "reset", "cut")) as proxy:
            call(tmp_path, proxy.url, out="other.jsonl")
    assert (tmp_path / "ja.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('source = "xx"', r"source = 'xx': must be one of am, ar"),
        ('source = "ja"', r"source and target are both 'ja'"),
        ("attempts = []", r"missing key 'attempts'|attempts: name at least one model"),
        ("max_cost = 3.0", r"max_cost needs the prices .* attempts\.0\.price_in"),
        ("sample = 0", r"sample = 0: must be at least 1"),
        ('paths = ["nowhere.jsonl"]', r"nowhere\.jsonl: no such file"),
        ('out = "ja.csv"', r"ja\.csv: unknown type of file"),
        ('[[attempts]]\nmodel = "m"\ncontext = 2\nunit = "conversation"', r"context has no effect"),
        ('[[attempts]]\nmodel = "m"\nmax_tokens = 0', r"max_tokens = 0: must be at least 1"),
        ('[[attempts]]\nmodel = "m"\ntemperature = -1.0', r"temperature = -1.0: must be at least 0"),
    ],
)
def test_wrong_settings_are_named(tmp_path, line, message):
    write(tmp_path / "en.jsonl")
    table = {"kind": '"conversations"', "paths": f'["{tmp_path}/en.jsonl"]', "out": f'"{tmp_path}/ja.jsonl"'}
    table |= {"source": '"en"', "target": '"ja"', "attempts": '[{model = "m", url = "http://127.0.0.1:1/v1"}]'}
    table.pop(line.partition(" = ")[0] if line[0] != "[" else "attempts", None)
    text = "\n".join([*(f"{name} = {value}" for name, value in table.items()), line])
    (tmp_path / "translate.toml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        translate.main([f"{tmp_path}/translate.toml"])
