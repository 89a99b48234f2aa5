"""Conversations and completions as tokens: what is trained on, how rows are packed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from chats import TEMPLATE, UNMARKED, conversations, model_folder, tokenizer, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from shardwright.errors import ConfigError
from shardwright.train.config import JOB_CONFIG, TrainConfig, load_config, read_config
from shardwright.train.conversations import prepare_template, read_documents
from shardwright.train.dataset import IGNORE, TokenRows
from shardwright.train.documents import Document, write_documents
from shardwright.train.packing import check_keeps_apart
from shardwright.train.prepare import prepare
from shardwright.train.records import Record, read_records
from shardwright.train.sections import DataSettings
from shardwright.train.text import read_texts

CHAT, PAIRS = DataSettings(("x",), format="chat"), DataSettings(("x",), format="prompt_completion")


def document(values: Any, data: DataSettings = CHAT, template: str | None = TEMPLATE) -> tuple[str, str]:
    """What the model sees of an example, and what it is trained on."""
    made = tokenizer(template)
    prepare_template(made, data)
    (one,) = read_documents([Record("x.jsonl, line 1,", values)], data, made)
    return str(made.decode(one.ids)), str(made.decode(one.ids[one.trained]))


def test_the_assistants_turns_are_trained_on() -> None:
    messages = [{"role": "system", "content": "be brief"}, *conversations()[4]["messages"]]
    text, trained = document({"messages": messages})
    assert text == "<system>be brief</s><user>4 + 0</s><assistant>4</s><user>4 + 1</s><assistant>5</s>"
    assert trained == "4</s>5</s>"
    everything = DataSettings(("x",), format="chat", loss_on="all")
    assert document({"messages": messages}, everything, UNMARKED) == (text, text)


def test_columns_of_other_names_nulls_and_tools() -> None:
    data = DataSettings(("x",), format="chat", messages_key="talk", tools_key="functions")
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + TEMPLATE.replace(
        "{{ m.content }}</s>{% endgen", "{% if m.tool_calls is defined %}call{% endif %}{{ m.content }}</s>{% endgen"
    )
    talk = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b"}]
    talk[1]["tool_calls"] = None  # a table gives every message every key
    values = {"talk": talk, "functions": [{"name": "add", "more": None}]}
    assert document(values, data, template) == ("add<user>a</s><assistant>b</s>", "b</s>")
    talk[1] = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert document(values, data, template)[1] == "call</s>"


def test_a_completion_is_trained_on_and_ends() -> None:
    end = tokenizer().eos_token
    assert document({"prompt": "1 + 1 =", "completion": " 2"}, PAIRS, None) == (f"1 + 1 = 2{end}", f" 2{end}")
    talk = {
        "prompt": [{"role": "user", "content": "1 + 1"}],
        "completion": [{"role": "assistant", "content": "2"}],
    }
    assert document(talk, PAIRS, UNMARKED) == ("<user>1 + 1</s><assistant>2</s>", "2</s>")


def test_a_prompt_has_the_tokens_that_it_has_alone() -> None:
    made = tokenizer()
    whole, alone = made("what is").input_ids, made("what i").input_ids
    assert whole[: len(alone)] != alone  # the completion's first letter would join the prompt's last token
    (one,) = read_documents([Record("x", {"prompt": "what i", "completion": "s two"})], PAIRS, made)
    assert one.ids[: len(alone)].tolist() == alone
    assert one.trained.tolist() == [False] * len(alone) + [True] * (len(one.ids) - len(alone))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"talk": []},
            "x.jsonl, line 1, has no conversation under the key 'messages' (it has 'talk'). Set data.messages",
        ),
        ({"messages": "hello"}, "has a text under the key 'messages', and not a conversation"),
        ({"messages": []}, "has an empty list under the key 'messages'"),
        (["x"], "is a list and not a mapping with the conversation under the key"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "message 1 of 'messages' must be a mapping with role and content",
        ),
        ({"messages": ["hello"]}, "it has 'str'"),
        ({"messages": [{"role": "human", "content": "a"}]}, "has the role 'human'; roles are system"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "Did you mean 'assistant'?"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "Did you mean 'assistant'?"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "message 1 of 'messages' has the content 3; it must be a text",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "a conversation without an assistant's turn"),
    ],
)
def test_a_wrong_conversation_is_told_with_its_place(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        document(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "a"}, "has no prompt under the key 'prompt' (it has 'question'). Set data.prompt_key"),
        ({"prompt": "a"}, "has no completion under the key 'completion'"),
        ({"prompt": "a", "completion": []}, "has a list under the key 'completion', and not a completion"),
    ],
)
def test_a_wrong_pair_is_told_with_its_place(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        document(values, PAIRS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "The tokenizer has no chat template to write conversations with. Name a file"),
        (UNMARKED, "The chat template does not mark the assistant's turns"),
        ("{{ raise_exception('no system here') }}{% generation %}{% endgeneration %}", "refuses: .*no system here"),
        (
            "{{ messages[0].content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}",
            "marks no token as the assistant's",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_told(template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        document(conversations()[0], template=template)


def test_a_template_from_a_file_is_saved_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    config = run(tmp_path, UNMARKED, f"data.chat_template={tmp_path}/chat.jinja")
    prepare(config, tmp_path / "job", lambda text: None)
    saved = [file.read_text() for file in (tmp_path / "job").rglob("*") if file.suffix in (".jinja", ".json")]
    assert any("endgeneration" in text for text in saved)


def run(folder: Path, template: str | None, *overrides: str, family: str = "llama") -> TrainConfig:
    """A run on conversations in ``folder``, with an empty job folder beside them."""
    model = model_folder(folder / "model", family, template)
    lines = write_lines(folder / "talks.jsonl", conversations())
    (folder / "job").mkdir()
    (folder / "run.yaml").write_text(
        f"model: {{path: {model}}}\ndata: {{paths: {lines}, format: chat, sequence_length: 48}}\nbatch_size: 4\n"
    )
    return load_config(folder / "run.yaml", overrides)


def test_epochs_validation_files_and_what_is_said(tmp_path: Path) -> None:
    held = write_lines(tmp_path / "held.jsonl", conversations(3))
    config = run(tmp_path, TEMPLATE, "epochs=2.5", "data.pack=false", f"data.validation_paths={held}")
    said: list[str] = []
    prepare(config, tmp_path / "job", said.append)
    assert "2.5 epochs of 24 sequences in batches of 4 are 15 steps" in said
    settled = read_config(tmp_path / "job" / JOB_CONFIG)
    assert (settled.steps, settled.epochs) == (15, None)
    assert len(TokenRows(tmp_path / "job" / "validation")) == 3
    assert "of which 2 of" in said[0]
    assert "<user>0 + 0</s><assistant>[bold green]>>0</s><<[/]" in said[0]
    assert any(text.startswith("Validation: 1 files") for text in said)
    with pytest.raises(ConfigError, match=r"epochs is 2 and steps is 5; give one of the two"):
        load_config(tmp_path / "run.yaml", ["epochs=2", "steps=5"])


def test_the_same_examples_from_every_kind_of_file(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(conversations(5))
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    lines = write_lines(tmp_path / "a.jsonl", conversations(5))
    wanted = [record.values for record in read_records([lines])]
    for path in (tmp_path / "a.parquet", tmp_path / "saved", tmp_path / "splits" / "test"):
        found = list(read_records([path]))
        assert [record.values for record in found] == wanted
        assert found[1].where == f"{path}, row 2,"
    with pytest.raises(ConfigError, match=r"holds several datasets. Name one of them: .*splits/train or .*splits/test"):
        list(read_records([tmp_path / "splits"]))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ConfigError, match=r"datasets cannot read .*b\.parquet"):
        list(read_records([tmp_path / "b.parquet"]))
    with pytest.raises(ConfigError, match="has no examples with columns"):
        list(read_records([tmp_path / "a.txt"]))
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).to_parquet(tmp_path / "c.parquet")
    assert [piece.text for piece in read_texts([tmp_path / "c.parquet"], "text")] == ["one", "two"]


def rows(folder: Path, lengths: list[int], **changes: Any) -> tuple[list[Document], TokenRows, Any]:
    """Examples of these lengths, each with ids of its own, of which all tokens but the first are trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        Document(np.arange(100 * (n + 1), 100 * (n + 1) + length, dtype=np.int32), np.ones(length, dtype=bool), f"{n},")
        for n, length in enumerate(lengths)
    ]
    data = DataSettings(("x",), format="chat", sequence_length=8, **changes)
    _, counts = write_documents(made, folder, data)
    return made, TokenRows(folder), counts


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12), pack=st.booleans())
def test_every_example_is_whole_in_one_row(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], pack: bool
) -> None:
    made, found, _ = rows(tmp_path_factory.mktemp("rows"), lengths, pack=pack)
    batch = found.batch(np.arange(len(found)))
    assert found.targets(np.arange(len(found))) == int((batch.labels != IGNORE).sum()) == sum(lengths) - len(lengths)
    assert (batch.position_ids is not None) == pack
    seen = {}
    for row, labels in enumerate(batch.labels.tolist()):
        for column, label in enumerate(labels):
            if label != IGNORE:  # each target follows the token before it, at its place in its example
                assert batch.input_ids[row, column] == label - 1
                place = label % 100 - 1
                assert pack is False or batch.position_ids[row, column] == place  # type: ignore[index]
                seen[label] = row
    assert len(seen) == sum(lengths) - len(lengths)
    for document_ in made:
        assert len({seen[int(i)] for i in document_.ids[1:]}) == 1
    assert pack or len(found) == len(lengths)


