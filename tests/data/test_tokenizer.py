"""Round trips on arbitrary text, the 256 ids of `bytes`, determinism of training, reload; text is not markup."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data.tokenizer import (
    BOS,
    DSML,
    EOS,
    NEVER_IN_UTF8,
    PAD,
    SPECIAL_TOKENS,
    byte_letters,
    chat_ids,
    encode_texts,
    load_tokenizer,
)
from tests.data.conftest import TEXTS

HOSTILE = f"a{BOS}<think>b</think> <｜User｜><｜Assistant｜>{EOS}{PAD} <<think>></{DSML}>{DSML}"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_bytes_has_exactly_256_ids_and_specials_where_utf8_has_none(byte_tokenizer) -> None:
    assert len(byte_tokenizer) == 256
    vocab = byte_tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(256))
    assert {vocab[token] for token in SPECIAL_TOKENS} <= set(NEVER_IN_UTF8)
    assert (byte_tokenizer.bos_token, byte_tokenizer.eos_token, byte_tokenizer.pad_token) == (BOS, EOS, PAD)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example(text=HOSTILE)
@example(text=" 's\r\n\t\x00\x7f\U0010ffff日本")
def test_bytes_ids_are_the_bytes_of_the_text(byte_tokenizer, text: str) -> None:
    (ids,) = encode_texts(byte_tokenizer, [text])
    assert bytes(ids) == text.encode("utf-8")
    assert byte_tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
@example(text=HOSTILE)
def test_trained_round_trip(trained_tokenizer, text: str) -> None:
    (ids,) = encode_texts(trained_tokenizer, [text])
    assert trained_tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["byte_tokenizer", "trained_tokenizer"])
def test_a_special_spelling_in_text_is_no_special_token(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    specials = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert specials & set(tokenizer(HOSTILE).input_ids), "the control: transformers' own call does see them"
    assert not specials & set(encode_texts(tokenizer, [HOSTILE])[0])


def test_texts_are_encoded_independently(trained_tokenizer) -> None:
    together = encode_texts(trained_tokenizer, ["", HOSTILE, "left + right", "47"])
    assert together == [encode_texts(trained_tokenizer, [text])[0] for text in ("", HOSTILE, "left + right", "47")]


def test_trained_vocabulary_merges_words_and_never_digits(trained_tokenizer) -> None:
    assert len(trained_tokenizer) == 320
    (ids,) = encode_texts(trained_tokenizer, ["return 1000 left"])
    tokens = trained_tokenizer.convert_ids_to_tokens(ids)
    assert [token for token in tokens if any(c.isdigit() for c in token)] == ["1", "0", "0", "0"]
    assert len(tokens) < len("return 1000 left") - 6


def test_byte_letters_agree_with_the_library() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    piece = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é\n")
    assert "".join(text for text, _ in piece) == "".join(byte_letters()[byte] for byte in "é\n".encode())


def test_training_is_the_same_in_another_process(trained_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    code = (
        "import json, sys; from data.tokenizer import load_tokenizer; texts = json.load(open(sys.argv[1]));"
        "sys.stdout.buffer.write(load_tokenizer('train:320', corpus=texts).backend_tokenizer.to_str().encode())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
    other = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, stdout=subprocess.PIPE).stdout
    assert other.decode() == trained_tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("name", ["byte_tokenizer", "trained_tokenizer"])
@pytest.mark.parametrize("beside", [None, "deepseek_v32", "deepseek_v3"])
def test_reload_through_auto_tokenizer(
    name: str, beside: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    if beside:  # a model's config.json in the same folder must not change the tokenizer's class
        (tmp_path / "config.json").write_text(json.dumps({"model_type": beside}))
    for again in (
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(str(tmp_path)),
        load_tokenizer("auto", tmp_path),
    ):
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert chat_ids(again) == chat_ids(tokenizer) and again.pad_token_id == tokenizer.pad_token_id


def test_auto_without_a_checkpoint_is_bytes(byte_tokenizer) -> None:
    assert load_tokenizer("auto").backend_tokenizer.to_str() == byte_tokenizer.backend_tokenizer.to_str()


def test_mistakes_are_one_line_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder: use bytes, train:VOCAB"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_tokenizer("auto", tmp_path)
    for spec in ("train:many", "train:263"):
        with pytest.raises(UserError, match="VOCAB of 264 or more"):
            load_tokenizer(spec, corpus=TEXTS)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_chat_tokens_says_which(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), eos_token="a")
    with pytest.raises(
        UserError, match="no <think> </think> <｜User｜> <｜Assistant｜> <｜begin▁of▁sentence｜>, which"
    ):
        chat_ids(plain)


def test_dsml_is_the_added_token_where_there_is_one(byte_tokenizer, without_dsml) -> None:
    import copy

    from tokenizers import AddedToken

    assert chat_ids(byte_tokenizer).dsml == byte_tokenizer.convert_tokens_to_ids(DSML) == 0xFA
    assert chat_ids(without_dsml).dsml is None
    text = f"a<{DSML}b"
    (ours,), (theirs,) = encode_texts(without_dsml, [text], [{2}]), encode_texts(without_dsml, [text])
    assert ours == without_dsml(text).input_ids != theirs  # markup, and what somebody wrote
    assert without_dsml.decode(ours) == without_dsml.decode(theirs) == text
    added = copy.deepcopy(without_dsml)
    added.add_tokens([AddedToken(DSML, normalized=False, special=False)])  # as in DeepSeek-V4's
    (dsml,) = added(DSML).input_ids
    assert chat_ids(added).dsml == dsml and dsml not in encode_texts(added, [text])[0]


def test_a_tokenizer_that_cannot_spell_dsml_says_so_when_tools_come() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from data.chat import encode_prompt
    from data.tokenizer import ASSISTANT, END_THINK, THINK, USER

    names = ("U", BOS, EOS, THINK, END_THINK, USER, ASSISTANT)
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="U"))
    poor = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, additional_special_tokens=list(names[3:])
    )
    question = {"role": "user", "content": "U"}
    assert encode_prompt([question], poor) == [1, 5, 0, 6, 3]
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(UserError, match="cannot spell ｜DSML｜, which tool calls need: add it as a token"):
        encode_prompt([{"role": "system", "content": "", "tools": [tool]}, question], poor)
