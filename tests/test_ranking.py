"""Selection by a score."""

import pytest
from datasets import Dataset

from hf_reflect import TopFraction
from hf_reflect.errors import RecipeError


IFD = [0.5, None, 0.9, 1.2, 0.9, 0.1, 1.0, None]


def rows(**columns):
    count = len(IFD)
    data = {"instruction": ["q"] * count, "output": ["a" * i for i in range(count)], "ifd": IFD}
    return Dataset.from_dict({**data, **columns})


def test_the_highest_ifd_is_taken_in_the_order_of_the_rows():
    assert TopFraction("ifd", count=3)(rows())["ifd"][:] == [0.9, 1.2, 1.0]


def test_of_equal_scores_the_earlier_row_is_taken():
    assert TopFraction("ifd", count=1, below_one=True).choose(rows()).indices == [2]


def test_below_one_leaves_out_what_is_one_or_more():
    chosen = TopFraction("ifd", count=8, below_one=True).choose(rows())
    assert chosen.indices == [0, 2, 4, 5]
    assert (chosen.not_scored, chosen.left_out) == (2, 2)


def test_rows_without_a_score_are_counted_and_never_taken():
    chosen = TopFraction("ifd", count=8).choose(rows())
    assert 1 not in chosen.indices
    assert 7 not in chosen.indices
    assert (len(chosen.indices), chosen.rows, chosen.not_scored) == (6, 8, 2)


def test_a_fraction_is_of_all_rows_those_without_a_score_included():
    assert len(TopFraction("ifd", fraction=0.5)(rows())) == 4


def test_the_lowest_reversed_ifd_is_best():
    rifd = [0.5, 0.2, None, 0.9, 0.1, 0.7, 0.6, 0.8]
    assert TopFraction("rifd", count=2).choose(rows(rifd=rifd)).indices == [1, 4]


def test_the_gate_of_reversed_ifd_is_its_own():
    rifd = [1.5, 0.2, None, 0.9, 0.1, 0.7, 0.6, 0.8]
    assert TopFraction("rifd", count=8, below_one=True).choose(rows(rifd=rifd)).left_out == 1


def test_the_longest_responses_are_taken_by_length():
    assert TopFraction("length", count=2).choose(rows()).indices == [6, 7]


def test_random_is_the_same_for_a_seed_and_another_for_another():
    chosen = [TopFraction("random", count=4, seed=seed).choose(rows()).indices for seed in (1, 1, 2, 3, 4)]
    assert chosen[0] == chosen[1]
    assert len({tuple(indices) for indices in chosen}) > 1
    assert all(len(set(indices)) == 4 for indices in chosen)


def test_each_group_gives_its_share_and_the_total_is_exact():
    groups = ["a"] * 6 + ["b"] * 2
    data = {"instruction": ["q"] * 8, "output": ["a"] * 8, "ifd": [float(i) for i in range(8)], "topic": groups}
    chosen = TopFraction("ifd", count=4, per="topic").choose(Dataset.from_dict(data))
    assert chosen.indices == [3, 4, 5, 7]  # 6/8 and 2/8 of 4


def test_shares_that_are_no_whole_rows_go_to_the_largest_remainders():
    groups = ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    data = {"instruction": ["q"] * 8, "output": ["a"] * 8, "ifd": [float(i) for i in range(8)], "topic": groups}
    chosen = TopFraction("ifd", count=3, per="topic").choose(Dataset.from_dict(data))
    assert chosen.indices == [2, 5, 7]  # 9/8, 9/8 and 6/8 rows: one each, the last by its remainder


@pytest.mark.parametrize(
    "options",
    [
        {"by": "quality", "count": 1},
        {"by": "ifd"},
        {"by": "ifd", "count": 1, "fraction": 0.1},
        {"by": "ifd", "fraction": 0.0},
        {"by": "ifd", "fraction": 1.5},
        {"by": "ifd", "count": 0},
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(options):
    with pytest.raises(RecipeError):
        TopFraction(**options)


def test_a_missing_column_is_named_with_what_to_do():
    with pytest.raises(RecipeError, match="hf-reflect score"):
        TopFraction("rifd", count=1)(rows())
