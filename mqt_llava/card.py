"""Model cards: written for new repositories, left alone as soon as a person has changed one."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData


CARD_NAME = "README.md"
_MARK = re.compile(r"\n<!-- written by mqt-llava ([0-9a-f]{16}) -->\n$")

_TEXT = """
# {name}

An MQT-LLaVA: a vision-language model that reads an image into any number of visual tokens, from 1 to {maximum}. The
number is chosen for each call.

{install}

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}"{trust})
processor = AutoProcessor.from_pretrained("{name}"{trust})

image = Image.new("RGB", (336, 336), "red")
messages = [
    {{
        "role": "user",
        "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": "What is in the picture?"}}],
    }}
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, num_visual_tokens={budget}, max_new_tokens=32)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```
"""


def card_text(
    name: str,
    max_visual_tokens: int,
    *,
    include_code: bool = False,
    base_model: str | list[str] | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    evaluation: Mapping[str, Mapping[int, float]] | None = None,
) -> str:
    """
    A model card.

    Args:
        name: what the snippet loads: the Hub id.
        max_visual_tokens: M of the checkpoint.
        include_code: whether the repository holds the code too.
        base_model, datasets, license: metadata, left out where not known.
        tags: besides this project's own.
        evaluation: for each task, the score at every budget that was measured.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model,
        datasets=datasets,
        license=license,
        tags=["mqt-llava", "matryoshka", "vision-language", *(tags or [])],
    )
    body = _TEXT.format(
        name=name,
        maximum=max_visual_tokens,
        budget=max(1, max_visual_tokens // 4),
        install="The code is in this repository." if include_code else "Needs the package `mqt_llava`, imported first.",
        trust=", trust_remote_code=True" if include_code else "",
    )
    if not include_code:
        body = body.replace("from PIL import Image\n", "import mqt_llava\nfrom PIL import Image\n")
    if evaluation:
        body += _table(evaluation)
    text = f"---\n{data.to_yaml()}\n---\n{body}"
    return f"{text}\n<!-- written by mqt-llava {_digest(text)} -->\n"


def read_evaluation(path: str | Path) -> dict[str, dict[int, float]]:
    """
    Scores of each task at each budget, from a JSON file of `{task: {m: score}}`.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
        return {str(task): {int(m): float(score) for m, score in row.items()} for task, row in scores.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}` must hold JSON of {{task: {{m: score}}}}: {error}") from error


def _table(evaluation: Mapping[str, Mapping[int, float]]) -> str:
    tasks = list(evaluation)
    budgets = sorted({budget for scores in evaluation.values() for budget in scores})
    rows = ["| visual tokens | " + " | ".join(tasks) + " |", "|--:|" + "--:|" * len(tasks)]
    for budget in budgets:
        scores = [evaluation[task].get(budget) for task in tasks]
        rows.append(f"| {budget} | " + " | ".join("" if score is None else f"{score:.1f}" for score in scores) + " |")
    return "\n## Measured budgets\n\n" + "\n".join(rows) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_untouched(text: str) -> bool:
    """Whether a card is as it was written here: its mark still fits its text."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def write_card(folder: Path, text: str) -> bool:
    """Writes a card into a folder, unless a person's card is there. Returns whether it was written."""
    path = folder / CARD_NAME
    if path.is_file() and not is_untouched(path.read_text(encoding="utf-8")):
        return False
    path.write_text(text, encoding="utf-8")
    return True
