"""Conversations -> ids, as the encoder released with DeepSeek-V3.2 does it, tool calls and all.

    bos system<User>question<Assistant><think>reasoning</think>content [calls] eos
    [function results, then <think>reasoning</think>content [calls] eos, and so on to the end of the user turn]

Reasoning is shown or dropped by a `ContextRule`; where it is dropped, `</think>` stands before the message. Messages
have the OpenAI form with `reasoning_content`; tools and `response_format` are in the system (or developer) message.
Calls are written in DSML (`data.dsml`). Departures from the release, which raises or breaks in the first three:
- An answer without reasoning and without calls opens no thought: `</think>` stands before it. An empty
  `reasoning_content` is a thought that ends at once.
- A developer message stays when a later user message comes (the release drops it, then counts the messages wrong).
- After a malformed block in an assistant's content one result may follow: what was wrong with it.
- Special tokens are special in markup alone, never in what anybody writes (`data.pieces`).
- NaN, infinity and values that cannot be read again as written (`data.dsml.inexpressible`) are refused.
SGLang's and vLLM's copies of the release lack the empty lines of `TOOLS_TEXT`; we follow the release's own test files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.check import check_messages as check_messages
from data.context import ASKING, V3_2, ContextRule, Message
from data.dsml import BLOCK, END_BLOCK, END_INVOKE, END_PARAMETER, Turn, call_pieces, calls_of
from data.pieces import Piece, ids_of, text_of
from data.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOOLS_TEXT = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{BLOCK}" block like the following as part of your reply to the user:
{BLOCK}
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{END_PARAMETER}
...
{END_INVOKE}
<{DSML}invoke name="$FUNCTION_NAME2">
...
{END_INVOKE}
{END_BLOCK}

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

{BLOCK}
...
{END_BLOCK}

<function_results>
...
</function_results>

{THINK}...thinking about results{END_THINK}

Here are the functions available in JSONSchema format:
<functions>
"""
TOOLS_END = "\n</functions>\n"
FORMAT_TEXT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
DEVELOPER_TEXT = "\n\n# The user's message is: "
RESULTS, END_RESULTS = "\n\n<function_results>", "\n</function_results>\n\n"
RESULT, END_RESULT = "\n<result>", "</result>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _thinks(message: Message) -> bool:
    return "reasoning_content" in message or bool(message.get("tool_calls"))


def _extras(message: Message) -> list[Piece]:
    """Tools and response format of a system or developer message."""
    found = []
    if tools := message.get("tools"):
        found += [Piece("\n\n" + TOOLS_TEXT, markup=True)]
        found += [Piece("\n".join(_json(tool["function"]) for tool in tools)), Piece(TOOLS_END, markup=True)]
    if schema := message.get("response_format"):
        found += [Piece("\n\n" + FORMAT_TEXT, markup=True), Piece(_json(schema))]
    return found


def _result(text: str) -> list[Piece]:
    return [Piece(RESULT, markup=True), Piece(text), Piece(END_RESULT, markup=True)]


def pieces_of(messages: Sequence[Message], thinking: bool = True, context: ContextRule = V3_2) -> list[Piece]:
    """The whole conversation, up to an end of the assistant's or to the opening that a prompt ends with."""
    kept = context.kept(messages) if thinking else frozenset()
    shown = {index for index in kept if _thinks(messages[index])}

    def opening(index: int) -> Piece:
        """What stands before message `index`, or at the end of a prompt."""
        opens = index in shown or (thinking and index == len(messages))
        return Piece(THINK if opens else END_THINK, markup=True)

    pieces = [Piece(BOS, markup=True)]
    results = 0  # that are still to come
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "system":
            pieces += [Piece(content), *_extras(message)]
        elif role in ASKING:
            pieces.append(Piece(USER, markup=True))
            pieces += [*_extras(message), Piece(DEVELOPER_TEXT, markup=True)] if role == "developer" else []
            pieces += [Piece(content), Piece(ASSISTANT, markup=True), opening(index + 1)]
        elif role == "tool":
            assert results, "a result without a call"
            pieces += [Piece(RESULTS, markup=True)] if messages[index - 1]["role"] != "tool" else []
            pieces += _result(content)
            results -= 1
            pieces += [] if results else [Piece(END_RESULTS, markup=True), opening(index + 1)]
        else:
            if index in shown:
                reasoning = message.get("reasoning_content") or ""
                pieces += [Piece(reasoning, said=True), Piece(END_THINK, markup=True, said=True)]
            calls = calls_of(message)
            pieces += [Piece(content, said=True), *(call_pieces(calls) if calls else [])]
            pieces.append(Piece(EOS, markup=True, said=True))
            results = len(calls) or 1
    return pieces


def render_text(messages: Sequence[Message], thinking: bool = True, context: ContextRule = V3_2) -> str:
    """The conversation as the released encoder writes it, special tokens spelled out."""
    return text_of(pieces_of(messages, thinking, context))


def encode_messages(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    thinking: bool = True,
    context: ContextRule = V3_2,
) -> tuple[list[int], list[int]]:
    """A conversation (as `check_messages` returns it) -> ids and loss mask of the same length, 1 on what the assistant
    says: reasoning, `</think>`, content, calls, eos. `thinking` False drops all reasoning. UserError if the tokenizer
    lacks a chat token."""
    return ids_of(pieces_of(messages, thinking, context), tokenizer)


def encode_prompt(
    messages: str | Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    thinking: bool = True,
    context: ContextRule = V3_2,
) -> list[int]:
    """What the policy continues: bos, the conversation up to a question or the results of calls, and `<think>` (or
    `</think>`)."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    assert messages and messages[-1]["role"] in (*ASKING, "tool"), "a prompt ends with a question or results"
    return encode_messages(messages, tokenizer, thinking, context)[0]


def encode_tool_results(results: Sequence[str], tokenizer: PreTrainedTokenizerFast, thinking: bool = True) -> list[int]:
    """What follows the assistant's eos inside a user turn, one result a call in the calls' order, up to where the
    policy goes on. Prompt, what it said, eos and this are together what `encode_prompt` makes of the whole, under every
    rule that does not fork at `tool`."""
    assert results, "no results"
    pieces = [Piece(RESULTS, markup=True), *(piece for text in results for piece in _result(text))]
    pieces += [Piece(END_RESULTS, markup=True), Piece(THINK if thinking else END_THINK, markup=True)]
    return ids_of(pieces, tokenizer)[0]


def encode_question(content: str, tokenizer: PreTrainedTokenizerFast, thinking: bool = True) -> list[int]:
    """What follows the assistant's eos where the user speaks again, under a rule that does not fork at `user`."""
    opening = Piece(THINK if thinking else END_THINK, markup=True)
    pieces = [Piece(USER, markup=True), Piece(content), Piece(ASSISTANT, markup=True), opening]
    return ids_of(pieces, tokenizer)[0]


def said_message(turn: Turn, thinking: bool = True) -> dict[str, Any]:
    """What was parsed as a message again, to go on with a conversation."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.content}
    if thinking:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        functions: list[Mapping[str, Any]] = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
        message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    return message
