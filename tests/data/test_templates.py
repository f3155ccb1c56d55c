"""Chat templates in the manner of published ones, token by token: what is trained begins where generation begins."""

from __future__ import annotations

import pytest
from test_masking import supervised
from toys import CHATML, ENDLESS, build_tokenizer, turns

from inlay.data import Conversation, Encoder, prepare
from inlay.data.masking import IGNORED

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
#: Reasoning stays in the turns behind the last question, and is written there even if it is empty.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% set r = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: As Qwen3, but generation begins inside the reasoning.
QWEN3_THINKING = QWEN3.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
#: Finished turns have no reasoning at all, and generation begins inside it.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + c + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["[INST]", "[/INST]", "<|User|>", "<|Assistant|>"]

PLAIN = turns("hi", "cat", "and", "mat")
THOUGHT = turns("hi", "<think>\nwhy\n</think>\n\ncat", "and", "<think>\nso\n</think>\n\nmat")
#: template, messages, the text before each trained turn and the turn, per sample
EXPECTED = {
    "chatml": (CHATML, PLAIN, [["cat<|im_end|>", "mat<|im_end|>"]]),
    "llama3": (LLAMA3, PLAIN, [["cat<|eot_id|>", "mat<|eot_id|>"]]),
    "gemma": (GEMMA, PLAIN, [["cat<end_of_turn>", "mat<end_of_turn>"]]),
    "mistral": (MISTRAL, PLAIN, [[" cat<|im_end|>", " mat<|im_end|>"]]),
    "parts": (PARTS, PLAIN, [["cat<|im_end|>", "mat<|im_end|>"]]),
    "endless": (ENDLESS, PLAIN, [["cat", "mat<|im_end|>"]]),
    "qwen3": (
        QWEN3,
        THOUGHT,
        [["<think>\nwhy\n</think>\n\ncat<|im_end|>"], ["<think>\nso\n</think>\n\nmat<|im_end|>"]],
    ),
    "qwen3, nothing thought": (
        QWEN3,
        PLAIN,
        [["<think>\n\n</think>\n\ncat<|im_end|>"], ["<think>\n\n</think>\n\nmat<|im_end|>"]],
    ),
    "qwen3 thinking": (
        QWEN3_THINKING,
        THOUGHT,
        [["why\n</think>\n\ncat<|im_end|>"], ["so\n</think>\n\nmat<|im_end|>"]],
    ),
    "r1": (R1, THOUGHT, [["why\n</think>\n\ncat<|im_end|>"], ["so\n</think>\n\nmat<|im_end|>"]]),
}


def tokenizer_for(template):
    tokenizer = build_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:], "bos_token": SPECIAL[0]})
    return tokenizer


def generated_from(tokenizer, messages):
    """Tokens that generation of every assistant turn starts from."""
    rendered = Encoder(tokenizer)._contents.as_the_template_wants(messages)
    counts = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    return [
        tokenizer.apply_chat_template(rendered[:count], add_generation_prompt=True, tokenize=True, return_dict=False)
        for count in counts
    ]


@pytest.mark.parametrize("name", EXPECTED)
def test_token_by_token(name):
    template, messages, expected = EXPECTED[name]
    tokenizer = tokenizer_for(template)
    encoder = Encoder(tokenizer)
    samples = encoder.encode(Conversation(messages))
    assert [supervised(tokenizer, sample) for sample in samples] == expected
    prompts, begun = generated_from(tokenizer, messages), []
    for sample in samples:
        ids, labels = sample["input_ids"], sample["labels"]
        starts = [i for i in range(1, len(ids)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
        begun += [ids[:start] for start in starts]
        assert ids.count(tokenizer.bos_token_id) == (1 if "bos_token" in template else 0)
    if name == "endless":  # a prompt ends in a space, which joins the word behind it where it is told as history
        begun, prompts = ([tokenizer.decode(ids) for ids in held] for held in (begun, prompts))
    assert begun == prompts
    assert bool(encoder.notes) == (name == "endless")


def test_reasoning_in_a_key_of_its_own_follows_a_prompt_that_opens_it():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "cat", "reasoning_content": "why"}]
    for template in (R1, QWEN3_THINKING):
        tokenizer = tokenizer_for(template)
        encoder = Encoder(tokenizer)
        (sample,) = encoder.encode(Conversation(messages))
        assert supervised(tokenizer, sample) == ["why\n</think>\n\ncat<|im_end|>"] and not encoder.notes


def test_reasoning_that_a_template_drops_is_said():
    tokenizer = tokenizer_for(R1.replace("<think>\n", ""))
    data = prepare([{"messages": THOUGHT}], tokenizer)
    assert "leaves out or changes reasoning of turns of role 'assistant'" in str(data.report)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "cat", "thinking": "why"}]
    assert "changes reasoning" in str(prepare([{"messages": messages}], tokenizer_for(CHATML)).report)


def test_white_space_of_the_generation_prompt_is_what_is_trained_behind():
    template = ENDLESS.replace("m['role'] + ': ' + m", "m['role'] + ':' + m")
    tokenizer = tokenizer_for(template)
    for sample, prompt in zip(
        Encoder(tokenizer).encode(Conversation(PLAIN)), generated_from(tokenizer, PLAIN), strict=True
    ):
        assert sample["input_ids"][: len(prompt)] == prompt and set(sample["labels"][: len(prompt)]) == {IGNORED}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, PARTS], ids=["chatml", "llama3", "parts"])
@pytest.mark.parametrize("words", ["cat", "Are", "Zoo", "assistant", "i"])
def test_a_conversation_that_opens_with_the_assistant(template, words):
    tokenizer = tokenizer_for("You are an assistant. " + template)
    (sample,) = Encoder(tokenizer).encode(Conversation([{"role": "assistant", "content": words}, *turns("hi")]))
    (run,) = supervised(tokenizer, sample)
    assert run in (f"{words}<|im_end|>", f"{words}<|eot_id|>")
