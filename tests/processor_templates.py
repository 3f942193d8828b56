"""Chat templates: a family's structure in, Jinja source out. Headers, markers, newlines and trimming are the family's."""

# Text of a message whose content is a string or a list of parts; media parts are spelled by the caller.
_QWEN_PARTS = """
{%- macro parts(content) -%}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for part in content %}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set seen.images = seen.images + 1 -%}
        {%- if add_vision_id %}{{- 'Picture ' ~ seen.images ~ ': ' }}{% endif -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
      {%- elif part.type == 'video' or 'video' in part -%}
        {%- set seen.videos = seen.videos + 1 -%}
        {%- if add_vision_id %}{{- 'Video ' ~ seen.videos ~ ': ' }}{% endif -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
      {%- elif 'text' in part %}{{- part.text }}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro -%}
"""

# A default system turn when none is given; every role alike; the turn ends with `<|im_end|>` and a newline.
QWEN2_VL = (
    "{%- set seen = namespace(images=0, videos=0) -%}"
    + _QWEN_PARTS
    + """
{%- for message in messages %}
  {%- if loop.first and message.role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
  {%- endif %}
  {{- '<|im_start|>' + message.role + '\\n' }}{{- parts(message.content) }}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""
)

_QWEN3_TOOLS = """
{%- if tools %}
  {{- '<|im_start|>system\\n' }}
  {%- if messages[0].role == 'system' %}{{- parts(messages[0].content) + '\\n\\n' }}{% endif %}
  {{- '# Tools\\n\\nYou may call these functions. Their signatures are within <tools></tools> tags:\\n<tools>' }}
  {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
  {{- '\\n</tools>\\n\\nWrite each call as one JSON object within tags:\\n<tool_call>\\n' }}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\\n' + parts(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
"""

_QWEN3_CALLS = """
    {%- for call in message.tool_calls or [] %}
      {%- if (loop.first and text) or not loop.first %}{{- '\\n' }}{% endif %}
      {%- if call.function %}{% set call = call.function %}{% endif %}
      {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
      {{- call.arguments if call.arguments is string else (call.arguments | tojson) }}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
"""

_QWEN3_TOOL_ROLE = """
  {%- elif message.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
    {{- '\\n<tool_response>\\n' + parts(message.content) + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
  {%- endif %}
{%- endfor %}
"""

# No default system turn; tools in the system turn; tool answers as a user turn.
QWEN3_VL = (
    "{%- set seen = namespace(images=0, videos=0) -%}"
    + _QWEN_PARTS
    + _QWEN3_TOOLS
    + """
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- '<|im_start|>user\\n' + parts(message.content) + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set text = parts(message.content) %}
    {{- '<|im_start|>assistant\\n' + text }}
"""
    + _QWEN3_CALLS
    + _QWEN3_TOOL_ROLE
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}"
)

# Reasoning from `reasoning_content` or from <think> in the text. It survives only after the last user question that is
# not a tool response, and there the last turn gets <think> tags even when it has no reasoning: the template looks ahead.
QWEN3_VL_THINKING = (
    "{%- set seen = namespace(images=0, videos=0) -%}"
    + _QWEN_PARTS
    + _QWEN3_TOOLS
    + """
{%- set last = namespace(query=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
  {%- set index = (messages | length - 1) - loop.index0 %}
  {%- if last.searching and message.role == 'user' %}
    {%- set text = parts(message.content) %}
    {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
      {%- set last.searching = false %}{%- set last.query = index %}
    {%- endif %}
  {%- endif %}
{%- endfor %}
{%- set seen.images = 0 %}{%- set seen.videos = 0 %}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- '<|im_start|>user\\n' + parts(message.content) + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set text = parts(message.content) %}
    {%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
    {%- elif '</think>' in text %}
      {%- set reasoning = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > last.query and (loop.last or reasoning) %}
      {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}
    {%- else %}{{- text }}
    {%- endif %}
"""
    + _QWEN3_CALLS
    + _QWEN3_TOOL_ROLE
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif -%}"
)

# Vicuna: nothing ends a turn but a space; images first, whatever their place; string content renders as nothing.
# The generation prompt has no space after its colon, the assistant's turn has one.
LLAVA = """
{%- for message in messages %}
  {%- if message.role != 'system' %}{{- message.role.upper() + ': ' }}{% endif %}
  {%- for part in message.content | selectattr('type', 'equalto', 'image') %}{{- '<image>\\n' }}{% endfor %}
  {%- for part in message.content | selectattr('type', 'equalto', 'text') %}
    {%- if message.role == 'assistant' %}{% generation %}{{- part.text + ' ' }}{% endgeneration %}
    {%- else %}{{- part.text + ' ' }}
    {%- endif %}
  {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif -%}
"""

# Mistral 7B's [INST]; no BOS in the template; `</s>` with a space on both sides; no generation prompt at all.
LLAVA_NEXT = """
{%- for message in messages %}
  {%- if message.role == 'system' %}{{- '<<SYS>>\\n' + message.content[0].text + '\\n<</SYS>>\\n\\n' }}
  {%- elif message.role == 'user' %}
    {{- '[INST] ' }}
    {%- for part in message.content | selectattr('type', 'equalto', 'image') %}{{- '<image>\\n' }}{% endfor %}
    {%- for part in message.content | selectattr('type', 'equalto', 'text') %}{{- part.text }}{% endfor %}
    {{- ' [/INST]' }}
  {%- elif message.role == 'assistant' %}{{- ' ' + message.content[0].text + '</s> ' }}
  {%- else %}{{- raise_exception('Only system, user and assistant turns.') }}
  {%- endif %}
{%- endfor %}
"""

# The header ends in a space and the text brings its own newline, while the generation prompt has no space; no newline
# after <|im_end|>. The generation span starts with the newline and leaves the end token out, as in the released one.
LLAVA_ONEVISION = """
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + ' ' }}
  {%- for part in message.content | selectattr('type', 'equalto', 'image') %}{{- '<image>' }}{% endfor %}
  {%- for part in message.content | selectattr('type', 'equalto', 'video') %}{{- '<video>' }}{% endfor %}
  {%- for part in message.content | selectattr('type', 'equalto', 'text') %}
    {%- if message.role == 'assistant' %}{% generation %}{{- '\\n' + part.text }}{% endgeneration %}
    {%- else %}{{- '\\n' + part.text }}
    {%- endif %}
  {%- endfor %}
  {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""

# "User:" and no space before an image, "User: " before text; content must be a list.
_IDEFICS3 = """
{%- for message in messages %}
  {{- message.role.capitalize() }}{{- ':' if message.content[0].type == 'image' else ': ' }}
  {%- for part in message.content %}
    {%- if part.type == 'text' %}{{- part.text }}{% elif part.type == 'image' %}{{- '<image>' }}{% endif %}
  {%- endfor %}
  {{- '<end_of_utterance>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{% endif -%}
"""
IDEFICS3 = "{{- '<|begin_of_text|>' }}" + _IDEFICS3
SMOLVLM = "{{- '<|im_start|>' }}" + _IDEFICS3

# ChatML without a default system turn; a newline after every image.
INTERNVL = """
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.content is string %}{{- message.content }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'image' %}{{- '<IMG_CONTEXT>\\n' }}
      {%- elif part.type == 'video' %}{{- '<video>\\n' }}
      {%- elif part.type == 'text' %}{{- part.text }}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""

# BOS; the system text opens the first user turn; roles alternate; the assistant is `model`; every text is trimmed.
GEMMA3 = """
{{- bos_token }}
{%- set preface = '' %}{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
  {%- set text = messages[0].content if messages[0].content is string else messages[0].content[0].text %}
  {%- set preface = text + '\\n\\n' %}{%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('User and assistant turns must alternate.') }}
  {%- endif %}
  {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
  {{- preface if loop.first else '' }}
  {%- if message.content is string %}{{- message.content | trim }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'image' %}{{- '<start_of_image>' }}
      {%- elif part.type == 'text' %}{{- part.text | trim }}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
  {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif -%}
"""

_MISTRAL_PARTS = """
{%- macro parts(content) -%}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for part in content %}
      {%- if part.type == 'text' %}{{- part.text }}
      {%- elif part.type in ('image', 'image_url') %}{{- '[IMG]' }}
      {%- else %}{{- raise_exception('Only text and image parts.') }}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro -%}
"""

# The system text goes into the last turn if that is the user's: a training row, which ends with the assistant, loses it.
PIXTRAL = (
    _MISTRAL_PARTS
    + """
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}{% set system = parts(messages[0].content) %}{% set turns = messages[1:] %}{% endif %}
{{- bos_token }}
{%- for message in turns %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('User and assistant turns must alternate.') }}
  {%- endif %}
  {%- if message.role == 'user' %}
    {{- '[INST]' }}{%- if loop.last and system is defined %}{{- system + '\\n\\n' }}{% endif %}
    {{- parts(message.content) + '[/INST]' }}
  {%- else %}{{- parts(message.content) + eos_token }}
  {%- endif %}
{%- endfor %}
"""
)

# Mistral Small 3.1: a system block always, with today's date when it is the default one.
MISTRAL3 = (
    _MISTRAL_PARTS
    + """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
  {%- set system = parts(messages[0].content) %}{%- set turns = messages[1:] %}
{%- else %}
  {%- set system = 'You are a careful assistant. Today is ' + strftime_now('%Y-%m-%d') + '.\\n\\nBe brief.' %}
  {%- set turns = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- for message in turns %}
  {%- if message.role == 'user' %}{{- '[INST]' + parts(message.content) + '[/INST]' }}
  {%- elif message.role == 'assistant' %}{{- parts(message.content) + eos_token }}
  {%- else %}{{- raise_exception('Only user, system and assistant turns.') }}
  {%- endif %}
{%- endfor %}
"""
)

# Llama 3.2 Vision: a dated system turn when there are no images, none when there are, and no system text beside images.
MLLAMA = """
{{- bos_token }}
{%- set system = '' %}{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}
  {%- set system = system | trim %}{%- set turns = messages[1:] %}
{%- endif %}
{%- set seen = namespace(images=false) %}
{%- for message in turns %}
  {%- if message.content is not string %}
    {%- for part in message.content %}{% if part.type == 'image' %}{% set seen.images = true %}{% endif %}{% endfor %}
  {%- endif %}
{%- endfor %}
{%- if seen.images and system %}{{- raise_exception('A system turn is not possible beside images.') }}{% endif %}
{%- if not seen.images %}
  {{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
  {{- 'Today Date: ' + (date_string if date_string is defined else '26 Jul 2024') + '\\n\\n' + system + '<|eot_id|>' }}
{%- endif %}
{%- for message in turns %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
  {%- if message.content is string %}{{- message.content }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'image' %}{{- '<|image|>' }}{% elif part.type == 'text' %}{{- part.text }}{% endif %}
    {%- endfor %}
  {%- endif %}
  {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""

_GLM_PARTS = """
{%- macro parts(content) -%}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for part in content %}
      {%- if part.type == 'image' or 'image' in part %}{{- '<|begin_of_image|><|image|><|end_of_image|>' }}
      {%- elif part.type == 'video' or 'video' in part %}{{- '<|begin_of_video|><|video|><|end_of_video|>' }}
      {%- elif part.type == 'text' %}{{- part.text }}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro -%}
"""

# GLM-4.1V: the next role's token ends a turn, so the last one has no end; every part on a line of its own.
# An assistant's content must be a string: a list is printed as Python prints it.
GLM4V = """
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
  {%- if message.role == 'system' %}{{- '<|system|>\\n' + message.content }}
  {%- elif message.role == 'user' %}
    {{- '<|user|>' }}
    {%- if message.content is string %}{{- '\\n' + message.content }}
    {%- else %}
      {%- for part in message.content %}
        {%- if part.type == 'video' or 'video' in part %}{{- '\\n<|begin_of_video|><|video|><|end_of_video|>' }}
        {%- elif part.type == 'image' or 'image' in part %}{{- '\\n<|begin_of_image|><|image|><|end_of_image|>' }}
        {%- elif part.type == 'text' %}{{- '\\n' + part.text }}
        {%- endif %}
      {%- endfor %}
    {%- endif %}
  {%- elif message.role == 'assistant' %}{{- '<|assistant|>' ~ (message.metadata or '') ~ '\\n' ~ message.content }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif -%}
"""

# GLM-4.5V: <think></think> in every assistant turn, filled only after the last user turn; contents are stripped.
GLM4V_MOE = (
    _GLM_PARTS
    + """
{{- '[gMASK]<sop>' }}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{{- '<|system|>\\n' + parts(message.content) }}
  {%- elif message.role == 'user' %}
    {{- '<|user|>\\n' + parts(message.content) }}
    {{- '/nothink' if enable_thinking is defined and not enable_thinking else '' }}
  {%- elif message.role == 'assistant' %}
    {%- set text = parts(message.content) %}{%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
    {%- elif '</think>' in text %}
      {%- set reasoning = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|assistant|>\\n<think>' + (reasoning.strip() if loop.index0 > last.user else '') + '</think>' }}
    {%- if text.strip() %}{{- '\\n' + text.strip() }}{% endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|assistant|>\\n' + ('<think></think>\\n' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif -%}
"""
)

ARIA = """
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.content is string %}{{- message.content }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'text' %}{{- part.text }}
      {%- elif part.type == 'image' %}{{- '<fim_prefix><|img|><fim_suffix>' }}
      {%- endif %}
    {%- endfor %}
  {%- endif %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""

# LFM2.5-VL: BOS, ChatML, generation markers around text, end token and newline; thinking cut from history.
LFM2_VL = """
{%- macro parts(content) -%}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for part in content %}
      {%- if part.type == 'image' %}{{- '<image>' }}{% elif part.type == 'text' %}{{- part.text }}{% endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro -%}
{{- bos_token }}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}
    {%- set text = parts(message.content) %}
    {%- if loop.index0 <= last.user and '</think>' in text %}
      {%- set text = text.split('</think>')[-1] | trim %}
    {%- elif loop.index0 > last.user and message.reasoning_content is string %}
      {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {{- text + '<|im_end|>\\n' }}
    {%- endgeneration %}
  {%- else %}{{- parts(message.content) + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""

# Molmo 2: all images of the conversation stand before its first turn, numbered when there are several.
MOLMO2 = """
{%- set seen = namespace(total=0, index=0) %}
{%- for message in messages %}
  {%- if message.content is not string %}
    {%- set seen.total = seen.total + (message.content | selectattr('type', 'equalto', 'image') | list | length) %}
  {%- endif %}
{%- endfor %}
{%- if seen.total == 1 %}{{- '<|image|>' }}
{%- else %}{% for index in range(seen.total) %}{{- 'Image ' ~ (index + 1) ~ '<|image|>' }}{% endfor %}
{%- endif %}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.content is string %}{{- message.content }}
  {%- else %}{% for part in message.content %}{% if part.type == 'text' %}{{- part.text }}{% endif %}{% endfor %}
  {%- endif %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""

# Command A Vision: role tokens without newlines, the response between two tokens of its own; texts are trimmed.
COHERE2_VISION = """
{{- bos_token }}
{%- for message in messages %}
  {%- set role = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message.role] %}
  {{- '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' }}
  {%- if message.role == 'assistant' %}{{- '<|START_RESPONSE|>' }}{% endif %}
  {%- if message.content is string %}{{- message.content | trim }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'image' %}{{- '<|IMG_PATCH|>' }}{% elif part.type == 'text' %}{{- part.text | trim }}{% endif %}
    {%- endfor %}
  {%- endif %}
  {%- if message.role == 'assistant' %}{{- '<|END_RESPONSE|>' }}{% endif %}
  {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif -%}
"""

# Llama 4: as Llama 3 with shorter names, no default system turn, `<|eot|>`; every text is trimmed.
LLAMA4 = """
{{- bos_token }}
{%- for message in messages %}
  {{- '<|header_start|>' + message.role + '<|header_end|>\\n\\n' }}
  {%- if message.content is string %}{{- message.content | trim }}
  {%- else %}
    {%- for part in message.content %}
      {%- if part.type == 'image' %}{{- '<|image|>' }}{% elif part.type == 'text' %}{{- part.text | trim }}{% endif %}
    {%- endfor %}
  {%- endif %}
  {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif -%}
"""

# MiniCPM-V 4.6: ChatML with an empty <think></think> before every answer, which the generation prompt opens too.
MINICPMV = """
{%- macro parts(content) -%}
  {%- if content is string %}{{- content }}
  {%- else %}
    {%- for part in content %}
      {%- if part.type == 'image' %}{{- '<|image_pad|>\\n' }}{% elif part.type == 'text' %}{{- part.text }}{% endif %}
    {%- endfor %}
  {%- endif %}
{%- endmacro -%}
{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
  {{- parts(message.content) | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif -%}
"""
