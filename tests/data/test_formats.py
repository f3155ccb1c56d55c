import json

import pytest

from inlay.data import Conversation, Plain, Tokenized, iter_records, load_records, parse_records

RECORDS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\u2028e"}]


def test_json_and_jsonl_hold_the_same_records(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RECORDS))
    # U+2028 unescaped is legal JSON, and str.splitlines would cut the record there.
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert (
        load_records(tmp_path / "r.json") == load_records(str(tmp_path / "r.jsonl")) == load_records(RECORDS) == RECORDS
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{oops}\n', "line 2: not JSON"),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', "must be called .jsonl"),
        ("a.json", '{"text": "x"}', "wanted .* to hold a list"),
        ("a.csv", "text\nx\n", "wanted a .jsonl, .json or .parquet file"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / name)


def test_missing_file_and_wrong_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_records(tmp_path / "no.jsonl")
    with pytest.raises(TypeError, match="wanted a path, or an iterable of dicts .* got dict"):
        load_records({"text": "x"})


def test_every_format_is_detected():
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    cases = [
        ({"messages": dialogue}, "messages", Conversation(dialogue)),
        ({"messages": dialogue, "tools": [1]}, "messages", Conversation(dialogue, tools=[1])),
        ({"prompt": "q", "completion": "a"}, "prompt/completion", Plain("q", "a")),
        ({"prompt": dialogue[:1], "completion": dialogue[1:]}, "prompt/completion", Conversation(dialogue, 1)),
        ({"text": "t"}, "text", Plain("", "t")),
    ]
    for record, name, example in cases:
        assert parse_records([record], chat=False) == (name, [example])


def test_alpaca_with_and_without_input():
    _, examples = parse_records(
        [
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": "Add", "input": "", "output": "3"},
            {"instruction": "Add", "input": None, "output": "3"},
            {"instruction": "Add", "output": "3"},
        ],
        chat=False,
    )
    assert "### Input:\n1 2\n\n### Response:\n" in examples[0].prompt
    assert "### Input" not in examples[1].prompt and examples[1] == examples[2] == examples[3]
    assert examples[0].completion == "3"


def test_a_chat_template_turns_questions_into_user_turns():
    _, (pair,) = parse_records([{"prompt": "q", "completion": "a"}], chat=True)
    _, (alpaca,) = parse_records([{"instruction": "q", "input": "i", "output": "a"}], chat=True)
    assert [turn["content"] for turn in pair.messages] == ["q", "a"]
    assert [turn["content"] for turn in alpaca.messages] == ["q\n\ni", "a"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "at least one training record"),
        ([{"text": "x"}, "y"], "record 1: wanted a dict, got str"),
        (
            [{"text": "x"}, {"prompt": "a", "completion": "b"}],
            "record 1 is in the prompt/completion format, but record 0",
        ),
        ([{"prompt": "a", "completion": "b", "text": "c"}], "record 0: wanted the keys of one format"),
        ([{"prompt": "a", "completon": "b"}], "did you mean 'completion' instead of 'completon'"),
        ([{"text": "a", "source": "b"}], "remove 'source'"),
        ([{"text": "a"}, {"text": 3}], "record 1: wanted a string under 'text', got int"),
        ([{"instruction": "a", "output": None}], "record 0: wanted a string under 'output'"),
        ([{"messages": []}], "non-empty list of turns"),
        ([{"messages": [{"role": "user"}]}], r"messages\[0\]: wanted a turn like"),
        ([{"messages": ["hi"]}], r"messages\[0\]: wanted a turn like"),
        ([{}], "got no keys"),
    ],
)
def test_bad_records_are_named(records, message):
    with pytest.raises((ValueError, TypeError), match=message):
        parse_records(records, chat=False)


def test_sharegpt_turns_become_messages():
    record = {
        "system": "be brief",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": [{"name": "f"}],
    }
    name, [example] = parse_records([record], chat=True)
    roles = [turn["role"] for turn in example.messages]
    assert name == "sharegpt" and roles == ["system", "user", "assistant", "tool", "assistant"]
    assert example.tools == [{"name": "f"}] and example.messages[1]["content"] == "q"
    for turn in ({"from": "bing", "value": "x"}, {"from": "gpt"}, "x"):
        with pytest.raises(ValueError, match=r"conversations\[0\]: wanted .*'from': one of"):
            parse_records([{"conversations": [turn]}], chat=True)


def test_tokenized_records_are_taken_as_they_are():
    records = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 0]},
        {"input_ids": [4, 5]},
    ]
    name, examples = parse_records(records, chat=True)
    assert name == "tokenized" and examples == [Tokenized([1, 2], [-100, 2]), Tokenized([4, 5], [4, 5])]
    with pytest.raises(ValueError, match="record 0: wanted 2 whole numbers under 'labels'"):
        parse_records([{"input_ids": [1, 2], "labels": [1]}], chat=True)


def test_parquet_and_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}])
    table.to_parquet(tmp_path / "r.parquet")
    assert load_records(tmp_path / "r.parquet") == load_records(table) == list(table)


def test_jsonl_is_read_as_it_is_asked_for(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "x"}\nnot JSON\n')
    records = iter_records(tmp_path / "r.jsonl")
    assert next(records) == {"text": "x"}
    with pytest.raises(ValueError, match="line 2"):
        next(records)
