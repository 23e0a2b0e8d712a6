"""Small tokenizers of every kind that chats are trained with, and templates as published."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from llama_lib.data.tokenizer import train_tokenizer
from llama_lib.data.train_tokenizer import train_style

TEXTS = [
    f"The user asked the assistant what number {n} is. It is {n * 7}; that is all there is to it.\n"
    f"\n  [INST] <<SYS>> system\nuser\nassistant\n return {n} # {n * 3}\n"
    for n in range(60)
]


def _sentencepiece(folder: Path, legacy: bool) -> Any:
    """As Llama 2's was made: a blank in front of every text between special tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.split("\n")),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return LlamaTokenizerFast(vocab_file=str(path), add_prefix_space=True, legacy=legacy)


def _trimming(folder: Path) -> Any:
    """As Meta's Llama 3: its post-processor leaves blanks out of the offsets."""
    tokenizer = train_style(lambda: TEXTS, 420, "llama3")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), backend.post_processor]
    )
    return tokenizer


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "sample": lambda folder: train_tokenizer(TEXTS, 420),
    "llama2": lambda folder: train_style(lambda: TEXTS, 420, "llama2"),
    "llama3": lambda folder: train_style(lambda: TEXTS, 420, "llama3"),
    "sentencepiece": lambda folder: _sentencepiece(folder, legacy=True),
    "metaspace": lambda folder: _sentencepiece(folder, legacy=False),
    "trimming": _trimming,
}


def golden_tokenizer() -> Any:
    """Tokens that can be told by eye: a word or a mark with the blank in front, else a character.

    It begins texts with BOS, as those of Llama do.
    """
    words = ["Be", "kind.", "Hi", "Yes.", "Why?", "So.", "Bye", "Go.", "[INST]", "[/INST]"]
    words += ["<<SYS>>", "<</SYS>>", "system", "user", "assistant"]
    vocabulary = ["<unk>", "<s>", "</s>", " ", "\n", *words, *(f" {word}" for word in words)]
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(vocabulary)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?\[/?INST\]| ?<</?SYS>>| ?[A-Za-z]+[.?]?|\s"), "isolated"
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    return folder


# Of meta-llama/Llama-2-7b-chat-hf.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Of meta-llama/Meta-Llama-3-8B-Instruct; it first asked for an answer behind every conversation.
_LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
)
_ASKING = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
LLAMA_3_FIRST = _LLAMA_3 + _ASKING
LLAMA_3 = _LLAMA_3 + "{% if add_generation_prompt %}" + _ASKING + "{% endif %}"
# Of meta-llama/Llama-3.2-1B-Instruct, without its tools.
LLAMA_32 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Of mistralai/Mistral-7B-Instruct-v0.1 and, without its tools, of v0.3.
MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
# Of Qwen/Qwen2-7B-Instruct.
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PUBLISHED = {
    "llama-2-chat": LLAMA_2,
    "llama-3-first": LLAMA_3_FIRST,
    "llama-3-instruct": LLAMA_3,
    "mistral-0.1": MISTRAL_1,
    "mistral-0.3": MISTRAL_3,
    "qwen-2": QWEN_2,
}
# Templates that do not end what they are given as they began it; with what is said of them.
UNFIT = {
    "drops thoughts": (
        # As DeepSeek-R1's and Qwen3's, which keep the thoughts of the last answer only.
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "rewrites earlier turns when others follow",
    ),
    "thinks": (
        # As Qwen3's: the last answer has thoughts, and loses the newlines in front.
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
        "{{ m.content.lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "as those of models that think (Qwen3, DeepSeek-R1)",
    ),
    "forgets": (
        "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "writes turn 1 (user) not at all or rewritten in a conversation of 4 turns",
    ),
    "shouts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "writes turn 1 (user) not at all or rewritten",
    ),
    "repeats": (
        "{% for m in messages %}{{ m.content }}</s>{{ m.content }}{% endfor %}",
        "writes turn 1 (user) more than once",
    ),
    "answers first": (
        "{% for m in messages | reverse %}{{ m.content }}</s>{% endfor %}",
        "writes the turns in another order",
    ),
    "never ends": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "the model would not learn to stop",
    ),
    "ends at the end only": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}",
        "rewrites earlier turns",
    ),
    "asks otherwise": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}",
        "asks for an answer in another way",
    ),
    "trims oddly": (
        "{% for m in messages %}{{ m.role }}: {{ m.content.strip('\\n') }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "changes the blanks of turn 1 (user)",
    ),
    "is no Jinja": ("{% for m in messages %}", "Unexpected end of template"),
    "refuses": ("{{ raise_exception('nothing suits me') }}", "nothing suits me"),
}
