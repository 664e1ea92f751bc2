"""Word lists are made from text: what is frequent in one language and absent from another."""

import pytest

from recipes.evaluation.leakage.word_lists import WordListSettings, main, run


def settings_of(folder, **changes) -> WordListSettings:
    english = "".join(f"Then the teachers explain number {i} to Peter Smith in London.\n\n" for i in range(40))
    english += "".join(f"We met the quokka {i} times.\n\n" for i in range(5))
    japanese = "".join(f"彼は第{i}回の大会でcamera を買い、「explain」と言う。可能性。十人以上。\n\n" for i in range(30))
    japanese += "".join(f"`f{i}()` の関数と引数のコンパイルで number を渡す。\n\n" for i in range(30))
    (folder / "english.txt").write_text(english + "cameras " * 3, encoding="utf-8")
    (folder / "japanese.txt").write_text(japanese, encoding="utf-8")
    (folder / "chinese.txt").write_text("可以 90000\n大会 5000\n这个 8000\n", encoding="utf-8")
    files = {name: str(folder / f"{name}.txt") for name in ("english", "japanese", "chinese")}
    (folder / "lists").mkdir(exist_ok=True)
    return WordListSettings(
        english=(files["english"],),
        japanese=(files["japanese"],),
        chinese=files["chinese"],
        out=str(folder / "lists"),
        **changes,
    )


def test_lists_hold_what_the_texts_show(tmp_path):
    settings = settings_of(tmp_path)
    run(settings)
    lists = {file.stem: file.read_text(encoding="utf-8") for file in (tmp_path / "lists").iterdir()}
    ordinary, rare = (paragraph.split() for paragraph in lists["english_words"].split("\n\n"))
    # Names are capitalised, and an inflection is left out where its stem is there.
    assert {"explain", "number", "teachers"} <= set(ordinary)
    assert "quokka" in rare
    assert not {"peter", "smith", "london"} & {*ordinary, *rare}
    # Quoted words are no terms.
    assert lists["latin_terms_of_programs"].split() == ["number"]
    assert "explain" not in lists["latin_terms"].split()
    assert "コンパイル" in lists["trade_words"].split()
    # 可以: both characters are frequent in the Japanese text, and never side by side. 这 is no character of Japanese at all.
    assert lists["chinese_words"].split() == ["可以"]
    run(settings)
    assert {file.stem: file.read_text(encoding="utf-8") for file in (tmp_path / "lists").iterdir()} == lists


def test_a_line_that_is_no_word_with_a_count_is_named(tmp_path):
    settings = settings_of(tmp_path)
    (tmp_path / "chinese.txt").write_text("可以 9\n大会\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"chinese\.txt:2: '大会': expected a word and its count"):
        main(
            [
                "--english",
                *settings.english,
                "--japanese",
                *settings.japanese,
                "--chinese",
                settings.chinese,
                "--out",
                settings.out,
            ]
        )
    assert not any((tmp_path / "lists").iterdir())
