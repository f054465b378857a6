"""The claims' judgement, on measurements of which it is known what they say."""

import math

import numpy as np
import pytest
from scipy import stats

from ztsnr.demo import claims as module
from ztsnr.demo.claims import LEARNED, Claim, Evidence, judge_claims
from ztsnr.demo.composed import COLOURS
from ztsnr.demo.measures import colour_distance
from ztsnr.demo.objectives import EPSILON, OURS, PLAIN, STARVED
from ztsnr.diagnostics.estimates import CONFIDENCE, Estimate

from .synthetic import COHERENT, GREYISH, NOISES, as_claimed, as_denied, numbers_of

NUMBERS = ["1", "2", "2b", "3", "4", "5"]


def judged(runs):
    """The claims by their numbers."""
    return {claim.number: claim for claim in judge_claims(runs)}


def answers(*runs):
    return {number: claim.answer for number, claim in judged(runs).items()}


def evidence_of(runs, number, text):
    """The first evidence of a claim in which a text stands."""
    return next(one for one in judged(runs)[number].evidence if text in one.text)


# ----------------------------------------------------------------------------------------------------------------------
# Yes, no, and cannot tell


def test_all_hold():
    assert answers(as_claimed()) == dict.fromkeys(NUMBERS, "yes")
    assert answers(as_claimed(), as_claimed(), as_claimed()) == dict.fromkeys(NUMBERS, "yes")
    assert [claim.number for claim in judge_claims([as_claimed()])] == NUMBERS


def test_none_hold():
    assert answers(as_denied()) == dict.fromkeys(NUMBERS, "no")
    assert answers(as_denied(), as_denied()) == dict.fromkeys(NUMBERS, "no")


@pytest.mark.parametrize("trained_badly", [(EPSILON, PLAIN, STARVED, OURS), (OURS,)])
@pytest.mark.parametrize("missed", [0.6, 1.0, 1.3])
def test_untrained_networks_cannot_tell(trained_badly, missed):
    """Whatever else was measured of them, for or against."""
    for run in (as_claimed(), as_denied()):
        for name in trained_badly:
            run[name] = run[name] | {"error/missed/held out": np.array(missed)}
        assert answers(run) == dict.fromkeys(NUMBERS, "cannot tell")


@pytest.mark.parametrize(("name", "claims"), [(EPSILON, {"2"}), (PLAIN, {"2", "2b"}), (STARVED, {"5"})])
def test_an_untrained_network_is_missed_where_it_is_asked_for_alone(name, claims):
    run = as_claimed(**{name: {"missed": 1.0}})
    assert {number for number, answer in answers(run).items() if answer == "cannot tell"} == claims


def test_one_untrained_run_of_several_cannot_tell():
    bad = as_claimed()
    bad[OURS] = bad[OURS] | {"error/missed/held out": np.array(LEARNED)}
    assert answers(as_claimed(), bad) == dict.fromkeys(NUMBERS, "cannot tell")


OURS_FAILS = {
    "no better from infinity": ("1", {"grounds": {"14.6": GREYISH, "infinity": GREYISH}}, "no"),
    "no worse from 14.6": ("1", {"grounds": {}}, "no"),
    "one ground of four": ("1", {"grounds": {"14.6": GREYISH | {"light": 194.0}}}, "no"),
    "as grey as the others": ("2", {"grounds": {"14.6": GREYISH, "infinity": GREYISH}}, "no"),
    "as tinted": ("2", {"grounds": {"14.6": GREYISH}, "tint": {"infinity": 30.0}}, "no"),
    "as uneven as the others": ("2b", {"grounds": {"14.6": GREYISH}, "uneven": {"infinity": 9.0}}, "no"),
    "as uneven where it is seen": ("2b", {"grounds": {"14.6": GREYISH}, "seen": {"infinity": 9.0}}, "no"),
    "as much contrast of blocks": ("2b", {"grounds": {"14.6": GREYISH}, "contrast": 9.0}, "no"),
    "a grey first prediction": ("3", {"first": 40.0}, "no"),
    "coherent without": ("4", {"whole": {"14.6": 0.95, "29": 0.95, "infinity": 1.0}}, "no"),
    "coherent neither way": ("4", {"whole": {"14.6": 0.1, "29": 0.1, "infinity": 1.0}}, "no"),
    "not coherent at all": ("4", {"whole": COHERENT | {"infinity": 0.5}}, "cannot tell"),
    "as wrong at t = T": ("5", {"last": 0.98}, "no"),
}


