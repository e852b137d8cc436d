"""
The tokenizer of the authors' code, slow and plain: sentencepiece itself, as Transformers 4.36 called it, and their
own way with images. Only `sentencepiece` is used, nothing of Transformers.
"""

import re

import sentencepiece
from sentencepiece import sentencepiece_model_pb2


SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
IMAGE_TOKEN, IMAGE_ID = "<image>", -200
SPACE = "\u2581"


class LlamaReference:
    def __init__(self, path, legacy):
        self.legacy = legacy
        model = sentencepiece_model_pb2.ModelProto()
        with open(path, "rb") as file:
            model.ParseFromString(file.read())
        if not legacy:
            model.normalizer_spec.add_dummy_prefix = False
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.unk_length = len(self.model.encode("<unk>"))

    def __call__(self, text):
        """Ids of a text that is new: with BOS."""
        if not self.legacy and text:
            text = SPACE + text.replace(SPACE, " ")
        ids = []
        pieces = [piece for piece in re.split("(<unk>|<s>|</s>)", text) if piece]
        if not self.legacy and len(pieces) > 1 and pieces[0] == SPACE:
            pieces = pieces[1:]  # no lone space before a special token
        for piece in pieces:
            ids += [SPECIAL[piece]] if piece in SPECIAL else self.plain(piece)
        return [1, *ids]

    def plain(self, text):
        """Ids of text without special tokens."""
        if self.legacy or not text.startswith((SPACE, " ")):
            return self.model.encode(text)
        return self.model.encode("<unk>" + text)[self.unk_length :]

    def with_images(self, prompt):
        """`tokenizer_image_token` in `mm_utils.py`: the text between images is tokenized piece by piece."""
        first, *rest = [self(piece) for piece in prompt.split(IMAGE_TOKEN)]
        for piece in rest:
            first += [IMAGE_ID, *piece[1:]]
        return first
