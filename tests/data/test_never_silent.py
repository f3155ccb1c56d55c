"""What records say and templates do, token by token: nulls, parts, weights, BOS and EOS, reasoning, ends of turns."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
import transformers as hf
from test_masking import supervised
from toys import CHATML, ENDLESS, build_model, build_tokenizer, turns

import inlay
from inlay.data import Conversation, Encoder, Plain, prepare
from inlay.data.formats import iter_records, parse_records
from inlay.data.masking import IGNORED

START, END = "<|im_start|>", "<|im_end|>"
#: ChatML that writes tool calls as JSON.
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] if m['content'] else '' }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Goes through parts, as multimodal templates do.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Prints whatever the content is.
ANY = CHATML.replace("m['content']", "m['content'] | string")
#: As DeepSeek-R1: generation begins inside a block of reasoning that finished turns do not have.
OPENS = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
#: As models asked not to reason: generation begins behind an empty block.
EMPTY = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}")
#: As Llama 3 and Gemma: the template writes BOS itself.
WITH_BOS = "{{ bos_token }}" + CHATML


def text_of(tokenizer, sample):
    return tokenizer.decode(sample["input_ids"])


def encode(template, messages, **options):
    tokenizer = build_tokenizer(template)
    encoder = Encoder(tokenizer)
    return tokenizer, encoder, encoder.encode(Conversation(messages, **options))


# --- nulls -------------------------------------------------------------------------------------------------

CALLS = [
    [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    [{"function": {"name": "add", "arguments": {"x": 1, "y": 2}}}],
]
TOOL_RECORDS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]}
    for calls in CALLS
]


@pytest.mark.parametrize("how", ["dataset", "parquet", "list", "jsonl"])
def test_absent_arguments_are_not_trained_as_nulls(how, tmp_path):
    source = TOOL_RECORDS
    if how in ("dataset", "parquet"):
        source = datasets.Dataset.from_list(TOOL_RECORDS)
        assert source[0]["messages"][1]["tool_calls"][0]["function"]["arguments"].get("x", 0) is None  # Arrow's filling
    if how == "parquet":
        source.to_parquet(tmp_path / "data.parquet")
        source = tmp_path / "data.parquet"
    if how == "jsonl":
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in TOOL_RECORDS))
        source = tmp_path / "data.jsonl"
    tokenizer = build_tokenizer(TOOLS)
    data = prepare(source, tokenizer)
    for index, calls in enumerate(CALLS):
        text = text_of(tokenizer, data[index])
        written = json.loads(text[text.index("{") : text.rindex("}") + 1])
        assert written == calls[0]["function"]


def test_a_null_that_a_file_says_is_kept(tmp_path):
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "name": None}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    assert list(iter_records(tmp_path / "data.jsonl")) == list(iter_records([record])) == [record]
    assert "name" not in next(iter_records(datasets.Dataset.from_list([record])))["messages"][1]


# --- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, ANY, PARTS, WITH_BOS], ids=["chatml", "any", "parts", "bos"])
@pytest.mark.parametrize("as_parts", [False, True])
def test_contents_are_rendered_whatever_their_form(template, as_parts):
    def content(text):
        return [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}] if as_parts else text

    messages = [{**turn, "content": content(turn["content"])} for turn in turns("hello there", "the cat sat")]
    tokenizer, _, (sample,) = encode(template, messages)
    assert supervised(tokenizer, sample) == ["the cat sat<|im_end|>"]
    assert "hello there" in text_of(tokenizer, sample) and "type" not in text_of(tokenizer, sample)


@pytest.mark.parametrize("part", [{"type": "image", "url": "x"}, {"type": "input_audio"}, {"type": "text"}, 3])
def test_other_parts_are_refused(part):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "see"}, part]},
        {"role": "assistant", "content": "x"},
    ]
    with pytest.raises(ValueError, match="record 0: turn 0: wanted parts of text"):
        prepare([{"messages": messages}], build_tokenizer(CHATML))


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
@pytest.mark.parametrize("sharegpt", [False, True])
def test_a_turn_of_weight_zero_is_not_trained(mark, sharegpt):
    messages = turns("hi", "cat", "and", "mat")
    messages[1] |= mark
    messages[3] |= {next(iter(mark)): 1}
    record = {"messages": messages}
    if sharegpt:
        names = {"user": "human", "assistant": "gpt"}
        moved = [{"from": names[m.pop("role")], "value": m.pop("content"), **m} for m in messages]
        record = {"conversations": moved}
    tokenizer = build_tokenizer(CHATML)
    data = prepare([record], tokenizer)
    assert supervised(tokenizer, data[0]) == ["mat<|im_end|>"]
    assert "weight" not in text_of(tokenizer, data[0])


def test_another_weight_is_refused():
    messages = turns("hi", "cat")
    messages[1]["weight"] = 0.5
    with pytest.raises(ValueError, match="wanted weight 0 or 1, got 0.5"):
        parse_records([{"messages": messages}], chat=True)


# --- BOS and EOS -------------------------------------------------------------------------------------------


class WithBos:
    """The toy tokenizer with Llama's habit: every call begins with BOS, and perhaps ends in EOS."""

    def __init__(self, template=None, eos=False):
        self.inner, self.eos = build_tokenizer(template), eos
        self.inner.bos_token = START

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, add_special_tokens=True):
        ids = self.inner(text)["input_ids"]
        if add_special_tokens:
            ids = [self.inner.bos_token_id, *ids, *([self.inner.eos_token_id] if self.eos else [])]
        return {"input_ids": ids}


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("text", ["the cat", f"{START}the cat", f"the cat{END}", f"{START}the cat{END}"])
def test_bos_and_eos_are_there_once(text, adds_eos):
    tokenizer = WithBos(eos=adds_eos)
    wanted = [tokenizer.bos_token_id, *tokenizer.inner("the cat")["input_ids"], tokenizer.eos_token_id]
    (sample,) = Encoder(tokenizer).encode(Plain("", text))
    assert sample["input_ids"] == wanted
    (sample,) = Encoder(tokenizer).encode(Plain(text.removesuffix(END), f" sat{END}"))
    assert sample["input_ids"] == wanted[:-1] + tokenizer.inner(" sat")["input_ids"] + [tokenizer.eos_token_id]
    assert sample["labels"][: len(wanted) - 1] == [IGNORED] * (len(wanted) - 1)


