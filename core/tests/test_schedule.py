import json

import pytest

from attnmux import UnsupportedRequestError
from attnmux.schedule import Rule, Schedule


def test_first_rule_that_matches_decides():
    schedule = Schedule((Rule("A_ATTN", layers=(0, 2)), Rule("B_ATTN", role="cross")), default="C_ATTN")
    plans = {(layer, role): schedule.resolve(layer, 4, role).backends for layer in (0, 2) for role in ("self", "cross")}
    assert plans == {
        (0, "self"): ("A_ATTN",),
        (0, "cross"): ("A_ATTN",),
        (2, "self"): ("C_ATTN",),
        (2, "cross"): ("B_ATTN",),
    }


@pytest.mark.parametrize(
    ("layers", "covered"),
    [
        ((0, 1), [0]),
        ((1, None), [1, 2, 3]),
        ((-1, None), [3]),
        ((0, -1), [0, 1, 2]),
        ((-3, -1), [1, 2]),
        ((9, None), []),
    ],
)
def test_layers_count_from_either_end(layers, covered):
    rule = Rule("A_ATTN", layers=layers)
    assert [layer for layer in range(4) if rule.covers_layer(layer, 4, "self")] == covered


def test_steps_cut_a_run_into_phases():
    schedule = Schedule((Rule("A_ATTN", steps=(0, 10)), Rule("B_ATTN", steps=(30, None))), default="C_ATTN")
    plan = schedule.resolve(0, 1, "self")
    assert plan.edges == (0, 10, 30)
    assert plan.backends == ("A_ATTN", "C_ATTN", "B_ATTN")
    assert str(plan) == "A_ATTN, C_ATTN from step 10, B_ATTN from step 30"


def test_layer_outside_of_a_stepwise_rule_has_one_backend_in_words():
    schedule = Schedule((Rule("A_ATTN", steps=(0, 10), layers=(0, 1)),))
    assert str(schedule.resolve(1, 2, "self")) == "automatic"


def test_explanation_reads_in_order():
    schedule = Schedule(
        (Rule("a_attn", role="cross"), Rule("B_ATTN", layers=(0, 2), steps=(5, None))), default="C_ATTN"
    )
    assert schedule.explain() == (
        "1. A_ATTN: role cross\n2. B_ATTN: layers 0 to 1, steps 5 to the end\notherwise: C_ATTN"
    )


def test_goes_through_json():
    schedule = Schedule(
        (Rule("A_ATTN", role="self", layers=(-2, None)), Rule("B_ATTN", steps=(0, 3))), default="C_ATTN"
    )
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Rule("A_ATTN", steps=(-3, None)), r"steps=\(-3, None\): steps count from 0"),
        (lambda: Rule("A_ATTN", steps=(3, 3)), r"steps=\(3, 3\) holds nothing"),
        (lambda: Rule("A_ATTN", layers=(-1, -2)), r"layers=\(-1, -2\) holds nothing"),
        (lambda: Rule("A_ATTN", layers=3), r"layers=3 must be \(first, end\)"),
        (lambda: Rule("A_ATTN", layers=(None, 3)), r"must be \(first, end\)"),
        (lambda: Schedule(["A_ATTN"]), "rules is a sequence of attnmux.schedule.Rule, got 'A_ATTN'"),
        (lambda: Schedule.from_dict({"defualt": "A_ATTN"}), "got defualt"),
        (lambda: Schedule.from_dict({"rules": [{"backend": "A_ATTN", "step": [0, 1]}]}), "got step"),
        (lambda: Schedule.from_dict({"rules": [{"steps": [0, 1]}]}), "names no backend"),
    ],
)
def test_malformed_schedules_are_refused(make, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        make()
