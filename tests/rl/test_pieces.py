"""Pieces of tokens: put together they are the text, and no half character shows."""

import random
from collections.abc import Callable

import pytest

from data.tokenizer import load_tokenizer
from rl.pieces import text_pieces


def decoder() -> tuple[Callable[[list[int]], str], list[int]]:
    """Of the byte tokenizer, and a count of the tokens it was asked to decode."""
    tokenizer, asked = load_tokenizer("bytes"), [0]

    def decode(ids: list[int]) -> str:
        asked[0] += len(ids)
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode, asked


def test_a_character_belongs_to_the_token_that_completes_it():
    decode, _ = decoder()
    assert text_pieces(list("aé€😀".encode()), decode) == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    think = load_tokenizer("bytes").convert_tokens_to_ids("</think>")
    assert text_pieces([*b"a\xf0\x9f", think, 98], decode) == ["a", "", "", "\ufffd</think>", "b"]


def test_broken_utf8_stays_as_the_text_has_it():
    decode, _ = decoder()
    assert text_pieces([*b"a\xe2\x82"], decode) == ["a", "", "\ufffd"]  # never completed
    assert text_pieces([*b"a\x80b\x80"], decode) == ["a", "", "\ufffdb", "\ufffd"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_put_together_are_the_text(seed: int):
    decode, _ = decoder()
    noise = random.Random(seed)
    known = [*range(0xC0), *range(0xC2, 0xF5)]
    ids = [noise.choice(known) for _ in range(200)] + list("日本語 é 😀".encode())
    pieces = text_pieces(ids, decode)
    assert len(pieces) == len(ids) and "".join(pieces) == decode(ids)
    assert "".join(pieces[-16:]) == "日本語 é 😀"  # its first byte may settle what was before


def test_the_cost_is_linear_even_where_nothing_ever_completes():
    for ids in ([0x80] * 5000, list("日本".encode()) * 800):
        decode, asked = decoder()
        assert "".join(text_pieces(ids, decode)) == decode(ids)
        assert asked[0] < 40 * len(ids)
