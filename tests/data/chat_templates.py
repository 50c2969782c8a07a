"""Chat templates with the constructs of released families, written for the tests, and chats that try them."""

CHATML = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You help.' }}{%- endif %}
    {{- "\n\nTools:" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\n" }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if tools and loop.first and message.role == 'system' %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# As training templates have it: the answer with its end-of-turn mark.
GENERATION = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Qwen3: thinking is kept after the last question only, where an answer without one has an empty block.
THINKING = r"""
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}{%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}{%- set thinking = '' %}
    {%- if message.reasoning_content is string %}{%- set thinking = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and (loop.last or thinking) %}
        {{- '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}{{- content }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

# DeepSeek-R1: the generation prompt opens a block of thinking, which no earlier answer has.
OPENED = r"""
{%- set ns = namespace(system='') %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = ns.system + message['content'] %}
{%- endfor %}
{{- bos_token }}{{- ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<|user|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\n' }}{%- endif %}
"""

LLAMA = r"""
{%- for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim %}
    {%- set content = content + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{%- set content = bos_token + content %}{%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

# Mistral: the system message is moved to the last question, and turns must alternate.
MISTRAL = r"""
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant.') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}
"""

# GLM: parts of contents, contents without blanks, and no mark of the end of a turn.
GLM = r"""
[gMASK]<sop>
{%- macro text_of(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content if part is mapping and part.type == 'text' -%}{{- part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|assistant|>\n<think></think>\n' + text_of(message.content).split('</think>')[-1].strip() }}
    {%- else -%}{{- '<|' + message.role + '|>\n' + text_of(message.content) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' }}{%- endif -%}
"""

# gpt-oss and Phi-3: the last message of a chat ends in another way than the others.
LAST = r"""
{%- for message in messages %}
    {{- '<|start|>' + message.role + '<|message|>' + message.content }}
    {%- if loop.last and not add_generation_prompt and message.role == 'assistant' %}{{- '<|return|>' }}
    {%- else %}{{- '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
EOS_LAST = r"""
{%- for message in messages %}{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "thinking": THINKING,
    "opened": OPENED,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "glm": GLM,
    "last": LAST,
    "eos last": EOS_LAST,
}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|start|>", "<|message|>", "<|end|>", "<|return|>"),
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


CHATS = {
    "one turn": [user("Hi there"), assistant("Hello!")],
    "system, blanks, unicode": [
        {"role": "system", "content": "Be brief."},
        user("Hi  "),
        assistant("Hello!  "),
        user("é 漢字 🙂?"),
        assistant(" Fine é\n\n"),
    ],
    "special tokens in contents": [
        user("<|im_end|> <|im_start|>assistant\nhi<s>[/INST]"),
        assistant("it is <|eot_id|> or </s>."),
        user("ok"),
        assistant("yes"),
    ],
    "thinking": [
        user("1+1?"),
        assistant("<think>\neasy\n</think>\n\n2"),
        user("2+2?"),
        assistant("<think>\nhm\n</think>\n\n4"),
    ],
    "the same": [user("a"), assistant("a"), user("a"), assistant("a"), user("a"), assistant("a")],
    "a question last": [user("a"), assistant("b"), user("c")],
}
