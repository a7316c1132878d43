"""The Jinja template in a saved tokenizer's folder gives the ids of `data.chat`; text here spells no special token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import check_messages, encode_messages, encode_prompt
from data.chat_template import CHAT_TEMPLATE, with_template
from data.tokenizer import load_tokenizer
from tests.data.conversations import PLAIN, conversations
from tests.data.test_chat import GOLDEN


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As a user of the export has it: through AutoTokenizer, from files."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("exported")
    with_template(load_tokenizer("bytes")).save_pretrained(folder)
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def by_template(tokenizer: Any, messages: list, thinking: bool = True, **more: Any) -> list[int]:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False} | more
    found: list[int] = tokenizer.apply_chat_template(messages, thinking=thinking, **options)
    return found


@given(messages=conversations(PLAIN), thinking=st.booleans(), cut=st.booleans())
def test_any_conversation(exported, byte_tokenizer, messages: list, thinking: bool, cut: bool) -> None:
    end = max(i for i, message in enumerate(messages) if message["role"] != "assistant") + 1
    whole = messages[:end] if cut else messages
    assert by_template(exported, whole, thinking) == encode_messages(whole, byte_tokenizer, thinking)[0]


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_the_released_encoders_text(case: dict, exported) -> None:
    answer = [{"role": "assistant", "content": "A"}]
    messages = case["messages"]
    if case["name"] != "user_twice":  # which no row may be
        asks = messages[-1]["role"] in ("user", "developer")
        messages = check_messages(messages + answer)[:-1] if asks else check_messages(messages)  # arguments as objects
    for mode in ("thinking", "chat"):
        found = exported.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=mode == "thinking"
        )
        assert found == case[mode]


def test_tools_beside_the_messages(exported, byte_tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "ü <b>", "parameters": {"type": "object"}}}
    for messages in (
        [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}],
    ):
        checked = check_messages(messages, [tool])
        assert by_template(exported, messages, tools=[tool]) == encode_messages(checked, byte_tokenizer)[0]
        asked = by_template(exported, messages[:-1], tools=[tool])
        assert asked == encode_prompt(checked[:-1], byte_tokenizer)


def test_without_a_generation_prompt_nothing_is_opened(exported) -> None:
    text = exported.apply_chat_template([{"role": "user", "content": "U"}], tokenize=False)
    assert text.endswith("<｜User｜>U")


def test_arguments_as_a_string_are_refused(exported) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(Exception, match="give them parsed"):
        exported.apply_chat_template(messages, tokenize=False)


def test_a_template_that_is_there_stays(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    theirs = load_tokenizer("bytes")
    theirs.chat_template = "{{ messages }}"
    assert with_template(theirs).chat_template == "{{ messages }}"
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), eos_token="a")
    assert with_template(plain).chat_template is None  # it cannot write conversations
