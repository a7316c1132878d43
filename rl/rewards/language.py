"""Language consistency: the share of the thought's words that are of the target language, told by Unicode script
(DeepSeek-R1, arXiv 2501.12948, sec. 2.3.2: Num(Words_target) / Num(Words)).

A word is a run of two or more letters of one script; in scripts written without spaces every letter is one. What
belongs to mathematics belongs to no language: digits, signs, single letters (`x`) and commands (`\\frac`). A thought
without a word is consistent. Scripts are not languages: French passes for English, and Chinese for Japanese.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rl.rewards.attempt import THINK_END, Attempt

SCRIPTS: dict[str, frozenset[str]] = {  # rl.language (conf.validate.LANGUAGES) -> first words of the letters' names
    "latin": frozenset({"LATIN"}),
    "han": frozenset({"CJK"}),
    "japanese": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "hangul": frozenset({"HANGUL"}),
    "cyrillic": frozenset({"CYRILLIC"}),
    "greek": frozenset({"GREEK"}),
    "arabic": frozenset({"ARABIC"}),
    "hebrew": frozenset({"HEBREW"}),
    "devanagari": frozenset({"DEVANAGARI"}),
    "thai": frozenset({"THAI"}),
}
UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI"})
NO_SCRIPT = frozenset({"", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MODIFIER"})
COMMAND = re.compile(r"\\[A-Za-z]+")


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str:
    """The first word of a letter's Unicode name, its script; "" where it is no letter of a language."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    script = name.partition(" ")[0]
    return "" if script in NO_SCRIPT else script


def count_words(text: str) -> dict[str, int]:
    """Words by script."""
    counts: dict[str, int] = {}
    run, size = "", 0  # script and letters of the word in hand

    def close() -> None:
        if size > 1:
            counts[run] = counts.get(run, 0) + 1

    for character in COMMAND.sub(" ", text):
        script = script_of(character)
        if not script and run and unicodedata.category(character)[0] == "M":
            continue  # a vowel sign or an accent inside a word
        if script != run:
            close()
            run, size = script, 0
        if script in UNSPACED:
            counts[script] = counts.get(script, 0) + 1
            run, size = "", 0
        elif script:
            size += 1
    close()
    return counts


def language_share(attempt: Attempt) -> float:
    """In [0, 1]; of what comes before `</think>`, or of everything where the thought was never closed."""
    counts = count_words(attempt.text.partition(THINK_END)[0])
    total = sum(counts.values())
    return sum(counts.get(script, 0) for script in SCRIPTS[attempt.language]) / total if total else 1.0
