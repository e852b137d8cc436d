import pytest
import torch
from conftest import picture, tiny_model, tiny_processor

from mqt_llava import cli
from mqt_llava.evaluation.ask import ask, count_prefill_flops


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    picture(1, (40, 24)).save(tmp_path / "picture.png")
    return tmp_path


def question(folder, budgets):
    return ask(str(folder), str(folder / "picture.png"), "what is this", budgets, max_new_tokens=6)


def test_an_answer_at_each_budget_is_that_of_generate(folder):
    rows = question(folder, [4, 16])
    assert [row.num_visual_tokens for row in rows] == [4, 16]
    model, processor = tiny_model(), tiny_processor()
    model = type(model).from_pretrained(folder)
    content = [{"type": "image", "path": str(folder / "picture.png")}, {"type": "text", "text": "what is this"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    for row in rows:
        output = model.generate(**inputs, num_visual_tokens=row.num_visual_tokens, do_sample=False, max_new_tokens=6)
        assert row.answer == processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_more_tokens_cost_the_same_more_each(folder):
    """Linear layers dominate: 8 tokens more cost about the same from 1 to 9 as from 8 to 16."""
    flops = {row.num_visual_tokens: row.prefill_flops for row in question(folder, [1, 8, 9, 16])}
    first, second = flops[9] - flops[1], flops[16] - flops[8]
    assert first > 0
    assert second == pytest.approx(first, rel=0.1)


def test_the_flops_are_those_counted_by_hand():
    model = tiny_model()
    inputs = tiny_processor()(images=picture(), text="what <image>", num_visual_tokens=7, return_tensors="pt")
    patches, tower_length, length, width, hidden = 36, 37, 8, 32, 48
    attention = lambda n, m, c: 2 * 2 * n * m * c  # noqa: E731
    tower = 2 * patches * 48 * width  # the patch embedding
    tower += 2 * (2 * tower_length * (4 * width**2 + 2 * width * 64) + attention(tower_length, tower_length, width))
    queries = 2 * (16 * width**2 + 2 * patches * width**2 + 16 * width**2 + 16 * width * hidden)
    queries += attention(16, patches, width)
    layer = 2 * length * (2 * hidden**2 + 2 * hidden * 24 + 3 * hidden * 96) + attention(length, length, hidden)
    head = 2 * hidden * model.lm_head.out_features
    assert count_prefill_flops(model, inputs) == tower + queries + 2 * layer + head


def test_counting_leaves_the_attention_as_it_was():
    model = tiny_model()
    model.set_attn_implementation({"": "sdpa", "vision_config": "eager", "text_config": "sdpa"})
    count_prefill_flops(model, tiny_processor()(images=picture(), text="<image>", return_tensors="pt"))
    assert model.config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_the_command_prints_a_line_per_budget(folder, capsys):
    code = cli.main(
        ["ask", str(folder / "picture.png"), "what is this", "--model", str(folder), "--num-visual-tokens", "4,16"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert [line.split()[2] for line in lines] == ["4", "16"]
    assert all("MFLOPs prefill" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-visual-tokens", "17"], "between 1 and 16"),
        (["--num-visual-tokens", "0"], "between 1 and 16"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, arguments, words):
    arguments = ["--model", str(folder), *arguments]
    assert cli.main(["ask", str(folder / "picture.png"), "what", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_budgets_that_are_no_numbers_are_refused(folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["ask", "picture.png", "what", "--num-visual-tokens", "4,x"])
    assert "whole numbers separated by commas, got '4,x'" in capsys.readouterr().err


def test_the_default_budget_is_the_models_own(folder):
    assert [row.num_visual_tokens for row in question(folder, None)] == [16]
    model = tiny_model()
    model.generation_config.num_visual_tokens = 5
    model.save_pretrained(folder)
    assert [row.num_visual_tokens for row in question(folder, None)] == [5]
    assert torch.is_grad_enabled()
