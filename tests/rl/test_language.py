"""Language consistency: words of the target's script over all words, by hand."""

import time
from dataclasses import replace

import pytest

from conf.schema import RLConfig
from conf.validate import LANGUAGES
from rl.rewards import Attempt, part_names, total_reward
from rl.rewards.language import SCRIPTS, language_share


def share(text: str, language: str) -> float:
    return language_share(Attempt("", "", text, 1, 1, True, language=language))


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("the sum is 85</think>八十五", "latin", 1.0),  # the answer does not count
        ("the sum 是八</think>85", "latin", 0.5),  # 2 words and 2 characters that are words
        ("the sum 是八</think>85", "han", 0.5),
        ("答案是八 so</think>85", "han", 0.8),
        ("7+8=15, x = y²</think>85", "latin", 1.0),  # no word at all
        ("", "han", 1.0),
        (r"因为 $\frac{a}{b} = \alpha x$ 所以", "han", 1.0),  # mathematics is no English
        ("これは漢字です yes", "japanese", 7 / 8),
        ("これは漢字です yes", "han", 2 / 8),
        ("Привет мир, hello", "cyrillic", 2 / 3),
        ("हिन्दी भाषा word", "devanagari", 2 / 3),  # vowel signs do not break a word
        ("naïve cafe\u0301 été", "latin", 1.0),  # one accent written apart
        ("한국어 문장 yes", "hangul", 2 / 3),
        ("ＡＢＣ", "latin", 1.0),  # fullwidth
        ("𝐀𝐁 ℝℤ words", "latin", 1.0),  # mathematical letters
        ("never closed 永", "latin", 2 / 3),
    ],
)
def test_shares_by_hand(text: str, language: str, expected: float):
    assert share(text, language) == pytest.approx(expected)


def test_the_reward_adds_it():
    rl = RLConfig(language="latin", language_weight=0.3)
    parts = {"exact_match": 1.0, "format": 0.0, "length": 0.5, "language": 0.5}
    assert total_reward(parts, rl) == pytest.approx(1.15)
    assert part_names(rl) == ("exact_match", "format", "length", "language")
    assert total_reward(parts, replace(rl, language_weight=0.0)) == 1.0


def test_every_language_of_the_schema_has_its_scripts():
    assert set(LANGUAGES) == {"none", *SCRIPTS}


def test_long_hostile_text_is_counted_at_once():
    start = time.monotonic()
    assert share("\\" * 200_000 + "a" * 200_000 + "\u0301" * 200_000, "latin") == 1.0
    assert time.monotonic() - start < 5
