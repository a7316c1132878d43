"""The encoding of `data.chat` as a Jinja template, for `apply_chat_template` of transformers and of servers.

A run saves it with a tokenizer that has chat tokens and no template. One that a tokenizer brings is kept, even where it
writes another format than the model learns here (DeepSeek-V3's, say): then serve with `chat_template=CHAT_TEMPLATE`.

`thinking` (or `enable_thinking`) is true unless given. Messages are as `data.check` returns them, tools beside them or
in them; `arguments` are objects, for Jinja cannot read JSON. The context rule is V3.2's. The whole prompt is tokenised
at once, so unlike in `data.chat` a special token that a user or a tool spells out becomes that token.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from conf.errors import UserError
from data.chat import (
    DEVELOPER_TEXT,
    END_RESULT,
    END_RESULTS,
    FORMAT_TEXT,
    RESULT,
    RESULTS,
    TOOLS_END,
    TOOLS_TEXT,
)
from data.dsml import BLOCK, END_BLOCK, END_INVOKE, END_PARAMETER
from data.tokenizer import ASSISTANT, DSML, END_THINK, THINK, USER, chat_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _quoted(text: str) -> str:
    """As a string in Jinja."""
    return json.dumps(text, ensure_ascii=False)


_TEMPLATE = """
{%- set ns = namespace(last=-1, missing=0) -%}
{%- set thinks = thinking if thinking is defined else (enable_thinking if enable_thinking is defined else true) -%}
{%- for message in messages -%}
  {%- if message.role in ["user", "developer"] -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}

{#- what stands before message `index`: the thought is shown since the last question, where there is one -#}
{%- macro shown(index) -%}
  {%- set message = messages[index] -%}
  {%- if thinks and index > ns.last and message.role == "assistant" and (message.tool_calls or message.reasoning
      or (message.reasoning_content is defined and message.reasoning_content is not none)) -%}1{%- endif -%}
{%- endmacro -%}
{%- macro opening(index) -%}
  {%- if index == messages | length -%}{{- THINK if thinks else END_THINK -}}
  {%- else -%}{{- THINK if shown(index) else END_THINK -}}{%- endif -%}
{%- endmacro -%}
{%- macro extras(schemas, format) -%}
  {%- if schemas -%}
    {{- "\\n\\n" + TOOLS_TEXT -}}
    {%- for tool in schemas -%}
      {{- tool.function | tojson -}}{%- if not loop.last -%}{{- "\\n" -}}{%- endif -%}
    {%- endfor -%}
    {{- TOOLS_END -}}
  {%- endif -%}
  {%- if format -%}{{- "\\n\\n" + FORMAT_TEXT -}}{{- format | tojson -}}{%- endif -%}
{%- endmacro -%}
{%- macro block(calls) -%}
  {{- "\\n\\n" + BLOCK + "\\n" -}}
  {%- for call in calls -%}
    {%- if call.function.arguments is not mapping -%}
      {{- raise_exception("arguments of a call are no object: give them parsed, not as a string of JSON") -}}
    {%- endif -%}
    {{- '<' + DSML + 'invoke name="' + call.function.name + '">\\n' -}}
    {%- for key, value in call.function.arguments.items() -%}
      {%- if not loop.first -%}{{- "\\n" -}}{%- endif -%}
      {{- '<' + DSML + 'parameter name="' + key + '" string="' -}}
      {%- if value is string -%}{{- 'true">' + value -}}{%- else -%}{{- 'false">' -}}{{- value | tojson -}}{%- endif -%}
      {{- END_PARAMETER -}}
    {%- endfor -%}
    {{- "\\n" + END_INVOKE + "\\n" -}}
  {%- endfor -%}
  {{- END_BLOCK -}}
{%- endmacro -%}

{{- bos_token -}}
{%- if tools and (not messages or messages[0].role != "system") -%}{{- extras(tools, none) -}}{%- endif -%}
{%- for message in messages -%}
  {%- set content = message.content or "" -%}
  {%- set ends = loop.last and not add_generation_prompt -%}
  {%- if message.role == "system" -%}
    {{- content -}}
    {{- extras((tools or message.tools) if loop.first else message.tools, message.response_format) -}}
  {%- elif message.role in ["user", "developer"] -%}
    {{- USER -}}
    {%- if message.role == "developer" -%}
      {{- extras(message.tools, message.response_format) + DEVELOPER_TEXT -}}
    {%- endif -%}
    {{- content -}}
    {%- if not ends -%}{{- ASSISTANT + opening(loop.index) -}}{%- endif -%}
  {%- elif message.role == "tool" -%}
    {%- if messages[loop.index0 - 1].role != "tool" -%}{{- RESULTS -}}{%- endif -%}
    {{- RESULT + content + END_RESULT -}}
    {%- set ns.missing = ns.missing - 1 -%}
    {%- if ns.missing == 0 -%}{{- END_RESULTS -}}{%- endif -%}
    {%- if ns.missing == 0 and not ends -%}{{- opening(loop.index) -}}{%- endif -%}
  {%- elif message.role == "assistant" -%}
    {%- if shown(loop.index0) -%}{{- (message.reasoning_content or message.reasoning or "") + END_THINK -}}{%- endif -%}
    {{- content -}}
    {%- if message.tool_calls -%}{{- block(message.tool_calls) -}}{%- endif -%}
    {{- eos_token -}}
    {%- set ns.missing = message.tool_calls | length if message.tool_calls else 1 -%}
  {%- else -%}
    {{- raise_exception("unknown role: " + message.role) -}}
  {%- endif -%}
{%- endfor -%}
"""
_TEXTS = {
    "THINK": THINK, "END_THINK": END_THINK, "USER": USER, "ASSISTANT": ASSISTANT, "DSML": DSML,
    "BLOCK": BLOCK, "END_BLOCK": END_BLOCK, "END_INVOKE": END_INVOKE, "END_PARAMETER": END_PARAMETER,
    "RESULTS": RESULTS, "END_RESULTS": END_RESULTS, "RESULT": RESULT, "END_RESULT": END_RESULT,
    "TOOLS_TEXT": TOOLS_TEXT, "TOOLS_END": TOOLS_END, "FORMAT_TEXT": FORMAT_TEXT, "DEVELOPER_TEXT": DEVELOPER_TEXT,
}  # fmt: skip
_SETS = "".join(f"{{%- set {name} = {_quoted(text)} -%}}\n" for name, text in _TEXTS.items())
CHAT_TEMPLATE = _SETS + _TEMPLATE.lstrip()


def with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer; gives it the template if it has chat tokens and no template."""
    try:
        chat_ids(tokenizer)
    except UserError:  # a base model's: it cannot write conversations
        return tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
