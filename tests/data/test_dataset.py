import pytest
from toys import CHATML, build_tokenizer, turns

from inlay.data import prepare

LONG = {"prompt": "the cat sat on the mat " * 20, "completion": " yes"}
SHORT = {"prompt": "the cat", "completion": " sat on the mat"}


def test_truncation_and_dropping_are_counted():
    tokenizer = build_tokenizer()
    data = prepare([SHORT, LONG, SHORT], tokenizer, max_length=24)
    report = data.report
    assert (report.records, report.samples, report.truncated, report.dropped) == (3, 2, 1, 1)
    assert len(data) == 2 and report.longest == max(len(sample["input_ids"]) for sample in data.samples) <= 24
    assert report.tokens == sum(len(sample["input_ids"]) for sample in data.samples)
    assert report.supervised_tokens == sum(label != -100 for sample in data.samples for label in sample["labels"])
    assert "1 truncated, 1 dropped" in str(report)


def test_truncation_keeps_the_beginning():
    tokenizer = build_tokenizer()
    whole = prepare([SHORT], tokenizer)[0]
    cut = prepare([SHORT], tokenizer, max_length=len(whole["input_ids"]) - 2)[0]
    assert cut["input_ids"] == whole["input_ids"][:-2] and cut["labels"] == whole["labels"][:-2]


def test_all_dropped_says_what_to_do():
    with pytest.raises(ValueError, match=r"got none in all 2 records .* raise max_length \(now 8\)"):
        prepare([LONG, LONG], build_tokenizer(), max_length=8)
    with pytest.raises(ValueError, match="at least one turn with role 'assistant'"):
        prepare([{"messages": turns("only a question")}], build_tokenizer(CHATML))


def test_errors_of_a_template_name_the_record():
    tokenizer = build_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="record 0: roles must alternate"):
        prepare([{"messages": turns("hi", "hello")}], tokenizer)


def test_max_length_is_checked():
    with pytest.raises(ValueError, match="wanted max_length of at least 2, got 0"):
        prepare([SHORT], build_tokenizer(), max_length=0)


def test_chat_template_false_joins_prompt_and_completion():
    tokenizer = build_tokenizer(CHATML)
    assert "<|im_start|>" in tokenizer.decode(prepare([SHORT], tokenizer)[0]["input_ids"])
    assert "<|im_start|>" not in tokenizer.decode(prepare([SHORT], tokenizer, chat_template=False)[0]["input_ids"])
