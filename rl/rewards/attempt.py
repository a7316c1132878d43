"""What a grader sees of a sample, and how the answer is found in it."""

from __future__ import annotations

from dataclasses import dataclass

THINK_END = "</think>"
END_OF_SENTENCE = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class Attempt:
    """Plain values only: an attempt crosses a process border as JSON."""

    prompt: str
    answer: str  # the reference
    text: str  # what was sampled after `<think>`, up to a stop string
    num_tokens: int  # sampled, end of sequence included
    max_tokens: int
    finished: bool  # False where max_tokens cut it off
    rubric: str = ""  # what a judge goes by; "": the row has none
    language: str = "none"  # what the thought should be written in: `rl.language`
    domain: str = ""  # decides which settings of rl.domains its grade is made by
    task: str = ""  # of data/tasks; "": none


def extract_answer(text: str) -> str | None:
    """What follows the first `</think>` up to the end of sequence, stripped; None where the thinking was never
    closed."""
    _, closed, rest = text.partition(THINK_END)
    return rest.partition(END_OF_SENTENCE)[0].strip() if closed else None
