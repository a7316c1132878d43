"""Any conversation: read again as it was said, append-only inside a user turn, the mask on what the assistant says and
nothing else, no special token but by markup. `--hypothesis-profile=deep` runs 10,000 of each."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import check_messages, encode_messages, encode_prompt, encode_tool_results, pieces_of, render_text
from data.chat import said_message as message_of
from data.context import CONTEXT_RULES, KEEP_ALL, V3_2, V4, last_of
from data.dsml import BLOCK, Turn, call_pieces, calls_of, parse_turn
from data.pieces import ids_of, text_of
from data.tokenizer import END_THINK, EOS, SPECIAL_TOKENS
from tests.data.conversations import TEXT, as_text, blank, conversations, spoken

THINKING = st.booleans()
RULES = st.sampled_from(list(CONTEXT_RULES.values()))


@pytest.fixture(scope="session")
def tokenizers(byte_tokenizer, trained_tokenizer, without_dsml):
    return [byte_tokenizer, trained_tokenizer, without_dsml]


def said_text(message: dict[str, Any], shown: bool) -> str:
    """What the assistant says in this message, by the words of the format."""
    thought = message.get("reasoning_content", "") + END_THINK if shown else ""
    calls = calls_of(message)
    return thought + message["content"] + (text_of(call_pieces(calls)) if calls else "") + EOS


@given(message=spoken(TEXT, 0, 3), thinking=THINKING)
def test_what_is_said_is_read_again(message: dict[str, Any], thinking: bool) -> None:
    text = said_text(message, thinking).removesuffix(EOS)
    turn = parse_turn(text, thinking)
    expected = Turn(message.get("reasoning_content", "") if thinking else "", message["content"], calls_of(message))
    assert turn == expected
    assert json.dumps([call.arguments for call in turn.calls]) == json.dumps([c.arguments for c in expected.calls])
    again = said_text(message_of(turn, thinking), thinking)
    assert again == text + EOS


@given(
    text=TEXT | st.tuples(TEXT, TEXT).map(lambda two: two[0] + END_THINK + "\n\n" + BLOCK + two[1]), thinking=THINKING
)
def test_no_text_makes_the_parser_raise(text: str, thinking: bool) -> None:
    turn = parse_turn(text, thinking)
    if turn.error is not None:
        assert 0 <= turn.error.position <= len(text) and not turn.calls
        assert "\n" not in str(turn.error) and turn.error.reason
    if thinking and END_THINK in text or not thinking:
        rest = text.split(END_THINK, 1)[1] if thinking else text
        assert turn.calls or turn.content == rest  # nothing is lost but a block that was read


@given(messages=conversations(), thinking=THINKING, rule=RULES)
def test_the_mask_is_on_what_the_assistant_says(tokenizers, messages: list, thinking: bool, rule) -> None:
    kept = rule.kept(messages) if thinking else ()
    said = "".join(
        said_text(message, index in kept and ("reasoning_content" in message or bool(message.get("tool_calls"))))
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    )
    for tokenizer in tokenizers:
        ids, mask = encode_messages(messages, tokenizer, thinking, rule)
        assert tokenizer.decode(ids) == render_text(messages, thinking, rule)
        assert tokenizer.decode([token for token, counted in zip(ids, mask, strict=True) if counted]) == said


@given(messages=conversations(max_turns=2), thinking=THINKING, rule=st.sampled_from([V3_2, KEEP_ALL, V4]))
def test_a_user_turn_is_append_only(tokenizers, messages: list, thinking: bool, rule) -> None:
    for message in messages:
        if message["role"] == "assistant":  # what a policy says after <think>
            message.setdefault("reasoning_content", "")
    start = last_of(messages, ("user", "developer")) + 1
    for tokenizer in tokenizers:
        grown = encode_prompt(messages[:start], tokenizer, thinking, rule)
        at = start
        while at < len(messages):
            assert grown == encode_prompt(messages[:at], tokenizer, thinking, rule)
            alone = pieces_of(messages[at : at + 1], thinking, KEEP_ALL)[1:]  # without bos
            grown = grown + ids_of(alone, tokenizer)[0]
            num_results = len(messages[at].get("tool_calls", ()))
            results = [message["content"] for message in messages[at + 1 : at + 1 + num_results]]
            if results:
                grown = grown + encode_tool_results(results, tokenizer, thinking)
            at += 1 + num_results
        assert grown == encode_messages(messages, tokenizer, thinking, rule)[0]


@given(messages=conversations(max_turns=2), thinking=THINKING)
def test_only_markup_makes_special_tokens(tokenizers, messages: list, thinking: bool) -> None:
    for tokenizer in tokenizers:
        vocabulary = tokenizer.get_vocab()
        special = {vocabulary[token] for token in SPECIAL_TOKENS if token in vocabulary}
        ids, _ = encode_messages(messages, tokenizer, thinking)
        expected, _ = encode_messages([blank(message) for message in messages], tokenizer, thinking)
        assert [i for i in ids if i in special] == [i for i in expected if i in special]


@given(messages=conversations(), as_strings=st.booleans())
def test_rows_are_taken_as_they_are(messages: list, as_strings: bool) -> None:
    for message in messages:
        if message.get("reasoning_content") == "":
            del message["reasoning_content"]
        if as_strings and "tool_calls" in message:
            message = message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}
    assert check_messages(messages) == messages
