"""The words of the corpus, as a tokenizer with a chat template: one token per word."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .questions import PLURALS
from .scenes import BACKGROUNDS, CELL_NAMES, COLOURS, NOTHING, SHAPES


SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, _, IMAGE_TOKEN_ID = range(len(SPECIAL_TOKENS))
DIGITS = tuple("0123456789")
WORDS = (
    *("which", "background", "colour", "most", "any", "how", "many", "shape", "digit", "at", "read", "the", "number"),
    *("yes", "no", NOTHING),
    *DIGITS,
    *BACKGROUNDS,
    *COLOURS,
    *SHAPES,
    *PLURALS,
    *CELL_NAMES,
)
"""Every word of every question and answer."""

# A question follows the image and an answer follows the question with nothing between them, so that a prompt costs few
# tokens and the question's last word is the place where the answer is read off.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set words = message['content'] if message['content'] is string else message['content'][0]['text'] -%}
        {%- generation %} {{ words + eos_token }}{% endgeneration -%}
    {%- elif message['content'] is string -%}
        {{ ' ' + message['content'] }}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{ ' ' + part['text'] }}{%- endfor -%}
    {%- endif -%}
{%- endfor -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that splits at blanks, ignores case and question marks, and starts every prompt with `<s>`."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
