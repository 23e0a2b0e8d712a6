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
    # A prompt and its completion, with nothing between them.
    "plain": BOS
    + r"""{%- if messages | length > 2 or messages[0]['role'] != 'user'
    or messages[-1]['role'] != ('user', 'assistant')[messages | length - 1] -%}
    {{- raise_exception('The template `plain` takes one prompt (user) and one answer (assistant); '
        'for system turns and longer conversations train with --chat_template chatml') -}}
{%- endif -%}
{{- messages[0]['content'] -}}
{%- if messages | length == 2 -%}
    {{- messages[1]['content'] + eos_token -}}
{%- endif -%}
""",
}
SPECIAL_TOKENS = {
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
# These say nothing of BOS: they begin with it only where the tokenizer begins a text with it.
OPTIONAL_BOS = ("chatml", "plain")
