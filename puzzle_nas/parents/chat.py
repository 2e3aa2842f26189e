"""A tokenizer's chat template: tried once, in the form of messages that it takes."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jinja2

from puzzle_nas.errors import ChatTemplateError

Message = Mapping[str, Any]
"""`role` and `content` (text), and whatever else a template may read."""

TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What templates raise: on purpose, or as they were not written for what they are given."""
SYSTEM_MESSAGE = {"role": "system", "content": "You are a helpful assistant."}
"""For templates that do not write conversations without one."""
MARKS = ("QUESTIONONE", "ANSWERONE", "QUESTIONTWO")
"""Stand for the texts of a conversation, to see where a template puts them."""


def on_a_fixed_day(form: str) -> str:
    """For templates that write today's date (`strftime_now`): data must be the same tomorrow."""
    return datetime.date(2025, 1, 1).strftime(form)


def marked_conversation(answer: str = MARKS[1]) -> list[Message]:
    """Question, answer, question."""
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, (MARKS[0], answer, MARKS[2]), strict=True)]


@dataclass(frozen=True)
class ChatTemplate:
    """A template that writes conversations, and what it wants them to look like."""

    tokenizer: Any
    wants_system: bool = False
    """Whether a conversation must begin with a system message."""
    wants_parts: bool = False
    """Whether content must be a list of parts."""

    @classmethod
    def of(cls, tokenizer: Any, messages: Sequence[Message] | None = None) -> ChatTemplate | None:
        """The tokenizer's, None where it has none.

        Args:
            messages: what it must be able to write; None means two questions with an answer between them.

        Raises:
            ChatTemplateError: it fails, or leaves messages out, in every form.
        """
        if not tokenizer.chat_template:
            return None
        messages = marked_conversation() if messages is None else messages
        reason = None
        for wants_parts, wants_system in product((False, True), repeat=2):
            template = cls(tokenizer, wants_system, wants_parts)
            try:
                text = template.render(messages, add_generation_prompt=True)
            except ChatTemplateError as error:
                reason = reason or str(error)
                continue
            if all(message["content"] in text for message in messages):
                return template
        raise ChatTemplateError(reason or "it leaves messages out")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any) -> str:
        """A conversation as text; `variables` are the template's own.

        Raises:
            ChatTemplateError: the template refuses it; the message is the reason alone.
        """
        messages = list(messages)
        if self.wants_system and messages[0]["role"] != "system":
            messages.insert(0, SYSTEM_MESSAGE)
        if self.wants_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        except TEMPLATE_ERRORS as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ChatTemplateError(first_line[:200].rstrip(".")) from error

    @property
    def wants(self) -> str:
        """What it must be given besides messages of text; an empty text where that is nothing."""
        wants = {"a system message": self.wants_system, "content in parts": self.wants_parts}
        return " and ".join(what for what, is_so in wants.items() if is_so)

    @property
    def drops_thoughts(self) -> bool:
        """Whether what an earlier answer thought is left out of the conversation that follows."""
        thinking = marked_conversation(f"<think>\nTHOUGHTONE\n</think>\n\n{MARKS[1]}")
        try:
            text = self.render(thinking, add_generation_prompt=True)
        except ChatTemplateError:
            return False
        return "THOUGHTONE" not in text and MARKS[1] in text
