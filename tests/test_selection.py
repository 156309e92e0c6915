import pytest

from hf_reflect.errors import RecipeError
from hf_reflect.selection import Candidate, accept, choose, keep
from hf_reflect.transforms import KeepRecycled, SelectInstruction


def scored(*scores):
    return [Candidate(True, score) for score in scores]


UNUSABLE = Candidate(False)


@pytest.mark.parametrize(
    ("measure", "better", "worse", "won", "lost"),
    [("ifd", 0.9, 0.5, "higher_ifd", "not_higher_ifd"), ("rifd", 0.5, 0.9, "lower_rifd", "not_lower_rifd")],
)
def test_the_higher_ifd_and_the_lower_r_ifd_win(measure, better, worse, won, lost):
    rewritten = choose(measure, worse, scored(better))
    assert (rewritten.candidate, rewritten.reason, rewritten.kept) == (0, won, "rewrite")
    stayed = choose(measure, better, scored(worse))
    assert (stayed.candidate, stayed.reason, stayed.kept) == (None, lost, "original")


@pytest.mark.parametrize("measure", ["ifd", "rifd"])
def test_a_tie_keeps_what_was_there(measure):
    assert choose(measure, 0.7, scored(0.7, 0.7)).candidate is None


@pytest.mark.parametrize(("measure", "best"), [("ifd", 0.9), ("rifd", 0.1)])
def test_a_tie_between_rewrites_keeps_the_earlier(measure, best):
    assert choose(measure, 0.5, scored(0.5, best, best)).candidate == 1


@pytest.mark.parametrize(("measure", "expected"), [("ifd", 2), ("rifd", 1)])
def test_the_best_of_several_rewrites_is_kept(measure, expected):
    assert choose(measure, 0.5, scored(0.6, 0.1, 0.9, 0.4)).candidate == expected


@pytest.mark.parametrize("measure", ["ifd", "rifd"])
@pytest.mark.parametrize("current", [0.0, 0.5, 5.0, None])
def test_a_null_score_never_wins(measure, current):
    decision = choose(measure, current, scored(None, None))
    assert (decision.candidate, decision.reason) == (None, "not_scored")


@pytest.mark.parametrize("measure", ["ifd", "rifd"])
@pytest.mark.parametrize("score", [0.0, 0.5, 5.0])
def test_what_was_there_loses_to_any_number_if_its_score_is_null(measure, score):
    assert choose(measure, None, scored(None, score)).candidate == 1


def test_nulls_among_the_rewrites_hide_no_other():
    assert choose("ifd", 0.5, scored(None, 0.9, None)).candidate == 1


@pytest.mark.parametrize("measure", ["ifd", "rifd"])
def test_a_reflection_without_rewrite_is_never_kept_whatever_its_score(measure):
    unusable = [Candidate(False, 9.0, 0.1), Candidate(False, 0.0, 0.1)]
    assert choose(measure, 0.5, unusable).reason == "no_rewrite"
    assert choose(measure, 0.5, unusable).candidate is None


@pytest.mark.parametrize("decide", [accept, lambda candidates: choose("ifd", 0.5, candidates)])
def test_without_candidates_the_original_stays(decide):
    assert (decide([]).candidate, decide([]).reason) == (None, "no_rewrite")


@pytest.mark.parametrize("ifd", [1.0, 1.7, None])
def test_the_gate_keeps_a_good_pair_from_a_rewrite_with_an_ifd_of_one_or_more_or_unknown(ifd):
    rewrite = [Candidate(True, 0.1, ifd)]
    decision = choose("rifd", 0.5, rewrite, current_ifd=0.8, gate_first=True)
    assert (decision.candidate, decision.reason) == (None, "gated")
    assert choose("rifd", 0.5, rewrite, current_ifd=0.8).candidate == 0


@pytest.mark.parametrize("current_ifd", [1.0, 1.7, None])
def test_the_gate_is_open_where_the_pair_itself_does_not_pass_it(current_ifd):
    decision = choose("rifd", 0.5, [Candidate(True, 0.1, 1.7)], current_ifd=current_ifd, gate_first=True)
    assert decision.candidate == 0


def test_behind_a_gated_rewrite_the_best_that_passes_is_kept():
    candidates = [Candidate(True, 0.4, 0.9), Candidate(True, 0.1, 1.2), Candidate(True, 0.3, 0.9)]
    assert choose("rifd", 0.5, candidates, current_ifd=0.8, gate_first=True).candidate == 2


def test_a_rewrite_that_would_have_lost_anyway_is_not_called_gated():
    decision = choose("rifd", 0.5, [Candidate(True, 0.6, 1.2)], current_ifd=0.8, gate_first=True)
    assert decision.reason == "not_lower_rifd"


def test_method_reflect_accepts_the_first_usable_rewrite_without_looking_at_scores():
    decision = accept([UNUSABLE, Candidate(True, None), Candidate(True, 9.0)])
    assert (decision.candidate, decision.reason) == (1, "accepted")


def test_method_reflect_keeps_the_original_where_there_is_no_rewrite():
    assert (accept([UNUSABLE]).candidate, accept([UNUSABLE]).reason) == (None, "no_rewrite")


@pytest.mark.parametrize(
    ("recycled", "all_rows", "reflected", "below_one"),
    [("original", 1, 0, 0), ("instruction", 1, 0, 0), ("response", 1, 1, 1), ("both", 1, 1, 1)],
)
def test_a_policy_keeps_rows_by_what_became_of_them(recycled, all_rows, reflected, below_one):
    assert keep("all", recycled, 0.5, 0.5) == bool(all_rows)
    assert keep("reflected", recycled, 0.5, 0.5) == bool(reflected)
    assert keep("below-one", recycled, 0.5, 0.5) == bool(below_one)


@pytest.mark.parametrize(
    ("ifd", "rifd", "stays"),
    [
        (0.99, 0.99, True),
        (1.0, 0.5, False),
        (0.5, 1.0, False),
        (None, 0.5, False),
        (0.5, None, False),
        (0.0, 0.0, True),
    ],
)
def test_below_one_needs_both_scores_below_one(ifd, rifd, stays):
    assert keep("below-one", "both", ifd, rifd) is stays
    assert keep("reflected", "both", ifd, rifd)


@pytest.mark.parametrize("make", [lambda: SelectInstruction("best"), lambda: KeepRecycled("some")])
def test_an_unknown_method_or_policy_is_refused(make):
    with pytest.raises(RecipeError, match="must be one of"):
        make()
