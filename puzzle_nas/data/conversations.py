"""Conversations as data sets hold them: `messages` (role, content) and `conversations` (from, value)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_nas.errors import DataError
from puzzle_nas.parents.chat import Message

COLUMNS = ("messages", "conversations")
"""Where rows without a text column hold a conversation."""
SYSTEM = "system"
"""The column of a row's system message, where it is kept apart."""
TOOLS = "tools"
"""The column of what the assistant may call: a list of JSON schemas, or that list written as JSON."""
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
"""Roles by the names that data sets give them; a template takes any other as it is."""


@dataclass(frozen=True)
class Conversation:
    """Messages, each with `role` and `content` (text), and the tools that the assistant has."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()

    def __len__(self) -> int:
        """Characters of its texts."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def is_blank(self) -> bool:
        """Whether nobody says anything."""
        return not any(message["content"].strip() for message in self.messages)

    def to_json(self) -> str:
        """The same text for the same conversation."""
        everything = [*self.messages, {TOOLS: self.tools}] if self.tools else self.messages
        return json.dumps(everything, sort_keys=True, default=str)


def messages_in(value: Any) -> list[Any] | None:
    """A row's list of messages, also where it is written as JSON, or as an object of lists; None of anything else."""
    if isinstance(value, str):
        return _written_messages(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # So `datasets` keeps sequences of objects.
        return [dict(zip(value, entries, strict=False)) for entries in zip(*value.values(), strict=False)]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return value
    return None


def _written_messages(text: str) -> list[Any] | None:
    """Messages that a text column holds as JSON; None of other text, of other JSON too."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    pairs = ({"role", "content"}, {"from", "value"})
    are_messages = value and all(isinstance(e, dict) and any(pair <= e.keys() for pair in pairs) for e in value)
    return value if are_messages else None


def conversation_of(value: Sequence[Any], where: str, system: Any = None, tools: Any = None) -> Conversation:
    """From a row's list of messages; `where` names the row.

    Args:
        system: the text of a system message that the row keeps apart.
        tools: what the row says that the assistant may call.

    Raises:
        DataError: an entry is not a message, or holds something other than text; or tools are no list of objects.
    """
    messages = [_message(entry, where) for entry in value]
    if messages and messages[0]["role"] != "system" and isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, _tools(tools, where))


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where} holds '{TOOLS}' that are no JSON; mend or leave out that column.") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where} holds '{TOOLS}' that are no list of JSON schemas; mend or leave out that column.")
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Tables give every field of every object, null where one has none; a template would write those."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _message(entry: Any, where: str) -> Message:
    said = entry.get("role") or entry.get("from")
    if said is None:
        raise DataError(f"{where} holds a message without role and content (or from and value): {entry!r:.60}.")
    role = ROLES.get(str(said).lower(), said if "role" in entry else None)
    if not isinstance(role, str):
        raise DataError(f"{where} holds a message from {said!r:.40}; known: {', '.join(ROLES)}.")
    others = {k: v for k, v in _without_nulls(entry).items() if k not in ("role", "content", "from", "value")}
    for call in others.get("tool_calls") or ():
        _read_arguments(call)
    return {"role": role, "content": _text(entry.get("content", entry.get("value")), where), **others}


def _read_arguments(call: Any) -> None:
    """In place: arguments as the object that templates expect, where they are kept as its JSON, as servers send it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return
        if isinstance(arguments, dict):
            function["arguments"] = arguments


def _text(content: Any, where: str) -> str:
    """Text, its parts joined; null, as in a message that only calls tools, is empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        kinds = sorted({str(p.get("type", "unknown")) for p in parts if isinstance(p, dict) and not p.get("text")})
        raise DataError(f"{where} holds a message that is not text ({', '.join(kinds) or 'unknown'}); leave it out.")
    return "".join(texts)
