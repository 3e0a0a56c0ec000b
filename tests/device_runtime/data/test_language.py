"""Chats, prompts with completions and texts as sequences: ids and what counts are transformers', bad rows are named."""

import gzip
import json
from itertools import chain, pairwise

import numpy as np
import pytest
from chats import TEMPLATES, chat_tokenizer, threads, write_chats
from data_files import jsonl

from fleetune.device_runtime.contracts.manifest import Input, Tokenizer
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError

INPUTS = (
    Input("input_ids", "int64", ("batch", "seq")),
    Input("attention_mask", "int64", ("batch", "seq")),
    Input("labels", "int64", ("batch", "seq"), -100, role="labels"),
)
USER, ANSWER = {"role": "user", "content": "lamp on"}, {"role": "assistant", "content": "it is on"}


@pytest.fixture
def read(make_manifest, tmp_path):
    """Reads a file as (ids, labels) of each sequence, with the tokenizer of a template (None: of no template)."""

    def read(path, template="chatml", *, seq_len=512, columns=Columns(), **options):
        tokenizer = chat_tokenizer(template)
        (tmp_path / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES.get(template or "", ""), newline="")
        described = Tokenizer(
            "tokenizer.json",
            0,
            512,
            chat_template="chat_template.jinja" if template else "",
            special_tokens=tokenizer.special_tokens_map,
        )
        manifest = make_manifest(task="causal-lm", labels=(), tokenizer=described, inputs=INPUTS)
        found = load_dataset(
            path, manifest, tmp_path, seq_len=seq_len, columns=columns, sequences=Sequences(**options)
        )
        return found, list(rows_of(found))

    return read


def rows_of(dataset):
    for i, length in enumerate(dataset.lengths.tolist()):
        batch = dataset.rows(np.array([i]))
        yield batch["input_ids"][0, :length].tolist(), batch["labels"][0, :length].tolist()


def counted(ids, labels):
    """The text of each run of tokens that count."""
    tokenizer, runs = chat_tokenizer(), [[]]
    for token, label in zip(ids, labels, strict=True):
        if label == -100:
            runs.append([])
        else:
            assert token == label
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def masked(ids, mask):
    return [i if m else -100 for i, m in zip(ids, mask, strict=True)]


