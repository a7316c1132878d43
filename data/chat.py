"""Conversations -> ids, in the format of the released DeepSeek-V3.2 encoder (without tools).

`bos system <User>question<Assistant><think>reasoning</think>answer eos`: the last question opens with `<think>`, the
earlier ones with `</think>`, and reasoning before the last question is dropped. One departure: where the last answer
has no reasoning, `</think>` follows its question too (the encoder refuses it). An empty `reasoning_content` is a
thought that ends at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.tokenizer import END_THINK, THINK, ChatIds, chat_ids, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]


def check_messages(messages: Any) -> list[dict[str, str]]:
    """A row's `messages` with only the fields we read, or ValueError with the reason in a few words.

    A conversation: an optional system message, then user and assistant in turn, an answer last. Reasoning is in
    `reasoning_content` (or `reasoning`), or in the content between `<think>` and `</think>`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ValueError("messages is not a list with at least one message")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        if not isinstance(content, str) or not isinstance(reasoning, str):
            raise ValueError(f"message {number} has content that is no string")
        (content + reasoning).encode("utf-8")  # a lone surrogate cannot be tokenised; UnicodeError is a ValueError
        if role == "assistant" and not reasoning and content.startswith(THINK) and END_THINK in content:
            reasoning, content = content.removeprefix(THINK).split(END_THINK, 1)
        entry = {"role": role, "content": content}
        checked.append(entry | {"reasoning_content": reasoning} if reasoning else entry)
    turns = [message["role"] for message in checked if message["role"] != "system"]
    system_first = all(message["role"] != "system" for message in checked[1:])
    if not system_first or turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise ValueError("messages do not go (system) user assistant user assistant ...")
    return checked


def _last_user(messages: Sequence[Message]) -> int:
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return users[-1] if users else -1


def _thinks(messages: Sequence[Message], last_user: int, thinking: bool) -> bool:
    """Whether the last question opens a thought: always for a prompt, in a whole conversation where it has one."""
    answers = messages[last_user + 1 :]
    return thinking and (not answers or any("reasoning_content" in message for message in answers))


def _render(messages: Sequence[Message], ids: ChatIds, thinking: bool) -> list[tuple[str | int, bool]]:
    """(text or special id, whether the assistant says it) in order."""
    last = _last_user(messages)
    thinks = _thinks(messages, last, thinking)
    parts: list[tuple[str | int, bool]] = [(ids.bos, False)]
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system":
            parts.append((content, False))
        elif message["role"] == "user":
            opening = ids.think if thinks and index == last else ids.end_think
            parts += [(ids.user, False), (content, False), (ids.assistant, False), (opening, False)]
        else:
            if thinks and index > last:
                parts += [(message.get("reasoning_content", ""), True), (ids.end_think, True)]
            parts += [(content, True), (ids.eos, True)]
    return parts


def encode_messages(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, thinking: bool = True
) -> tuple[list[int], list[int]]:
    """A conversation (as `check_messages` returns it) -> ids and loss mask of the same length, 1 on what the assistant
    says, eos included. `thinking` False drops all reasoning. UserError if the tokenizer lacks a chat token."""
    parts = _render(messages, chat_ids(tokenizer), thinking)
    encoded = iter(encode_texts(tokenizer, [part for part, _ in parts if isinstance(part, str)]))
    ids: list[int] = []
    mask: list[int] = []
    for part, said in parts:
        tokens = next(encoded) if isinstance(part, str) else [part]
        ids += tokens
        mask += [int(said)] * len(tokens)
    return ids, mask


def encode_prompt(
    messages: str | Sequence[Message], tokenizer: PreTrainedTokenizerFast, thinking: bool = True
) -> list[int]:
    """What the policy continues: bos, the conversation up to a question, `<Assistant>`, `<think>` (or `</think>`)."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    assert messages and messages[-1]["role"] == "user", "a prompt ends with a question"
    return encode_messages(messages, tokenizer, thinking)[0]
