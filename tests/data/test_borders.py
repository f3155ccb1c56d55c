"""Borders of texts: tokenizers that put a space before every text, and what turns of weight 0 leave of a record."""

from __future__ import annotations

import pytest
from test_masking import supervised
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from toys import CHATML, build_tokenizer, turns
from transformers import PreTrainedTokenizerFast

from inlay.data import Conversation, Encoder, Plain, prepare
from inlay.data.masking import IGNORED

WORDS = [
    "▁",
    "▁the",
    "the",
    "▁cat",
    "cat",
    "▁yes",
    "yes",
    ":",
    "▁:",
    "th",
    "▁th",
    "e",
    "▁e",
    "A",
    "▁A",
    "\n",
    "a",
    "▁a",
]


def sentencepiece(kind, template=None):
    """As Llama 2's tokenizer: a space before every text, by the normalizer or by the pre-tokenizer."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<end>", *WORDS])}
    characters = [c for c in "abcdefghijklmnopqrstuvwxyzA▁:\n0123" if c not in vocabulary]
    vocabulary |= {c: len(vocabulary) + i for i, c in enumerate(characters)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("y", "e"), ("ye", "s")]
    merges += [("▁", "yes"), ("▁", ":"), ("▁", "th"), ("▁", "e"), ("▁", "A"), ("▁", "a")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    if kind == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    made.chat_template = template
    return made


def spelt(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")


@pytest.mark.parametrize("kind", ["normalizer", "pre-tokenizer"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the cat: ", "yes"), ("th", "e cat"), ("A:", " yes"), ("A:", "yes"), ("A: ", "the cat yes"), ("A:\n", "yes")],
)
def test_no_space_comes_between_prompt_and_completion(kind, prompt, completion):
    tokenizer = sentencepiece(kind)
    (sample,) = Encoder(tokenizer).encode(Plain(prompt, completion))
    before = tokenizer(prompt)["input_ids"]
    assert sample["input_ids"][: len(before)] == before and tokenizer.unk_token_id not in sample["input_ids"]
    assert sample["labels"][: len(before)] == [IGNORED] * len(before)
    trained = [label for label in sample["labels"] if label != IGNORED]
    assert spelt(tokenizer, trained) == completion + "</s>"
    assert sample["input_ids"][-1:] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["normalizer", "pre-tokenizer"])
def test_no_space_comes_between_a_generation_prompt_and_its_turn(kind):
    template = "{% for m in messages %}{{ m['role'][:1] + ': ' + m['content'] + '<end>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
    tokenizer = sentencepiece(kind, template)
    (sample,) = Encoder(tokenizer).encode(Conversation(turns("the cat", "yes")))
    trained = [label for label in sample["labels"] if label != IGNORED]
    assert spelt(tokenizer, trained) == "yes<end>"


def test_a_byte_level_tokenizer_is_as_it_was():
    tokenizer = build_tokenizer()
    (sample,) = Encoder(tokenizer).encode(Plain("th", "e cat"))
    assert sample["input_ids"] == tokenizer("th")["input_ids"] + tokenizer("e cat")["input_ids"] + [
        tokenizer.eos_token_id
    ]


# --- weights beside train_on_inputs, and other marks -------------------------------------------------------


@pytest.mark.parametrize("place", range(4))
def test_a_turn_of_weight_zero_is_left_out_of_training_on_everything(place):
    messages = turns("hi", "cat", "and", "mat")
    messages[place]["weight"] = 0
    tokenizer = build_tokenizer(CHATML)
    (sample,) = prepare([{"messages": messages}], tokenizer, train_on_inputs=True).samples
    runs = "".join(supervised(tokenizer, sample))
    assert messages[place]["content"] not in runs
    assert all(turn["content"] in runs for i, turn in enumerate(messages) if i != place)
    assert tokenizer.decode(sample["input_ids"]) == tokenizer.apply_chat_template(
        turns("hi", "cat", "and", "mat"), tokenize=False
    ).rstrip("\n")


def test_marks_of_axolotl():
    tokenizer = build_tokenizer(CHATML)
    messages = turns("hi", "cat", "and", "mat")
    messages[1]["training"], messages[0]["train"], messages[3]["weight"] = False, True, None
    data = prepare([{"messages": messages}], tokenizer)
    assert supervised(tokenizer, data[0]) == ["mat<|im_end|>"]
    assert "marked as trained, and are not" in str(data.report)
    messages[1]["train_detail"] = [{"begin_offset": 0, "end_offset": 1, "train": True}]
    with pytest.raises(ValueError, match=r"record 0, messages\[1\]: train_detail trains parts of a turn"):
        prepare([{"messages": messages}], tokenizer)