@pytest.mark.parametrize("case", OURS_FAILS)
def test_each_claim_can_fail(case):
    number, change, answer = OURS_FAILS[case]
    run = as_claimed(**{OURS: change})
    assert answers(run)[number] == answer


@pytest.mark.parametrize(("name", "number"), [(EPSILON, "2"), (PLAIN, "2"), (PLAIN, "2b"), (STARVED, "5")])
def test_other_networks_that_do_as_well_speak_against_it(name, number):
    run = as_claimed()
    run[name] = numbers_of(name)
    assert answers(run)[number] == "no"


def test_values_that_are_all_over_the_place_cannot_tell():
    run = as_claimed()
    shaky = {"grounds": {"14.6": GREYISH}, "uneven": {"14.6": 9.0}, "spread": 120.0}
    run[PLAIN] = numbers_of(PLAIN, **shaky)
    assert answers(run)["2"] == answers(run)["2b"] == "cannot tell"
    run[OURS] = numbers_of(OURS, **shaky | {"whole": COHERENT})
    assert answers(run)["1"] == "cannot tell"


def test_an_interval_across_the_limit_cannot_tell():
    def answer(value, error, testable=True):
        return Evidence("", 0, 0, Estimate(value, error, 4), 1.0, testable).answer

    assert [answer(3, 1), answer(3, 2.5), answer(0.5, 0.2), answer(-9, 1)] == ["yes", "cannot tell", "no", "no"]
    assert answer(3, math.inf) == "cannot tell"
    assert answer(3, 1, testable=False) == answer(-3, 1, testable=False) == "cannot tell"


def test_a_claim_is_the_worst_of_what_is_judged():
    yes, no, unclear = (Evidence("", 0, 0, Estimate(value, 1, 4), 1.0) for value in (9, -9, 1))
    shown = Evidence("", 0, 0, Estimate(-9, 1, 4), 1.0, judged=False)
    for evidence, answer in [
        ((yes, yes), "yes"),
        ((yes, unclear), "cannot tell"),
        ((unclear, no, yes), "no"),
        ((yes, shown), "yes"),
    ]:
        assert Claim("1", "", evidence).answer == answer
    assert str(shown).endswith("(shown, not judged)")
    assert str(no).endswith("(no)")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def half_width(values):
    """Of Student's t, by scipy's own interval."""
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, np.mean(values), stats.sem(values))
    return (high - low) / 2


def test_a_difference_is_paired_by_the_noise():
    run = as_claimed()
    key = "solids/{}/1/brightness/black"
    noise = 50 * np.random.default_rng(1).standard_normal(NOISES)
    finite, infinite = 60 + noise, 7 + noise + 0.1 * np.arange(NOISES)
    run[OURS] = run[OURS] | {key.format("14.6"): finite, key.format("infinity"): infinite}
    found = evidence_of([run], "1", '"black"')
    wanted = module._wanted("black")
    assert (found.one, found.other) == pytest.approx((finite.mean() - wanted, infinite.mean() - wanted))
    assert found.difference.value == pytest.approx((finite - infinite).mean())
    assert found.difference.error == pytest.approx(half_width(finite - infinite))
    assert found.difference.error < 1 < half_width(finite)
    assert found.answer == "yes"


def evidence_of_dark(runs):
    return evidence_of(runs, "1", '"dark"')


def runs_that_differ(differences):
    """One training each, whose dark from 14.6 is so many levels brighter than from infinity."""
    made = []
    for difference in differences:
        grounds = {"14.6": GREYISH | {"dark": 55.0 + difference}}
        made.append(as_claimed(**{OURS: {"grounds": grounds}}))
    return made