def by_prompts(tokenizer, messages):
    """Ids and mask as transformers gives them without marks: what follows each generation prompt, up to the next message."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = np.zeros(len(found["input_ids"]), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(
                tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            )
            end = len(tokenizer.apply_chat_template(messages[: i + 1], tokenize=False))
            mask |= [a < end and b > start for a, b in found["offset_mapping"]]
    return found["input_ids"], masked(found["input_ids"], mask)


def test_marked_answers_are_transformers_own_mask(read, tmp_path):
    tokenizer, chats = chat_tokenizer("marked"), threads(50)
    _, rows = read(write_chats(tmp_path / "a.jsonl", chats), "marked")
    assert len(rows) == 50
    for messages, (ids, labels) in zip(chats, rows, strict=True):
        wanted = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == wanted["input_ids"]
        assert labels == masked(ids, wanted["assistant_masks"])


@pytest.mark.parametrize("template", ["chatml", "alternating"])
def test_answers_are_what_follows_transformers_generation_prompts(read, tmp_path, template):
    tokenizer, chats = chat_tokenizer(template), threads(12)
    _, rows = read(write_chats(tmp_path / "a.jsonl", chats), template)
    assert rows == [by_prompts(tokenizer, messages) for messages in chats]


def test_an_answer_that_is_written_otherwise_at_the_end_learns_alone(read, tmp_path):
    """Qwen3 thinks in its last answer alone; so each answer is learned as it is asked for."""
    messages = threads(3)[2]
    _, rows = read(write_chats(tmp_path / "a.jsonl", [messages]), "thinking")
    assert [counted(*row) for row in rows] == [
        [f"<think>\n\n</think>\n\n{messages[i]['content']}<|im_end|>\n"] for i in (1, 3, 5)
    ]
    tokenizer = chat_tokenizer("thinking")
    for (ids, _), length in zip(rows, (2, 4, 6), strict=True):
        assert ids == tokenizer.apply_chat_template(messages[:length], return_dict=True)["input_ids"]


def test_all_counts_where_all_is_asked_for(read, tmp_path):
    path = write_chats(tmp_path / "a.jsonl", threads(1))
    _, ((ids, labels),) = read(path, loss_on="all")
    assert ids == labels


def test_a_tokenizer_without_template_asks_and_answers_on_lines(read, tmp_path):
    path = write_chats(tmp_path / "a.jsonl", [[USER, ANSWER, USER, ANSWER]])
    _, ((ids, labels),) = read(path, None)
    assert chat_tokenizer().decode(ids) == (
        "<s>User: lamp on\nAssistant: it is on<|im_end|>\nUser: lamp on\nAssistant: it is on<|im_end|>\n"
    )
    assert counted(ids, labels) == [" it is on<|im_end|>\n"] * 2


def test_a_completion_counts_and_ends(read, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "lamp on", "completion": " it is on"}])
    _, ((ids, labels),) = read(path)
    assert counted(ids, labels) == [" it is on<|im_end|>"]
    assert ids == chat_tokenizer()("lamp on it is on")["input_ids"] + [chat_tokenizer().eos_token_id]
    _, ((ids, labels),) = read(path, end_of_text=False, loss_on="all")
    assert counted(ids, labels) == ["lamp on it is on"]


def test_prompts_and_completions_may_be_messages(read, tmp_path):
    chat = [USER, ANSWER, USER, ANSWER]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": chat[:3], "completion": chat[3:]}])
    for template, tail in (("chatml", "\n"), ("marked", "")):
        _, ((ids, labels),) = read(path, template)
        assert counted(ids, labels) == [f"it is on<|im_end|>{tail}"]
        assert ids == chat_tokenizer(template).apply_chat_template(chat, return_dict=True)["input_ids"]


def test_texts_count_whole_and_end_once(read, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "lamp on"}, {"text": "lamp off<|im_end|>"}])
    _, rows = read(path)
    assert [counted(*row) for row in rows] == [["lamp on<|im_end|>"], ["lamp off<|im_end|>"]]


def test_a_chat_that_its_template_does_not_end_is_ended(read, tmp_path):
    path = write_chats(tmp_path / "a.jsonl", [[USER, ANSWER]])
    (tmp_path / "b").mkdir()
    bare = "{% for m in messages %}{{ m.content }}{{ '\n' }}{% endfor %}"
    TEMPLATES["bare"] = bare
    try:
        _, ((ids, labels),) = read(path, "bare")
    finally:
        del TEMPLATES["bare"]
    assert counted(ids, labels) == ["it is on\n<|im_end|>"]


def test_every_format_says_the_same(read, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import ipc, parquet

    rows = [{"messages": messages} for messages in threads(4)]
    write_chats(tmp_path / "a.jsonl", threads(4))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    cells = [json.dumps(row["messages"]) for row in rows]
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    (tmp_path / "a.csv").write_text("n,messages\n" + "".join(f"1,{cell}\n" for cell in quoted))
    (tmp_path / "a.tsv").write_text("n\tmessages\n" + "".join(f"1\t{cell}\n" for cell in quoted))
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "saved").mkdir()
    for path in (tmp_path / "a.arrow", tmp_path / "saved" / "data.arrow"):
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    names = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "saved"]
    assert len({read(tmp_path / name)[0].digest for name in names}) == 1


def test_contents_in_parts_are_their_texts(read, tmp_path):
    parts = [{"type": "text", "text": "lamp"}, {"type": "text", "text": " on"}]
    plain = read(write_chats(tmp_path / "a.jsonl", [[USER, ANSWER]]))[0]
    told = read(write_chats(tmp_path / "b.jsonl", [[{**USER, "content": parts, "name": None}, ANSWER]]))[0]
    assert told.digest == plain.digest


def test_columns_of_other_names_are_named(read, tmp_path):
    chat, plain = [USER, ANSWER], read(write_chats(tmp_path / "a.jsonl", [[USER, ANSWER]]))[0]
    path = jsonl(tmp_path / "b.jsonl", [{"talk": chat, "text": "no", "messages": 1}])
    assert read(path, columns=Columns(messages_column="talk"))[0].digest == plain.digest
    rows = jsonl(tmp_path / "c.jsonl", [{"q": "lamp", "a": " on", "messages": chat}])
    columns = Columns(prompt_column="q", completion_column="a")
    assert counted(*read(rows, columns=columns)[1][0]) == [" on<|im_end|>"]
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: no said; there is talk, text, messages"):
        read(path, columns=Columns(text_column="said"))


def test_a_plain_text_file_is_one_document_in_parts(read, tmp_path):
    (tmp_path / "a.txt").write_text("turn the lamp on\r\n\nin the hall\n" * 8, newline="")
    dataset, rows = read(tmp_path / "a.txt", seq_len=16)
    whole = chat_tokenizer()("turn the lamp on\n\nin the hall\n" * 8)["input_ids"]
    new = [
        ids[bool(i) :] for i, (ids, _) in enumerate(rows)
    ]  # a part begins with the last token of the one before
    assert list(chain(*new)) == [*whole, chat_tokenizer().eos_token_id]
    assert max(dataset.lengths) == 16
    assert all(ids[1:] == labels[1:] for ids, labels in rows)
    assert dataset.cut is None


@pytest.mark.parametrize("overlap", [1, 3])
def test_long_texts_are_split_and_each_token_counts_once(read, tmp_path, overlap):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "turn the lamp on in the hall " * 9}])
    _, ((whole, _),) = read(path)
    dataset, rows = read(path, seq_len=16, overlap=overlap)
    assert len(rows) > 2
    assert dataset.cut is None
    new = [ids[overlap * bool(i) :] for i, (ids, _) in enumerate(rows)]
    assert list(chain(*new)) == whole
    for (before, _), (ids, labels) in pairwise(rows):
        assert ids[:overlap] == before[len(before) - overlap :]
        assert labels == [*[-100] * overlap, *ids[overlap:]]


def test_each_part_of_a_chat_begins_as_the_chat_does(read, tmp_path):
    path = write_chats(tmp_path / "a.jsonl", [threads(3)[2]])
    start = chat_tokenizer().bos_token_id
    _, rows = read(path, "alternating", seq_len=40, overlap=4)
    assert len(rows) > 2
    assert all(ids[0] == start for ids, _ in rows)
    assert sum(sum(label != -100 for label in labels) for _, labels in rows) == sum(
        label != -100 for label in read(path, "alternating")[1][0][1]
    )


def test_what_is_cut_away_with_its_answers_is_left_out_and_told(read, tmp_path):
    long = [{"role": "user", "content": "lamp " * 60}, ANSWER]
    dataset, rows = read(write_chats(tmp_path / "a.jsonl", [[USER, ANSWER], long]), seq_len=64)
    assert len(rows) == 1
    assert str(dataset.cut).endswith("are not read; 1 lose every answer, and are left out")
    with pytest.raises(
        DataError, match=r"b\.jsonl: no answer begins within the first 64 tokens of any row; raise --seq-len"
    ):
        read(write_chats(tmp_path / "b.jsonl", [long]), seq_len=64)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": [USER]},
            r"the chat has no answer, no message of the role assistant; add one, leave the row away, or",
        ),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "message 2, an answer, is empty; write one"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role; expected role and content"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "the content of message 2 is no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "message 1 has a part of type 'image_url'; only texts are taken",
        ),
        ({"messages": "[1"}, "its messages are no JSON array of messages"),
        ({"messages": 3}, r"Expected `str \| array \| null`"),
        ({"prompt": "a", "completion": " "}, "the completion is empty; write one, or leave the row away"),
        ({"prompt": [USER], "completion": "a"}, "the prompt is messages and the completion a text"),
        (
            {"prompt": "a"},
            "no messages, or conversations, or prompt and completion, or text; there is prompt; .*--messages-column",
        ),
        ({"messages": None, "text": " "}, "the text is empty"),
        ({"messages": []}, "there is nothing in this row"),
    ],
)
def test_a_bad_row_is_named_with_what_to_do(read, tmp_path, row, said):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, row])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{said}"):
        read(path)


def test_roles_that_do_not_alternate_are_the_rows_fault(read, tmp_path):
    path = write_chats(tmp_path / "a.jsonl", [[USER, ANSWER], [USER, USER, ANSWER]])
    said = (
        r"line 2: the chat template refuses it: Conversation roles must alternate user/assistant/user/assistant/\.\.\.; "
        r"mend its messages, which are of user, user, assistant$"
    )
    with pytest.raises(DataError, match=said):
        read(path, "alternating")


def test_a_template_that_fails_is_the_artifacts_fault(read, tmp_path):
    TEMPLATES["broken"] = "{{ messages[7].content }}"
    try:
        with pytest.raises(
            ArtifactError,
            match=r"a\.jsonl, line 1: .*chat_template\.jinja: the chat template fails: UndefinedError.*; mend the template and",
        ):
            read(write_chats(tmp_path / "a.jsonl", [[USER, ANSWER]]), "broken")
    finally:
        del TEMPLATES["broken"]


def test_an_overlap_leaves_room(read, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "lamp " * 20}])
    with pytest.raises(ConfigError, match="an overlap of 8 tokens leaves nothing new in sequences of 8"):
        read(path, seq_len=8, overlap=8)
    with pytest.raises(ConfigError, match="overlap must be at least 0"):
        read(path, overlap=-1)


def test_options_of_texts_are_refused_for_other_tasks(load, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hi", "label": 0}])
    with pytest.raises(ConfigError, match="overlap, packing: only for texts of a causal language model"):
        load(path, sequences=Sequences(overlap=2, packing=True))


TOOLS = [
    {"type": "function", "function": {"name": "switch", "parameters": {"type": "object", "properties": {}}}}
]
CALL = {"type": "function", "function": {"name": "switch", "arguments": {"thing": "lamp", "on": True}}}
TOOL_CHAT = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "done"}, ANSWER]


def by_transformers(messages, tools):
    return chat_tokenizer("tools").apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]


def test_chats_as_sharegpt_has_them_are_those_of_messages(read, tmp_path):
    chats = threads(6)
    known = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": known[m["role"]], "value": m["content"]} for m in chat] for chat in chats]
    shared[2] = [{"from": "system", "value": "be short"}, *shared[2]]
    chats[2] = [{"role": "system", "content": "be short"}, *chats[2]]
    rows = [
        {"conversations": chat} if i % 2 else {"conversations": json.dumps(chat)}
        for i, chat in enumerate(shared)
    ]
    _, found = read(jsonl(tmp_path / "a.jsonl", rows))
    _, wanted = read(write_chats(tmp_path / "b.jsonl", chats))
    assert found == wanted
    _, renamed = read(
        jsonl(tmp_path / "c.jsonl", [{"talk": chat} for chat in shared]),
        columns=Columns(messages_column="talk"),
    )
    assert renamed == wanted


def test_chats_with_tools_are_transformers_own(read, tmp_path):
    texts = {"name": "switch", "arguments": json.dumps(CALL["function"]["arguments"])}
    shared = [
        {"from": "human", "value": "lamp on"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "done"},
        {"from": "gpt", "value": "it is on"},
    ]
    said = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": texts}]},
        *TOOL_CHAT[2:],
    ]
    rows = [
        {"messages": TOOL_CHAT, "tools": TOOLS},
        {"messages": json.dumps(said), "tools": json.dumps(TOOLS)},
        {"conversations": shared, "tools": TOOLS},
        {"prompt": TOOL_CHAT[:3], "completion": TOOL_CHAT[3:], "tools": TOOLS},
        {"messages": TOOL_CHAT, "tools": None},
    ]
    for number, row in enumerate(rows):
        _, ((ids, labels),) = read(jsonl(tmp_path / f"{number}.jsonl", [row]), "tools")
        assert ids == by_transformers(TOOL_CHAT, row["tools"] and TOOLS)
        called = [f"<call>{json.dumps(CALL['function'])}</call><|im_end|>\n"] if "prompt" not in row else []
        assert counted(ids, labels) == [*called, "it is on<|im_end|>\n"]


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        ({"messages": [USER, ANSWER], "tools": TOOLS}, "chatml", "does not write tools; leave it away"),
        ({"messages": [USER, ANSWER], "tools": TOOLS}, None, "does not write tools"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}, TOOL_CHAT[2], ANSWER]},
            "chatml",
            "does not write the tool calls of message 2",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": [CALL]}, *TOOL_CHAT[2:]]}, "alternating", "roles must alternate"),
        ({"messages": [USER, ANSWER], "tools": "[1"}, "tools", "its tools are no JSON array of tools"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "tools", "message 2 calls a tool without a name"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}]},
            "tools",
            "the arguments of 'a' are no JSON object",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "dog", "value": "b"}]}, "chatml",
         "message 2 is from 'dog'; expected one of"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "chatml", "the chat has no answer"),
        ({"conversations": [{"from": "human", "value": 3}]}, "chatml", "the content of message 1 is no text"),
    ],
)  # fmt: skip
def test_what_no_template_writes_or_no_chat_is_is_named(read, tmp_path, row, template, said):
    with pytest.raises((DataError, ArtifactError), match=f"a.jsonl, line 1: .*{said}"):
        read(jsonl(tmp_path / "a.jsonl", [row]), template)
