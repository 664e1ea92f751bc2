"""Chat templates in Jinja: our template in the folders that we write, and a folder's own template.

A folder's own template is a program of other people. It runs in Jinja's sandbox, with the same tools as in `transformers`: loop
controls, `raise_exception`, `strftime_now`, `tojson` without HTML's escapes, and the `generation` block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

BOS, EOS = "<s>", "</s>"
# Names of the special tokens that a template may write.
SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")

# The generation block marks the assistant's part, for transformers' `return_assistant_tokens_mask` and TRL's
# `assistant_only_loss`. Every tag trims both sides: environments differ in what they do with blank lines around tags.
CHAT_TEMPLATE = """\
{%- set system = 1 if messages and messages[0]['role'] == 'system' else 0 -%}
{%- if messages | length <= system -%}
    {{- raise_exception('the conversation has no user message') -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set turn = loop.index0 - system -%}
    {%- set role = 'system' if turn < 0 else ('user' if turn % 2 == 0 else 'assistant') -%}
    {%- if message['role'] != role -%}
        {{- raise_exception('message ' ~ loop.index ~ ' must be of role ' ~ role ~ ', not ' ~ message['role']) -}}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' (' ~ role ~ '): its content must be text') -}}
    {%- endif -%}
    {%- if role != 'system' and message['content'] | trim == '' -%}
        {{- raise_exception('message ' ~ loop.index ~ ' (' ~ role ~ ') is empty') -}}
    {%- endif -%}
    {%- if role == 'system' -%}
        {{- bos_token + '[INST] <<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -}}
    {%- elif role == 'user' -%}
        {{- ('' if turn == 0 and system else bos_token + '[INST] ') + message['content'] + ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}
        {{- ' ' + message['content'] + ' ' + eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""

# Every document begins with `<s>`, as in pre-training. The line break after an answer is not trained on.
CHATML_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
        {{- message['content'] + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_GENERATION = re.compile(r"\s*\{%-?\s*(?:end)?generation\s*-?%\}")
# Open and close the assistant's part in a rendering; characters that Unicode keeps for such use inside a program.
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"


def unmarked(template: str) -> str:
    """A template without its generation blocks' tags: the text that it renders is the same."""
    return _GENERATION.sub("", template)


def is_ours(template: str) -> bool:
    """Whether a folder's template is the one that we write; folders of older versions lack the generation block."""
    return unmarked(template).strip() == unmarked(CHAT_TEMPLATE).strip()


@dataclass(frozen=True)
class FolderTemplate:
    """A folder's own chat template."""

    source: str  # Jinja
    specials: Mapping[str, str]  # bos_token, eos_token, unk_token and perhaps pad_token, as the folder spells them

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, equal to `apply_chat_template(messages, tokenize=False)` of transformers.

        Raises: ValueError where the template refuses the conversation, or is no valid template.
        """
        return self._rendered(messages, add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")

    def render_parts(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """The conversation as consecutive texts, each with whether the assistant says it.

        Without a generation block in the template, an assistant's part is the text that its message adds to the conversation
        before it with a generation prompt.

        Raises: ValueError as `render` does; also where a message changes the text before it, because then no part is certain.
        """
        if "generation" in self._tags:
            parts = re.split(f"{_OPEN}(.*?){_CLOSE}", self._rendered(messages, False), flags=re.DOTALL)
            return [(part, bool(place % 2)) for place, part in enumerate(parts) if part]
        spans: list[tuple[str, bool]] = []
        done = ""
        for end, message in enumerate(messages, 1):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[: end - 1], add_generation_prompt=True)
            after = self.render(messages[:end])
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(
                    f"message {end} (assistant): the folder's chat template changes the text before it, so that the answer's "
                    "tokens cannot be told from the others; put the answer between {% generation %} and {% endgeneration %} "
                    "in the template"
                )
            spans += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        whole = self.render(messages)
        if not whole.startswith(done):
            raise ValueError("the folder's chat template changes earlier messages when others follow: it cannot be trained on")
        spans.append((whole[len(done) :], False))
        return [(text, said) for text, said in spans if text]

    @cached_property
    def _tags(self) -> frozenset[str]:
        return frozenset(re.findall(r"\{%-?\s*(\w+)", self.source))

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.source)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        given = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self.specials
            )
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"the folder's own chat template{line}: {reason}") from None


def own_template(source: str, specials: Sequence[str], named: Mapping[str, str]) -> FolderTemplate | None:
    """A chat template that is not ours; None for ours.

    Args:
        specials: `<s>`, `</s>` and `<unk>` as the tokenizer spells them, in this order, for tokens without a name in `named`.
        named: special tokens by name, such as bos_token, which go first.
    """
    return None if is_ours(source) else FolderTemplate(source, dict(zip(SPECIALS, specials, strict=False)) | dict(named))


class _Generation(Extension):
    """Marks the text of a generation block."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
