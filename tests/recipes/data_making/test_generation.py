"""The language of new instructions."""

import pytest

from recipes.data_making.generation import other_language


@pytest.mark.parametrize(
    ("text", "language", "other"),
    [
        ("日本の首都はどこですか。", "ja", None),
        ("What is the capital of Japan, and how many people live in it?", "ja", "en"),
        ("日本の首都はどこですか。", "en", "ja"),
        ("请问日本的首都是哪里？这个城市有多少人？", "ja", "zh"),
        ("Was ist die Hauptstadt von Japan und wie viele Menschen wohnen in ihr?", "de", None),
        ("What is the capital of Japan, and how many people live in it?", "de", "en"),
        # Too few words to tell, or a language that nothing is known of.
        ("Kyoto oder Tokyo?", "de", None),
        ("Hva er hovedstaden i Japan?", "no", None),
        ("1 + 1 = ?", "ja", None),
    ],
)
def test_an_instruction_in_another_language_is_told_by_script_and_function_words(text, language, other):
    assert other_language(text, language) == other