def test_rows_are_filled(tmp_path: Path) -> None:
    _, found, _ = rows(tmp_path, [5, 4, 3, 6, 9, 2, 7])
    assert len(found) == 4  # 36 tokens in rows of 9
    assert found.batch(np.array([-1])).labels.tolist() == [[IGNORE] * 8]


def test_examples_that_are_too_long(tmp_path: Path) -> None:
    _, found, counts = rows(tmp_path / "a", [20, 5], pack=False)
    assert (len(found), counts.truncated, counts.tokens) == (2, 1, 14)
    _, found, counts = rows(tmp_path / "b", [20, 5], too_long="drop")
    assert (len(found), counts.dropped) == (1, 1)
    with pytest.raises(ConfigError, match=r"0, has 20 tokens, more than data\.sequence_length = 8 can take"):
        rows(tmp_path / "c", [20, 5], too_long="raise")
    _, found, counts = rows(tmp_path / "d", [1, 5])
    assert (len(found), counts.untrained) == (1, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_models_that_keep_examples_apart(family: str) -> None:
    check_keeps_apart(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", ["mamba2", "bloom", "qwen3_next"])
def test_models_that_do_not_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=rf"{family}.*Set data\.pack=false"):
        check_keeps_apart(AutoConfig.for_model(family))