def test_trainings_that_disagree_widen_the_interval():
    alone = evidence_of_dark(runs_that_differ([60]))
    agreeing = evidence_of_dark(runs_that_differ([60, 60, 60]))
    disagreeing = evidence_of_dark(runs_that_differ([20, 60, 100]))
    assert agreeing.difference.error == pytest.approx(alone.difference.error)
    assert disagreeing.difference.value == pytest.approx(agreeing.difference.value) == pytest.approx(60, abs=1e-6)
    # over the trainings, of which each is one value
    assert disagreeing.difference.error == pytest.approx(half_width([20, 60, 100]))
    assert (alone.answer, disagreeing.answer) == ("yes", "cannot tell")
    assert answers(*runs_that_differ([20, 60, 100]))["1"] == "cannot tell"


def test_runs_without_a_training_say_nothing_of_it():
    whole = as_claimed()
    other = {OURS: numbers_of(OURS, grounds={"14.6": GREYISH | {"dark": 90.0}}, last=0.5, whole=COHERENT)}
    alone, both = judged([whole]), judged([whole, other])
    for number in ("2", "2b", "5"):  # that compare with other trainings
        assert both[number] == alone[number]
    # what is said of ours alone is of both
    expected = np.mean([evidence_of_dark([run]).one for run in (whole, other | as_denied_but_ours())])
    assert evidence_of_dark([whole, other]).one == pytest.approx(expected)
    # and each comparison leaves out the runs that lack one of its own
    differing = as_claimed(
        **{PLAIN: {"tint": {"14.6": 90.0}}, EPSILON: {"grounds": {"14.6": GREYISH | {"black": 90.0}}}}
    )
    del differing[PLAIN]
    found, first = judged([whole, differing])["2"].evidence, alone["2"].evidence
    for one, before in zip(found, first, strict=True):
        assert (one == before) == (PLAIN in one.text)


def as_denied_but_ours():
    return {name: numbers for name, numbers in as_denied().items() if name != OURS}


def test_pulled_to_grey_is_the_mean_of_black_and_white():
    run = as_claimed(**{PLAIN: {"grounds": {"14.6": {"black": 46.6, "white": 198.4}}}})
    found = evidence_of([run], "2", f"in levels: {PLAIN} from its own")
    assert found.one == pytest.approx((40 + 50) / 2, abs=1)
    assert found.other == pytest.approx(0, abs=1)


def test_the_first_prediction_is_judged_beside_the_average_of_all_colours():
    means = {name: module.mean_colour(name) for name in COLOURS}
    average = np.mean(list(means.values()), axis=0)
    guess = np.mean([colour_distance(average, mean) for mean in means.values()])
    for first, answer in ((0.45 * guess, "yes"), (0.55 * guess, "no")):
        run = as_claimed(**{OURS: {"first": first, "spread": 0.01}})
        (found,) = judged([run])["3"].evidence
        assert (found.one, found.other) == pytest.approx((guess, first), abs=0.05)
        assert found.answer == answer


def test_whole_is_counted_and_coherence_asks_for_it():
    (counted, *shown) = judged([as_claimed()])["4"].evidence
    assert (counted.one, counted.other) == pytest.approx((round(48 * 0.9) / 48, round(48 * 0.3) / 48))
    assert counted.judged
    assert not any(one.judged for one in shown)
    # of what one thing explains: 0.95 of the whole ones, and 0.2 of the others
    larger, smaller = (0.2 + 0.75 * round(48 * share) / 48 for share in (0.9, 0.3))
    assert (shown[0].one, shown[0].other) == pytest.approx((larger, smaller))


def test_the_error_at_the_end_is_that_of_both_kinds_of_pairs():
    found = judged([as_claimed(**{STARVED: {"last": 0.9}, OURS: {"last": 0.3}})])["5"].evidence
    assert len([one for one in found if one.judged]) == 2
    for one in found[:2]:
        assert (one.one, one.other) == pytest.approx((0.9, 0.3))
        assert one.difference.value == pytest.approx(0.6)


def test_what_is_wanted_is_the_mean_of_the_pictures():
    assert module._wanted("black") == pytest.approx(6.6, abs=0.4)  # 16.5 / sqrt(2 pi), see test_composed
    assert module._wanted("white") == pytest.approx(255 - 6.6, abs=0.4)
    assert module._wanted("dark") == pytest.approx(55, abs=3)
