"""From measurements to settings: what is good enough, what is fastest, and what the file then says."""

from __future__ import annotations

import math

import pytest
import torch

from magicpig.config import EXACT, Config
from magicpig.studies.tune import Goal, LayerChoice, Measured, Tuning
from magicpig.studies.tune.choose import good_enough, settings_of
from magicpig.studies.tune.report import name, summary

GOAL = Goal(0.05, 0.1)
FULL = Measured(EXACT, torch.zeros(4, 2), None, share=1.0, cost=1.0, index_bytes=0)


def measured(config: Config, chosen_by: float, cost: float, held_out: float | None = None) -> Measured:
    errors = torch.full((4, 2), chosen_by, dtype=torch.float64)
    if held_out is not None:
        errors[2:] = held_out
    return Measured(config, errors, torch.full((4, 2), 0.04), share=0.1, cost=cost, index_bytes=100)


def sketch(budget: float, **settings: float) -> Config:
    return Config(**{"sampler": "sketch", "budget": budget, "bits": 2} | settings)


def layers(*tried: list[Measured]) -> list[LayerChoice]:
    return [LayerChoice(i, 2.0, [FULL, *each], good_enough([FULL, *each], GOAL)[0]) for i, each in enumerate(tried)]


def test_the_fastest_that_meets_the_goal_is_chosen():
    wrong, slow, fast = (
        measured(sketch(i), *each) for i, each in enumerate([(0.06, 0.1), (0.01, 0.5), (0.05, 0.4)], 1)
    )
    assert good_enough([FULL, wrong, slow, fast], GOAL) == [fast, slow, FULL]


def test_what_saves_next_to_nothing_is_not_worth_an_error():
    assert good_enough([FULL, measured(sketch(9), 0.0, 0.96)], GOAL) == [FULL]
    assert len(good_enough([FULL, measured(sketch(9), 0.0, 0.94)], GOAL)) == 2


def test_a_few_large_errors_are_too_many():
    errors = torch.full((20, 2), 0.01)
    errors[0, 0] = 0.9  # one of 40; the mean is 0.032
    assert GOAL.is_met(errors)
    errors[1:3, 0] = 0.2  # three of 40
    assert float(errors.mean()) < 0.05
    assert not GOAL.is_met(errors)


def test_settings_that_may_have_been_lucky_are_not_chosen():
    errors = torch.tensor([0.01, 0.07, 0.02, 0.08, *[0.0] * 4], dtype=torch.float64)[:, None].expand(8, 3)
    assert GOAL.is_met(errors[:4])  # mean 0.045
    assert not GOAL.is_safe(errors[:4])  # with a standard error of 0.015
    assert GOAL.is_safe(torch.full((4, 3), 0.045))
    assert good_enough([FULL, Measured(sketch(9), errors, None, share=0.1, cost=0.1, index_bytes=1)], GOAL) == [FULL]


def test_the_choice_does_not_look_at_the_steps_it_is_judged_by():
    unlucky = measured(sketch(7), 0.01, 0.2, held_out=0.3)
    assert good_enough([FULL, unlucky], GOAL) == [unlucky, FULL]
    tuning = Tuning(GOAL, layers([unlucky]))
    assert summary(tuning)["reached"] == {"mean": 0.3, "p95": 0.3}


def test_settings_are_those_of_each_layer():
    tuning = Tuning(
        GOAL,
        [
            *layers([measured(Config(K=9, L=120), 0.01, 0.3)], [measured(sketch(64), 0.2, 0.1)]),
            LayerChoice(5, 2.0, [FULL], measured(sketch(128, bits=3, epsilon=0.07, exact_below=0), 0.01, 0.25)),
        ],
    )
    own = {"sampler": "sketch", "budget": 128, "bits": 3, "epsilon": 0.07}
    assert tuning.config == Config(dense_layers=(1,), layers={0: {"sampler": "lsh", "K": 9, "L": 120}, 5: own})
    assert isinstance(tuning.config.layers[5]["budget"], int)  # nicer to read
    assert tuning.config.exact_below == Config().exact_below  # trials sample however short the context is
    assert tuning.full_ms == 6.0
    assert tuning.tuned_ms == pytest.approx(2.0 * (0.3 + 1.0 + 0.25))


def test_where_nothing_is_good_enough_everything_is_read():
    assert Tuning(GOAL, layers([measured(sketch(64), 0.2, 0.1)])).config == EXACT


def test_the_best_single_setting_leaves_layers_out_where_it_is_not_good_enough():
    tuning = Tuning(
        GOAL,
        layers(
            [measured(sketch(1), 0.01, 0.5), measured(sketch(2), 0.01, 0.7)],
            [measured(sketch(1), 0.20, 0.5), measured(sketch(2), 0.01, 0.6)],
        ),
    )
    config, ms = tuning.uniform
    assert config == sketch(2)
    assert ms == pytest.approx(2.0 * (0.7 + 0.6))  # the other one: 0.5 + 1
    assert tuning.tuned_ms == pytest.approx(2.0 * (0.5 + 0.6))


def test_errors_that_were_foreseen():
    one = measured(sketch(9), 0.05, 0.1, held_out=0.07)
    assert one.foreseen == 0.5  # 0.04 was predicted
    exact = Measured(sketch(9), torch.full((4, 2), 1e-7), torch.zeros(4, 2), share=1.0, cost=1.0, index_bytes=0)
    assert exact.foreseen is None
    assert FULL.foreseen is None


def test_settings_are_named_in_full_whatever_the_defaults_are():
    assert settings_of(EXACT) == {"sampler": "full"}
    assert settings_of(Config()) == {"sampler": "sketch", "budget": 512, "bits": 2}
    assert settings_of(Config(sampler="lsh")) == {"sampler": "lsh", "K": 10, "L": 150}
    assert settings_of(Config(min_hits=3, centre=False, seed=4)) == {
        "sampler": "lsh",
        "K": 10,
        "L": 150,
        "min_hits": 3,
        "centre": False,
    }
    assert settings_of(sketch(0.5)) == {"sampler": "sketch", "budget": 0.5, "bits": 2}


@pytest.mark.parametrize("pair", [(0.0, 0.1), (0.1, 0.05), (0.5, 1.0), (math.nan, 0.1)], ids=str)
def test_goals_that_make_no_sense(pair):
    with pytest.raises(ValueError, match=r"^mean=.* and p95=.* must be between 0 and 1, and the mean not above p95$"):
        Goal(*pair)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (EXACT, "full attention"),
        (Config(K=9, L=120), "lsh 9,120"),
        (Config(), "sketch 512, 2 bit"),
        (sketch(512), "sketch 512, 2 bit"),
        (sketch(128, bits=3, epsilon=0.075), "sketch 128, 3 bit to 7.5%"),
    ],
)
def test_settings_have_short_names(config, text):
    assert name(config) == text
