from collections import Counter

import pytest

from mqt_llava.training.draws import budget_bucket, budget_buckets, check_budgets, parse_draw


SPECS = ["fixed(5)", "uniform", "uniform_all", "log_uniform", "all_of(1, 9, 16)", "sandwich"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_draw_depends_on_seed_and_step_alone(spec):
    first, second = parse_draw(spec, 16), parse_draw(spec, 16)
    assert [first(3, step) for step in range(50)] == [second(3, step) for step in range(50)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("maximum", [16, 256])
def test_every_budget_is_one_the_model_has(spec, maximum):
    draw = parse_draw(spec, maximum)
    assert all(1 <= m <= maximum for step in range(300) for m in draw(0, step))


def test_uniform_draws_the_even_numbers_of_the_authors():
    drawn = {m for step in range(400) for m in parse_draw("uniform", 16)(0, step)}
    assert drawn == {2, 4, 6, 8, 10, 12, 14, 16}


def test_uniform_all_draws_odd_numbers_too():
    assert {m for step in range(400) for m in parse_draw("uniform_all", 9)(0, step)} == set(range(1, 10))


def test_log_uniform_draws_each_octave_about_as_often():
    drawn = Counter(budget_bucket(parse_draw("log_uniform", 255)(0, step)[0]) for step in range(4000))
    # [1, 2), [2, 4), [4, 8) ... each have an eighth; the octaves of the log are (1], (2], (2, 4], ...
    assert 300 < drawn["9-16"] < 700
    assert 300 < drawn["65-128"] < 700


def test_sandwich_holds_the_smallest_and_the_largest():
    assert all(draw[0] == 1 and draw[2] == 16 for draw in (parse_draw("sandwich", 16)(0, step) for step in range(9)))


def test_other_seeds_draw_otherwise():
    draw = parse_draw("uniform_all", 256)
    assert [draw(0, step) for step in range(9)] != [draw(1, step) for step in range(9)]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("unifrom", "Did you mean `uniform`"),
        ("fixed", "takes one number"),
        ("fixed(17)", "between 1 and 16"),
        ("uniform(3)", "takes no numbers"),
        ("all_of()", "at least one"),
        ("all_of(0)", "between 1 and 16"),
        ("fixed(2.5)", "must be one of"),
    ],
)
def test_a_draw_that_there_is_not_raises(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_draw(spec, 16)


def test_buckets_cover_every_budget_once():
    assert budget_buckets(16) == ["1", "2", "3-4", "5-8", "9-16"]
    assert all(budget_bucket(m) in budget_buckets(256) for m in range(1, 257))


@pytest.mark.parametrize("budgets", [[0], [17], [2, 2]])
def test_evaluation_budgets_that_make_no_sense_raise(budgets):
    with pytest.raises(ValueError):
        check_budgets("eval_budgets", budgets, 16)
