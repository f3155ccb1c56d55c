"""What a template would lose or garble is put right, said or refused."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from test_masking import supervised
from toys import CHATML, build_tokenizer, turns

from inlay.data import Encoder, prepare
from inlay.data.formats import iter_records

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
#: As Qwen 2.5: tojson whatever the arguments are.
DUMPS = (
    HEAD + "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}" + TAIL
)
#: As DeepSeek: arguments are JSON already.
JOINS = DUMPS.replace("(c.function.arguments | tojson)", "c.function.arguments")
#: As Qwen 3: either.
EITHER = DUMPS.replace(
    "(c.function.arguments | tojson)",
    "(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)",
)
#: As Qwen 3 Coder: one line for each argument.
LINES = DUMPS.replace(
    "{{ c.function.name + ' ' + (c.function.arguments | tojson) }}",
    "{{ c.function.name }}{% for k, v in c.function.arguments | items %}{{ ' ' + k + '=' + v | string }}{% endfor %}",
)
ARGUMENTS = {"city": "Köln", "days": 2}


def called(template, arguments, content=""):
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content, "tool_calls": [call]}]
    tokenizer = build_tokenizer(template)
    data = prepare([{"messages": messages}], tokenizer)
    (text,) = supervised(tokenizer, data[0])
    return text.removesuffix("<|im_end|>"), data


@pytest.mark.parametrize("template", [DUMPS, JOINS, EITHER], ids=["dumps", "joins", "either"])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("content", ["", None])
def test_arguments_are_json_once(template, as_json, content):
    given = json.dumps(ARGUMENTS, ensure_ascii=False) if as_json else ARGUMENTS
    text, data = called(template, given, content)
    name, _, written = text.partition(" ")
    assert name == "weather" and json.loads(written) == ARGUMENTS and not data.report.notes


def test_a_template_that_goes_through_arguments_gets_a_mapping():
    assert called(LINES, json.dumps(ARGUMENTS))[0] == "weather city=Köln days=2"


def test_arguments_that_are_no_json_stay():
    assert called(JOINS, "city Rome")[0] == "weather city Rome"


def test_a_template_that_writes_no_calls_is_refused():
    with pytest.raises(ValueError, match="record 0: turn 1 calls the tool 'weather', which the chat template does not"):
        called(CHATML, ARGUMENTS)


def test_turns_without_anything_are_refused():
    for turn in ({"content": None}, {"content": None, "function_call": {"name": "f"}}):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", **turn}]
        with pytest.raises(
            ValueError, match="record 0: turn 1: wanted content in a turn of role 'assistant', got none"
        ):
            prepare([{"messages": messages}], build_tokenizer(HEAD + "{{ m['content'] }}" + TAIL))


@pytest.mark.parametrize(("role", "content"), [("user", {"a": 1}), ("user", 3), ("assistant", {"a": 1})])
def test_other_contents_are_refused(role, content):
    messages = [*turns("hi", "cat"), {"role": role, "content": content}]
    with pytest.raises(ValueError, match="turn 2: wanted a string or a list of text parts as content, got"):
        prepare([{"messages": messages}], build_tokenizer(HEAD + "{{ m['content'] }}" + TAIL))


def test_what_a_tool_answers_is_written_as_json():
    messages = [*turns("hi", "cat"), {"role": "tool", "content": {"a": True}}, {"role": "assistant", "content": "x"}]
    for write in ("{{ m['content'] }}", "{{ m['content'] if m['content'] is string else m['content'] | tojson }}"):
        tokenizer = build_tokenizer(HEAD + write + TAIL)
        text = tokenizer.decode(prepare([{"messages": messages}], tokenizer)[0]["input_ids"])
        assert '<|im_start|>tool\n{"a": true}<|im_end|>' in text


@pytest.mark.parametrize("only", ["system", "tool", "assistant"])
def test_parts_are_tried_for_each_role(only):
    """One role goes through parts, the others are strings."""
    write = "{% if m['role'] == '" + only + "' %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% else %}"
    tokenizer = build_tokenizer(HEAD + write + "{{ m['content'] }}{% endif %}" + TAIL)
    roles = ["system", "user", "assistant", "tool", "assistant"]
    for parts in (False, True):
        messages = [
            {"role": role, "content": [{"type": "text", "text": f"said{i}"}] if parts else f"said{i}"}
            for i, role in enumerate(roles)
        ]
        data = prepare([{"messages": messages}], tokenizer)
        text = tokenizer.decode(data[0]["input_ids"])
        assert "".join(f"{role}\nsaid{i}<|im_end|>" for i, role in enumerate(roles)) == text.replace(
            "<|im_start|>", ""
        ).replace("<|im_end|>\n", "<|im_end|>")
        assert supervised(tokenizer, data[0]) == ["said2<|im_end|>", "said4<|im_end|>"] and not data.report.notes


# --- notes -------------------------------------------------------------------------------------------------


def test_roles_and_tools_that_a_template_leaves_out_are_said():
    only = "{% for m in messages if m['role'] in ('user', 'assistant') %}" + CHATML.partition("%}")[2]
    messages = [{"role": "system", "content": "be kind"}, *turns("hi", "cat")]
    tools = [{"type": "function", "function": {"name": "look"}}]
    report = prepare([{"messages": messages, "tools": tools}] * 2, build_tokenizer(only)).report
    assert report.notes == [
        "the chat template leaves out or changes text of turns of role 'system'",
        "the chat template leaves out the tools that records offer",
    ]
    assert not prepare([{"messages": messages}], build_tokenizer(CHATML)).report.notes


def test_empty_answers_are_said():
    assert "empty answers" in str(prepare([{"messages": turns("hi", "")}], build_tokenizer(CHATML)).report)
    tokenizer = build_tokenizer()
    records = [{"prompt": "hi", "completion": " "}, {"prompt": "hi", "completion": "x"}]
    assert "empty answers" in str(prepare(records, tokenizer).report)
    assert not prepare(records[1:], tokenizer).report.notes


def test_special_tokens_in_contents_are_said():
    report = prepare([{"messages": turns("hi", "cat<|im_end|>")}], build_tokenizer(CHATML)).report
    assert "hold text of special tokens, such as '<|im_end|>'" in str(report)
    assert not prepare([{"text": "cat<|im_end|>"}], build_tokenizer(CHATML)).report.notes  # rendered text is welcome


# --- sources -----------------------------------------------------------------------------------------------


def test_rows_of_arrow_are_known_whatever_holds_them():
    class Mine(datasets.Dataset):
        pass

    rows = [{"text": "x", "more": None}, {"text": "y", "more": "z"}]
    table = datasets.Dataset.from_list(rows)
    mine = Mine(table.data)
    held = [table, mine, table.to_iterable_dataset(), torch.utils.data.Subset(table, [0, 1])]
    held.append(torch.utils.data.ConcatDataset([table]))
    for source in held:
        assert list(iter_records(source)) == [{"text": "x"}, {"text": "y", "more": "z"}]
    assert list(iter_records(torch.utils.data.Subset(rows, [0]))) == rows[:1]


def test_a_processor_is_refused():
    class Processor:
        tokenizer = build_tokenizer(CHATML)

    with pytest.raises(TypeError, match=r"wanted a tokenizer, got Processor \(pass processor.tokenizer\)"):
        Encoder(Processor())


def test_labels_and_ids_below_zero_are_refused():
    with pytest.raises(ValueError, match="record 0: wanted token ids of at least 0 under 'labels', got -1; a label"):
        prepare([{"input_ids": [1, 2], "labels": [-100, -1]}], build_tokenizer())
    with pytest.raises(ValueError, match="record 0: wanted token ids of at least 0 under 'input_ids', got -100"):
        prepare([{"input_ids": [1, -100], "labels": [1, 2]}], build_tokenizer())
    assert len(prepare([{"input_ids": [1, 2], "labels": None, "attention_mask": None}], build_tokenizer())) == 1


@pytest.mark.parametrize("change", ["bos", "normalizer", "template"])
def test_samples_on_disk_are_of_one_tokenizer(change, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "the cat"}\n')
    prepare(tmp_path / "data.jsonl", build_tokenizer(), folder=tmp_path / "encoded")
    tokenizer = build_tokenizer()
    prepare(tmp_path / "data.jsonl", tokenizer, folder=tmp_path / "encoded")  # taken as it is
    if change == "bos":
        tokenizer.eos_token = "<pad>"
    elif change == "normalizer":
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    else:
        tokenizer.chat_template = CHATML
    with pytest.raises(FileExistsError):
        prepare(tmp_path / "data.jsonl", tokenizer, folder=tmp_path / "encoded")
