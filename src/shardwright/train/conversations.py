"""Conversations, and prompts with their completions, as token ids, with which of them are trained on.

The tokenizer's chat template writes a conversation. Templates mark the assistant's turns with ``{% generation %}``, and
transformers hands out the tokens inside of these marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from shardwright.errors import ConfigError
from shardwright.train.documents import Document
from shardwright.train.encoding import around, tokenize, without
from shardwright.train.records import Record
from shardwright.train.sections import DataSettings
from shardwright.untrusted import ToldAs, read_file, shown, usable_path

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_TEMPLATE_BYTES = 2**20


def prepare_template(tokenizer: PreTrainedTokenizerBase, data: DataSettings) -> None:
    """Give ``tokenizer`` the chat template of ``data``, where it has one, and check that it can be used.

    Raises:
        ConfigError: conversations without any template; a template without marks, where the assistant's turns are to
            be trained on; a tokenizer that cannot say where its tokens come from.
    """
    if data.chat_template is not None:
        path = usable_path(data.chat_template, "data.chat_template", ConfigError)
        with ToldAs(ConfigError, f"data.chat_template is {path}, which is not UTF-8 text"):
            tokenizer.chat_template = read_file(path, ConfigError, _TEMPLATE_BYTES).decode()
    if data.format != "chat":
        return
    template = _template(tokenizer)
    if data.loss_on == "all":
        return
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not say which characters a token comes from, so that the assistant's "
            "turns cannot be found. Use a tokenizer with a tokenizer.json, or data.loss_on=all."
        )
    if not _MARK.search(template):
        raise ConfigError(
            "The chat template does not mark the assistant's turns, so it is not known which tokens to train on. Save "
            "it as a file, put {% generation %} before and {% endgeneration %} after what the assistant writes (its "
            "end-of-turn token with it), and name the file in data.chat_template. Or train on every token with "
            "data.loss_on=all."
        )


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "The tokenizer has no chat template to write conversations with. Name a file with one in "
            "data.chat_template; its Jinja text is given messages with role and content."
        )
    with ToldAs(ConfigError, "The tokenizer's chat templates cannot be used"):
        return tokenizer.get_chat_template()


def read_documents(
    records: Iterable[Record], data: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document]:
    """Each example in tokens.

    Raises:
        ConfigError: a record without the column, of another form, or that the template refuses; the message has file
            and line.
    """
    read = _chat if data.format == "chat" else _prompt_completion
    for record in records:
        yield read(record, data, tokenizer)


def _chat(record: Record, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Document:
    messages = _messages(record, data.messages_key, "data.messages_key")
    answers = data.loss_on == "answers"
    if answers and all(message["role"] != "assistant" for message in messages):
        raise ConfigError(f"{record.where} has a conversation without an assistant's turn, so nothing to train on.")
    ids, mask = _written(record, messages, data, tokenizer, marked=answers)
    if answers and not any(mask):
        raise ConfigError(
            f"{record.where} has a conversation of which the chat template marks no token as the assistant's. Its "
            "{% generation %} must be around what the assistant writes."
        )
    return _document(record, ids, [bool(one) for one in mask] if answers else [True] * len(ids))


def _prompt_completion(record: Record, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Document:
    _column(record, data.prompt_key, "prompt", "data.prompt_key", (str, list))
    prompt = record.values[data.prompt_key]
    _column(record, data.completion_key, "completion", "data.completion_key", (type(prompt),))
    if isinstance(prompt, str):
        before, ids = _joined(prompt, record.values[data.completion_key], tokenizer)
    else:
        _template(tokenizer)
        prompt = _messages(record, data.prompt_key, "data.prompt_key")
        completion = _messages(record, data.completion_key, "data.completion_key")
        before, _ = _written(record, prompt, data, tokenizer, add_generation_prompt=True)
        ids, _ = _written(record, [*prompt, *completion], data, tokenizer)
        if without(before, ids) is None:
            raise ConfigError(
                f"{record.where} has a prompt that the chat template writes otherwise when its completion follows, so "
                "that the completion's tokens cannot be told. Give it as a conversation, with data.format=chat."
            )
    answers = data.loss_on == "answers"
    return _document(record, ids, [not answers or place >= len(before) for place in range(len(ids))])


def _joined(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and those of both. The prompt has the tokens that it has alone, as when a model answers
    it; the completion those that follow in the joined text, where the prompt's are the same there."""
    first, final = around(tokenizer)
    before, joined = tokenize(tokenizer, [prompt, prompt + completion])
    answer = without(before, joined)
    if answer is None:
        (answer,) = tokenize(tokenizer, [completion])
    end = tokenizer.eos_token_id
    answer = [*answer, *final]
    if end is not None and answer[-1:] != [end]:
        answer.append(end)
    return [*first, *before], [*first, *before, *answer]


def _written(
    record: Record,
    messages: list[dict[str, Any]],
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    marked: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """The ids of ``messages`` by the chat template, and (``marked``) which are the assistant's."""
    tools = record.values.get(data.tools_key)
    with ToldAs(ConfigError, f"{record.where} has a conversation that the chat template refuses"):
        told: Any = tokenizer.apply_chat_template(
            messages,
            tools=_without_nulls(tools) or None,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
            return_assistant_tokens_mask=marked,
        )
    return list(told["input_ids"]), list(told["assistant_masks"]) if marked else []


def _document(record: Record, ids: list[int], trained: list[bool]) -> Document:
    return Document(np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=bool), record.where)


def _column(record: Record, key: str, wanted: str, setting: str, kinds: tuple[type, ...]) -> None:
    value = record.values.get(key) if isinstance(record.values, dict) else None
    if not isinstance(value, kinds):
        raise ConfigError(f"{record.lacks(key, wanted)} Set {setting} to the key of the {wanted}.")


def _messages(record: Record, key: str, setting: str) -> list[dict[str, Any]]:
    """The messages under ``key``, checked, and without keys that hold nothing (tables give every message all keys)."""
    _column(record, key, "conversation", setting, (list,))
    messages = record.values[key]
    if not messages:
        raise ConfigError(f"{record.where} has an empty list under the key {key!r}, and no conversation.")
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ROLES and (isinstance(message.get("content"), str | list) or role == "assistant"):
            continue
        what = f"{record.where} message {number} of {key!r}"
        if not isinstance(message, dict) or "role" not in message:
            there = ", ".join(map(repr, message)) if isinstance(message, dict) else type(message).__name__
            hint = (
                " Rename from to role and value to content." if isinstance(message, dict) and "from" in message else ""
            )
            raise ConfigError(f"{what} must be a mapping with role and content; it has {shown(there)}.{hint}")
        if role not in ROLES:
            near = _OTHER_NAMES.get(str(role).lower()) or next(iter(get_close_matches(str(role), ROLES, n=1)), None)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ConfigError(f"{what} has the role {shown(role)}; roles are {', '.join(ROLES)}.{hint}")
        raise ConfigError(f"{what} has the content {shown(message.get('content'))}; it must be a text.")
    return [_without_nulls(message) for message in messages]


def _without_nulls(value: Any) -> Any:
    """``value`` without entries of mappings that are null, except for a message's content."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None or key == "content"}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
