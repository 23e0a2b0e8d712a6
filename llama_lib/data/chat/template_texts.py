"""The chat templates that can be chosen by name, as the Jinja that exported tokenizers carry.

Invariant: they render with plain transformers, so they use nothing of this project.
"""

BOS = "{{- bos_token -}}\n"

# The system message of Llama 2 and Mistral has no turn of its own: it begins the first user turn.
_INST = r"""{%- if messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}
    {%- set system = SYSTEM -%}
{%- else -%}
    {%- set turns = messages -%}
    {%- set system = '' -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('Expected user and assistant in turn, a system turn first or none') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- set content = (system if loop.first else '') + message['content'] -%}
        USER
    {%- else -%}
        ASSISTANT
    {%- endif -%}
{%- endfor -%}
"""

TEMPLATES = {
    # Text as in the tokenizer_config.json of Llama-2-7b-chat-hf, stripping included.
    "llama-2": _INST.replace("SYSTEM", r"'<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n'")
    .replace("USER", "{{- bos_token -}}{{- '[INST] ' + content.strip() + ' [/INST]' -}}")
    .replace("ASSISTANT", "{{- ' ' + message['content'].strip() + ' ' + eos_token -}}"),
    # Text as in Meta-Llama-3-8B-Instruct, stripping included.
    "llama-3": BOS
    + r"""{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
""",
    # Mistral-7B-Instruct-v0.2, and its successors' place of the system message.
    "mistral": BOS
    + _INST.replace("SYSTEM", r"messages[0]['content'] + '\n\n'")
    .replace("USER", "{{- '[INST] ' + content + ' [/INST]' -}}")
    .replace("ASSISTANT", "{{- ' ' + message['content'] + eos_token -}}"),
    "chatml": BOS
    + r"""{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""",
    # A prompt and its completion on lines of their own. A newline ends a token with every usual
    # tokenizer, whereas letters or a blank behind the prompt are joined with the completion's.
    "plain": BOS
    + r"""{%- if messages | length > 2 or messages[0]['role'] != 'user'
    or messages[-1]['role'] != ('user', 'assistant')[messages | length - 1] -%}
    {{- raise_exception('The template `plain` takes one prompt (user) and one answer (assistant); '
        'for system turns and longer conversations train with --chat_template chatml') -}}
{%- endif -%}
{{- messages[0]['content'].rstrip() -}}
{%- if messages | length == 2 -%}
    {{- '\n' + messages[1]['content'] + eos_token -}}
{%- elif add_generation_prompt -%}
    {{- '\n' -}}
{%- endif -%}
""",
}
SPECIAL_TOKENS = {
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
# A template may ask transformers for today's date: then the ids of a conversation would depend on
# the day. This macro in front of it takes that function's place; it writes the date that Llama
# 3.2's template writes where the function is missing.
_DATE = "26 Jul 2024"
_DATE_PARTS = {
    **{"%d": "26", "%-d": "26", "%e": "26", "%m": "07", "%-m": "7", "%b": "Jul", "%B": "July"},
    **{"%Y": "2024", "%y": "24", "%a": "Fri", "%A": "Friday", "%j": "208"},
    **{"%F": "2024-07-26", "%D": "07/26/24", "%T": "00:00:00"},
    **{"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM"},
}
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f".replace('{part}', '{value}')" for part, value in _DATE_PARTS.items())
    + " -}}{%- endmacro %}\n"
)


def with_fixed_date(template: str) -> tuple[str, str]:
    """The template, writing one date every day, and that date; empty if it writes none."""
    if "strftime_now" not in template:
        return template, ""
    return _DATE_MACRO + template.removeprefix(_DATE_MACRO), _DATE


# These say nothing of BOS: they begin with it only where the tokenizer begins a text with it.
OPTIONAL_BOS = ("chatml", "plain")
