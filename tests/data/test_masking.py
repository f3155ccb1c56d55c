import pytest
from toys import CHATML, ENDLESS, REWRITING, build_tokenizer, turns

from inlay.data import Conversation, Encoder, Plain, show_mask
from inlay.data.masking import IGNORED


def supervised(tokenizer, sample):
    """The supervised runs, each decoded from its own tokens."""
    runs, open_run = [], False
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (IGNORED, token)  # a label is the token itself: the model shifts
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], token]] if open_run else [*runs, [token]]
        open_run = label != IGNORED
    return [tokenizer.decode(run) for run in runs]


def encode_one(tokenizer, example, **options):
    samples = Encoder(tokenizer, **options).encode(example)
    assert len(samples) == 1
    return samples[0]


def test_plain_completion_and_eos_are_supervised():
    tokenizer = build_tokenizer()
    sample = encode_one(tokenizer, Plain("the cat:", " sat"))
    prompt = tokenizer("the cat:")["input_ids"]
    completion = tokenizer(" sat")["input_ids"] + [tokenizer.eos_token_id]
    assert sample["input_ids"] == prompt + completion
    assert sample["labels"] == [IGNORED] * len(prompt) + completion


def test_prompt_tokens_are_those_of_the_prompt_alone():
    # "th" + "e cat" would merge into "the"; generation starts from the tokens of "th".
    tokenizer = build_tokenizer()
    joined, prompt = tokenizer("the cat")["input_ids"], tokenizer("th")["input_ids"]
    assert joined[: len(prompt)] != prompt
    sample = encode_one(tokenizer, Plain("th", "e cat"))
    assert sample["input_ids"][: len(prompt)] == prompt
    assert supervised(tokenizer, sample) == ["e cat<|im_end|>"]


def test_text_and_train_on_inputs_supervise_everything():
    tokenizer = build_tokenizer(CHATML)
    text = encode_one(tokenizer, Plain("", "hello"))
    assert text["labels"] == text["input_ids"] and text["input_ids"][-1] == tokenizer.eos_token_id
    plain = encode_one(tokenizer, Plain("the cat:", " sat"), train_on_inputs=True)
    assert plain["labels"] == plain["input_ids"]
    chat = encode_one(tokenizer, Conversation(turns("hi", "hello")), train_on_inputs=True)
    assert chat["labels"] == chat["input_ids"]


def test_a_tokenizer_that_adds_eos_itself_does_not_double_it():
    class AddsEos:
        """Wraps the toy tokenizer as T5's behaves: every call ends in EOS."""

        def __init__(self):
            self.inner = build_tokenizer()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text, add_special_tokens=True):
            ids = self.inner(text)["input_ids"]
            return {"input_ids": ids + [self.inner.eos_token_id] * add_special_tokens}

    assert encode_one(AddsEos(), Plain("a", " b")) == encode_one(build_tokenizer(), Plain("a", " b"))


def test_only_assistant_turns_are_supervised_without_generation_markers():
    tokenizer = build_tokenizer(CHATML)
    system = [{"role": "system", "content": "answer"}]
    sample = encode_one(tokenizer, Conversation(system + turns("hi", "hello", "cat", "the mat")))
    assert supervised(tokenizer, sample) == ["hello<|im_end|>", "the mat<|im_end|>"]
    text = tokenizer.decode(sample["input_ids"])
    assert text == tokenizer.apply_chat_template(
        system + turns("hi", "hello", "cat", "the mat"), tokenize=False
    ).rstrip("\n")


def test_turns_before_supervised_from_stay_unsupervised():
    tokenizer = build_tokenizer(CHATML)
    sample = encode_one(tokenizer, Conversation(turns("hi", "hello", "cat", "mat"), supervised_from=3))
    assert supervised(tokenizer, sample) == ["mat<|im_end|>"]


def test_a_trailing_user_turn_is_kept_but_not_supervised():
    tokenizer = build_tokenizer(CHATML)
    sample = encode_one(tokenizer, Conversation(turns("hi", "hello", "cat")))
    assert supervised(tokenizer, sample) == ["hello<|im_end|>"]
    assert "cat" in tokenizer.decode(sample["input_ids"])


def test_an_opening_assistant_turn():
    tokenizer = build_tokenizer(CHATML)
    messages = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    assert supervised(tokenizer, encode_one(tokenizer, Conversation(messages))) == ["hello<|im_end|>"]


def test_a_template_that_rewrites_history_gives_one_sample_per_turn():
    tokenizer = build_tokenizer(REWRITING)
    samples = Encoder(tokenizer).encode(Conversation(turns("hi", "hello", "cat", "mat")))
    expected = ["<think></think>hello<|im_end|>", "<think></think>mat<|im_end|>"]
    assert [supervised(tokenizer, sample) for sample in samples] == [[text] for text in expected]
    # The second sample sees the first answer as it will when it is generated: without reasoning.
    assert tokenizer.decode(samples[1]["input_ids"]).count("<think>") == 1


def test_eos_is_added_where_the_template_ends_no_turn():
    tokenizer = build_tokenizer(ENDLESS)
    sample = encode_one(tokenizer, Conversation(turns("hi", "hello")))
    assert supervised(tokenizer, sample) == ["hello<|im_end|>"]
    # ... and not where it does.
    chat = build_tokenizer(CHATML)
    ids = encode_one(chat, Conversation(turns("hi", "hello")))["input_ids"]
    assert ids.count(chat.eos_token_id) == 2 and ids[-1] == chat.eos_token_id


def test_a_template_that_cannot_be_extended_turn_by_turn_is_refused():
    counting = "{{ messages | length }}" + CHATML
    with pytest.raises(ValueError, match="does not extend a conversation turn by turn"):
        Encoder(build_tokenizer(counting)).encode(Conversation(turns("hi", "hello")))


def test_missing_template_and_missing_eos():
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="wanted a chat template"):
        Encoder(tokenizer).encode(Conversation(turns("hi", "hello")))
    with pytest.raises(ValueError, match="wanted a chat template"):
        Encoder(tokenizer, chat_template=True)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="wanted a tokenizer with an end-of-sequence token"):
        Encoder(tokenizer)


def test_show_mask_brackets_the_supervised_part():
    tokenizer = build_tokenizer()
    sample = encode_one(tokenizer, Plain("the cat:", " sat"))
    assert show_mask(tokenizer, sample) == "the cat:[[  sat<|im_end|> ]]"
    assert len(show_mask(tokenizer, encode_one(tokenizer, Plain("", "cat " * 900)), limit=100)) < 120


# As Qwen and Hermes: tools in the system turn, calls as JSON in the assistant's, answers in a turn of their own.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m.get('content') or '') }}"
    "{% for call in m.get('tool_calls') or [] %}{{ '<call>' + (call | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tool_calls_are_supervised_and_tool_answers_are_not():
    tokenizer = build_tokenizer(TOOLS)
    call = {"name": "look", "arguments": {"at": "cat"}}
    messages = [
        {"role": "user", "content": "what is there"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "a mat"},
        {"role": "assistant", "content": "the mat"},
    ]
    sample = encode_one(tokenizer, Conversation(messages, tools=[{"name": "look"}]))
    first, second = supervised(tokenizer, sample)
    assert first.startswith("<call>") and '"look"' in first and first.endswith("</call><|im_end|>")
    assert second == "the mat<|im_end|>"
    whole = tokenizer.decode(sample["input_ids"])
    assert whole.startswith("<|im_start|>system") and "a mat" in whole
