"""The programs that rl/env/programs.py asks for: each function below is a family, with its statement, its parameters
and its inputs.

A function takes what the program reads and the family's parameter; what it returns is printed. It is the reference
twice: it says what is right, and its source is the program of the scripted solver, so it uses nothing but builtins.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Ints = list[int]
LONGEST_WINDOW = 12  # of numbers that are taken together: a list of integers has as many, where k does


def sum_of_multiples(numbers: Ints, k: int) -> int:
    return sum(number for number in numbers if number % k == 0)


def count_above(numbers: Ints, k: int) -> int:
    return sum(number > k for number in numbers)


def rotate_left(numbers: Ints, k: int) -> Ints:
    shift = k % len(numbers)
    return numbers[shift:] + numbers[:shift]


def every_kth(numbers: Ints, k: int) -> Ints:
    return numbers[k - 1 :: k]


def sort_by_remainder(numbers: Ints, k: int) -> Ints:
    return sorted(numbers, key=lambda number: (number % k, number))


def pairs_with_sum(numbers: Ints, k: int) -> int:
    count = 0
    for i in range(len(numbers)):
        for j in range(i):
            count += numbers[i] + numbers[j] == k
    return count


def best_window(numbers: Ints, k: int) -> int:
    sums = [sum(numbers[start : start + k]) for start in range(len(numbers) - k + 1)]
    return max(sums)


def chunk_sums(numbers: Ints, k: int) -> Ints:
    return [sum(numbers[start : start + k]) for start in range(0, len(numbers), k)]


def digit_sum_in_base(numbers: Ints, k: int) -> Ints:
    sums = []
    for number in numbers:
        total = 0
        while number:
            total += number % k
            number //= k
        sums.append(total)
    return sums


def powers_modulo(numbers: Ints, k: int) -> Ints:
    return [pow(number, 3, k) for number in numbers]


def shift_letters(text: str, k: int) -> str:
    shifted = [chr((ord(letter) - 97 + k) % 26 + 97) if letter.islower() else letter for letter in text]
    return "".join(shifted)


def reverse_long_words(text: str, k: int) -> str:
    return " ".join(word[::-1] if len(word) > k else word for word in text.split())


def words_of_length(text: str, k: int) -> int:
    return sum(len(word) == k for word in text.split())


def long_runs(text: str, k: int) -> str:
    runs: list[str] = []
    for letter in text:
        if runs and runs[-1][0] == letter:
            runs[-1] += letter
        else:
            runs.append(letter)
    return "".join(f"{run[0]}{len(run)}" if len(run) >= k else run for run in runs)


def take_columns(text: str, k: int) -> str:
    return "".join(text[column::k] for column in range(k))


# Steps of the longer programs: a list of integers to a list of integers


def keep_multiples(numbers: Ints, k: int) -> Ints:
    return [number for number in numbers if number % k == 0]


def drop_multiples(numbers: Ints, k: int) -> Ints:
    return [number for number in numbers if number % k != 0]


def add_to_each(numbers: Ints, k: int) -> Ints:
    return [number + k for number in numbers]


def times_each(numbers: Ints, k: int) -> Ints:
    return [number * k for number in numbers]


def add_places(numbers: Ints, k: int) -> Ints:
    return [number + k * place for place, number in enumerate(numbers, 1)]


def differences(numbers: Ints, k: int) -> Ints:
    return [later - earlier for earlier, later in zip(numbers, numbers[k:], strict=False)]


def repeat_last(numbers: Ints, k: int) -> Ints:
    return numbers + numbers[-1:] * k


def _numbers(rng: random.Random, k: int) -> str:
    least = max(4, min(k, LONGEST_WINDOW))
    return " ".join(str(rng.randint(0, 60)) for _ in range(rng.randint(least, least + 6)))


def _near_pairs(rng: random.Random, k: int) -> str:
    return " ".join(str(rng.randint(0, k)) for _ in range(rng.randint(6, 14)))


def _words(rng: random.Random, k: int) -> str:
    return " ".join(
        "".join(rng.choice("abcdefghij") for _ in range(rng.randint(1, k + 4))) for _ in range(rng.randint(3, 8))
    )


def _runs(rng: random.Random, k: int) -> str:
    return "".join(rng.choice(string.ascii_lowercase[:4]) * rng.randint(1, k + 2) for _ in range(rng.randint(3, 8)))


@dataclass(frozen=True)
class Family:
    """`statement` after what is read, {k} the parameter. reads: "numbers" (a line of integers) or "line"."""

    run: Callable[[Any, int], Any]
    statement: str
    parameters: Sequence[int]
    reads: str = "numbers"
    inputs: Callable[[random.Random, int], str] = _numbers


FAMILIES = (
    Family(sum_of_multiples, "Print the sum of those that {k} divides.", range(2, 20)),
    Family(count_above, "Print how many are greater than {k}.", range(5, 55)),
    Family(rotate_left, "Print them rotated to the left by {k} places.", range(1, 20)),
    Family(every_kth, "Print those whose place {k} divides, the first place is 1.", range(4, 12)),
    Family(sort_by_remainder, "Print them sorted by their remainder by {k}, equal remainders by size.", range(3, 30)),
    Family(pairs_with_sum, "Print how many pairs of places have the sum {k}.", range(5, 40), inputs=_near_pairs),
    Family(best_window, "Print the greatest sum of {k} neighbours.", range(2, 12)),
    Family(chunk_sums, "Cut them into pieces of {k}, the last may be shorter; print each piece's sum.", range(2, 8)),
    Family(digit_sum_in_base, "Print for each the sum of its digits in base {k}.", range(2, 30)),
    Family(powers_modulo, "Print the remainder of each one's cube by {k}.", range(5, 60)),
    Family(shift_letters, "Print it with each letter moved {k} on, z goes on at a.", range(1, 26), "line", _words),
    Family(reverse_long_words, "Print it with all words longer than {k} reversed.", range(1, 8), "line", _words),
    Family(words_of_length, "Print how many words have {k} letters.", range(1, 7), "line", _words),
    Family(
        long_runs,
        "Print it with each run of {k} or more equal letters written as the letter and their number.",
        range(2, 8),
        "line",
        _runs,
    ),
    Family(
        take_columns,
        "Print its letters in steps of {k}: from the first on, then from the second, and so on.",
        range(2, 9),
        "line",
        _runs,
    ),
)

STEPS = (
    Family(keep_multiples, "keep those that {k} divides", range(2, 5)),
    Family(drop_multiples, "drop those that {k} divides", range(2, 8)),
    Family(add_to_each, "add {k} to each", range(2, 50)),
    Family(times_each, "multiply each by {k}", range(2, 12)),
    Family(add_places, "add {k} times its place to each, the first place is 1", range(1, 12)),
    Family(differences, "replace the list by each number minus the one {k} places before it", range(1, 4)),
    Family(repeat_last, "write the last {k} more times", range(1, 9)),
    Family(sort_by_remainder, "sort by the remainder by {k}, equal remainders by size", range(3, 20)),
)
FOLDS = (
    Family(sum_of_multiples, "print the sum of those that {k} divides", range(2, 6)),
    Family(count_above, "print how many are greater than {k}", range(5, 55)),
    Family(every_kth, "print those whose place {k} divides, the first place is 1", range(2, 4)),
    Family(powers_modulo, "print the remainder of each one's cube by {k}", range(5, 60)),
)
