"""Chat templates for language models that are not Vicuna. Those of released checkpoints are with the processor."""

CHATML_CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ text_of(message) }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- elif message.role in ('user', 'system') -%}
{{ '<|im_start|>' + message.role + '\\n' }}{{ text_of(message) }}{{ '<|im_end|>\\n' }}
{%- else -%}
{{ raise_exception('Roles must be user, assistant or system; got ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
