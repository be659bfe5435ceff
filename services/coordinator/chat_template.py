"""Chat templates: messages of a conversation → the text that the model was trained on.

Owns: the sandbox that templates run in and the helpers they may call. Must not know: tokens.
Templates come with a model and are not trusted: they run in Jinja's immutable sandbox, without access to anything else.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.common.errors import ConfigError, InvalidArgument


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `role` is system, user or assistant."""

    role: str
    content: str


class _TemplateRefusal(Exception):
    """A template called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _to_json(value: object, indent: int | None = None, **options: object) -> str:
    ensure_ascii, sort_keys = bool(options.get("ensure_ascii", False)), bool(options.get("sort_keys", False))
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. `special_tokens` are the names that templates use, such as bos_token.

    Raises ConfigError if the source is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"tokenizer: the chat template is malformed: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation's text, ending where the assistant's reply begins.

        Raises InvalidArgument where the template refuses the messages (say, two of the user's in a row).
        """
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (_TemplateRefusal, jinja2.TemplateError) as error:
            raise InvalidArgument(
                "INVALID_PARAMETER", f"the model's chat template refuses the messages: {error}", field="chat.messages"
            ) from error