def test_a_template_that_writes_bos_gets_no_second_one():
    tokenizer = WithBos(WITH_BOS)
    (sample,) = Encoder(tokenizer).encode(Conversation(turns("hi", "cat")))
    assert sample["input_ids"].count(tokenizer.bos_token_id) == 3  # BOS, and a start of each of two turns
    assert sample["input_ids"][:2] == [tokenizer.bos_token_id] * 2


# --- where generation begins -------------------------------------------------------------------------------


def test_what_is_trained_begins_where_generation_begins():
    """For every supervised turn the tokens before it are those of the prompt that generation gets."""
    for template in (CHATML, TOOLS, PARTS, EMPTY):
        messages = turns("hi", "cat", "and", "mat")
        tokenizer, encoder, samples = encode(template, messages)
        wanted = encoder._contents.as_the_template_wants(messages)
        prompts = [
            tokenizer.apply_chat_template(wanted[:count], add_generation_prompt=True, tokenize=False)
            for count in (1, 3)
        ]
        trained = []
        for sample in samples:
            labels = sample["labels"]
            trained += [i for i in range(1, len(labels)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
            trained[-1] = tokenizer.decode(sample["input_ids"][: trained[-1]])
            trained = [tokenizer.decode(sample["input_ids"][:t]) if isinstance(t, int) else t for t in trained]
        assert trained == prompts, template
        assert not encoder.notes


def test_a_prompt_that_opens_reasoning_is_said():
    _, encoder, samples = encode(OPENS, turns("hi", "cat"))
    assert samples and any("generation begins with '<think>'" in note for note in encoder.notes)
    data = prepare([{"messages": turns("hi", "cat")}] * 3, build_tokenizer(OPENS))
    assert str(data.report).count("generation begins with '<think>'") == 1


def test_a_template_without_ends_of_turns_is_said():
    data = prepare([{"messages": turns("hi", "cat", "and", "mat")}], build_tokenizer(ENDLESS))
    assert "no end-of-turn token: only the last turn" in str(data.report)
    assert "note" not in str(prepare([{"messages": turns("hi", "cat")}], build_tokenizer(ENDLESS)).report)
    assert "note" not in str(prepare([{"messages": turns("hi", "cat", "and", "mat")}], build_tokenizer(CHATML)).report)


# --- data that the model has no room for -------------------------------------------------------------------


def finetune(model, records, **options):
    method = None if hasattr(model, "set_adapter") and inlay.state.state_of(model) else inlay.LoRA(r=2)
    return inlay.finetune(model, build_tokenizer(), records, method=method, max_steps=1, disable_tqdm=True, **options)


def test_tokens_beyond_the_vocabulary_are_refused_before_training():
    records = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 400, 3]}]
    for given in (records, [records[0], {"input_ids": [1, 2, 3], "labels": [1, 500, 3]}]):
        with pytest.raises(ValueError, match=r"sample 1: wanted token ids below 300, .* got (400|500)"):
            finetune(build_model(), given)
    with pytest.raises(ValueError, match="sample 1: wanted token ids below 300"):
        finetune(build_model(), records[:1], eval_data=records)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_samples_longer_than_learned_positions_are_refused(kind):
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
        model = hf.OPTForCausalLM(
            hf.OPTConfig(vocab_size=300, max_position_embeddings=16, word_embed_proj_dim=32, **shape)
        )
    with pytest.raises(ValueError, match="samples of at most 16 tokens.*one of 17; pass max_length=16"):
        finetune(model, [{"input_ids": list(range(3, 20))}])
    finetune(model, [{"input_ids": list(range(3, 19))}])


def test_samples_longer_than_a_rotary_model_was_made_for_are_said():
    with pytest.warns(UserWarning, match="longest sample has 140 tokens and this model was made for 128"):
        finetune(build_model(), [{"input_ids": [5] * 140}])


def test_packing_finds_the_vocabulary_of_a_wrapped_language_model():
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = hf.Gemma3ForConditionalGeneration(config)
    assert not hasattr(config, "vocab_size")
    inlay.tune(model, inlay.LoRA(r=2, target_modules=r".*language_model.*[qv]_proj"))
    finetune(model, [{"input_ids": [5, 6, 7, 8]}] * 4, packing=True, max_length=8)
