"""Settings: the paper's defaults, their ranges, and one line about what is wrong."""

import json

import pytest

from magicpig.config import Config, parse_sampler
from magicpig.samplers.sketch import candidates_for
from magicpig.settings import DrawPolicy


def test_defaults_are_the_papers_but_for_the_sampler():
    config = Config()
    assert config.sampler == "sketch"
    assert (config.K, config.L, config.min_hits) == (10, 150, 2)
    assert (config.sinks, config.recent) == (4, 64)


@pytest.mark.parametrize("settings", [{"K": 10}, {"L": 150}, {"min_hits": 2}, {"K": 9, "L": 120, "budget": 64}])
def test_who_says_how_to_hash_wants_to_hash(settings):
    assert Config(**settings).sampler == "lsh"
    assert Config(**settings, sampler="sketch").sampler == "sketch"
    assert Config(layers={3: settings}).of_layer(3).sampler == "lsh"
    assert Config(layers={3: settings}).of_layer(2).sampler == "sketch"
    assert Config(sampler="topk", layers={3: settings | {"sampler": "sketch"}}).of_layer(3).sampler == "sketch"


# Smallest and largest allowed, and what lies beyond.
RANGES = {
    "K": (1, 16),
    "L": (2, 1024),  # 2: the default of min_hits
    "min_hits": (1, 127),
    "bits": (1, 4),
    "seed": (0, 2**63 - 1),
    "sinks": (0, None),
    "recent": (0, None),
    "block": (8, 4096),
    "exact_below": (0, None),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_within_range_are_kept_and_others_refused(name):
    low, high = RANGES[name]
    assert getattr(Config(**{name: low}), name) == low
    assert getattr(Config(**{name: high or 10**6}), name) == (high or 10**6)
    beyond = [low - 1] if high is None else [low - 1, high + 1]
    for value in beyond:
        with pytest.raises(ValueError, match=rf"^(L=1|min_hits=2|{name}={value})\b") as caught:
            Config(**{name: value})
        assert "\n" not in str(caught.value)


def test_every_number_has_a_range_here():
    assert {name for name, field in Config.model_fields.items() if field.annotation in (int, int | None)} == set(RANGES)


@pytest.mark.parametrize("value", ["10", 10.0, 3.5, None, True, [10]], ids=repr)
def test_numbers_are_not_converted(value):
    with pytest.raises(ValueError, match=r"^K="):
        Config(K=value)


def test_unknown_names_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^tables=150: ") as caught:
        Config(tables=150)
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"^K=0: [^;]*; L=-1: [^;]*; recnt=3: [^;]*$") as caught:
        Config(K=0, L=-1, recnt=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sampler", ["", "LSH", "top-k", None, 3], ids=repr)
def test_unknown_samplers_are_refused_with_those_there_are(sampler):
    with pytest.raises(ValueError, match=r"^sampler=.*'lsh', 'sketch', 'full', .* or 'uniform-tail'$"):
        Config(sampler=sampler)


def test_more_hits_than_tables_are_refused():
    assert Config(L=3, min_hits=3).min_hits == 3
    with pytest.raises(ValueError, match=r"^min_hits=4 is larger than L=3: no key could ever be sampled$"):
        Config(L=3, min_hits=4)


def test_settings_do_not_change_and_compare_by_value():
    config = Config(K=8)
    with pytest.raises(ValueError, match="frozen"):
        config.K = 9
    assert config == Config(K=8)
    assert config != Config(K=9)
    assert Config(**config.model_dump()) == config


def test_no_layer_is_dense_by_default():
    # What the paper keeps exact is counted among the layers of its models; others need others, if any: decision 18.
    assert not any(Config().is_dense(layer) for layer in range(100))


@pytest.mark.parametrize("given", [[1, 5], (1, 5), (5, 1, 1)], ids=repr)
def test_dense_layers_may_be_chosen(given):
    config = Config(dense_layers=given)
    assert [layer for layer in range(20) if config.is_dense(layer)] == [1, 5]


@pytest.mark.parametrize("given", [[0, -1], [-3]], ids=repr)
def test_layers_count_from_zero(given):
    with pytest.raises(ValueError, match=r"^dense_layers=\(.*-[13].*\) has a negative layer; layers count from 0$"):
        Config(dense_layers=given)


@pytest.mark.parametrize("given", ["0,16", 3, [0.5], ["0"], {0: 1}], ids=repr)
def test_dense_layers_are_a_list_of_numbers(given):
    with pytest.raises(ValueError, match=r"^dense_layers") as caught:
        Config(dense_layers=given)
    assert "\n" not in str(caught.value)


def test_without_sampling_every_layer_is_dense():
    config = Config(sampler="full", dense_layers=[3])
    assert all(config.is_dense(layer) for layer in range(40))


def test_a_layer_may_have_settings_of_its_own():
    config = Config(budget=100, dense_layers=[0], layers={2: {"sampler": "sketch", "bits": 3}, 5: {"sampler": "full"}})
    assert config.of_layer(1) == Config(budget=100, dense_layers=[0])
    assert config.of_layer(2) == Config(sampler="sketch", bits=3, budget=100, dense_layers=[])
    assert [layer for layer in range(6) if config.is_dense(layer)] == [0, 5]


def test_settings_of_a_layer_come_before_those_of_all():
    config = Config(sampler="full", dense_layers=(16,), layers={0: {"K": 9}})
    assert [layer for layer in range(3) if config.is_dense(layer)] == [1, 2]  # not 0, which has something to sample by
    assert not Config(sampler="full", layers={3: {"sampler": "sketch"}}).is_dense(3)
    assert Config(sampler="full", layers={3: {"sampler": "sketch"}}).is_dense(2)


def test_settings_of_layers_survive_json():
    config = Config(layers={11: {"epsilon": 0.1}, 2: {"sampler": "lsh", "K": 8}})
    assert Config(**json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({-1: {}}, r"^layers\.-1: there is no such layer"),
        (
            {3: {"sinks": 2}},
            r"^layers\.3\.sinks is no setting of a single layer; these are sampler, budget, candidates, ",
        ),
        ({3: {"bits": 9}}, r"^layers\.3\.bits=9: .* less than or equal to 4$"),
        ({3: {"L": 1}}, r"^layers\.3\.min_hits=2 is larger than L=1"),
        ({1: {"bits": 3}}, r"^layers\.1: the layer is in dense_layers as well$"),
        ({"first": {}}, r"^layers\.first"),
        ([3], r"^layers=\[3\]"),
        ({3: 5}, r"^layers\.3=5"),
    ],
    ids=str,
)
def test_bad_settings_of_layers_are_named(layers, message):
    with pytest.raises(ValueError, match=message) as caught:
        Config(dense_layers=(1,), layers=layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("sketch", {"sampler": "sketch"}),
        ("lsh:K=9,L=120", {"sampler": "lsh", "K": 9, "L": 120}),
        ("topk:0.02", {"sampler": "topk", "budget": 0.02}),
        ("sketch:256,bits=3,kv_dtype=int8", {"sampler": "sketch", "budget": 256, "bits": 3, "kv_dtype": "int8"}),
        ("lsh:centre=false,L=75", {"sampler": "lsh", "centre": False, "L": 75}),
    ],
)
def test_a_sampler_may_have_its_settings_behind_a_colon(text, settings):
    assert parse_sampler(text) == settings
    assert Config(sampler=text) == Config(**settings)
    assert Config(sampler=text, recent=32) == Config(**settings, recent=32)
    by_layer = {name: value for name, value in settings.items() if name != "kv_dtype"}
    if by_layer == settings:
        assert Config(layers={3: {"sampler": text}}) == Config(layers={3: settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "lsh:K=9", "K": 8}, r"^K=8 and sampler='lsh:K=9': give it once$"),
        ({"sampler": "lsh:k=9"}, r"^unknown setting 'k' of 'lsh:k=9'; allowed: budget, candidates, "),
        ({"sampler": "lsh:bit=9"}, r"^unknown setting 'bit' of 'lsh:bit=9'; did you mean bits\?$"),
        ({"sampler": "lsh:K=many"}, r"^sampler 'lsh:K=many': K='many' is not a number, true or false$"),
        ({"sampler": "lsh:K=9,K=8"}, r"^unknown setting 'K' of 'lsh:K=9,K=8'"),
        ({"sampler": "lsh:layers=3"}, r"^unknown setting 'layers'"),
        ({"sampler": "lhs:K=9"}, r"^sampler='lhs': Input should be"),
        ({"sampler": "sketch:0"}, r"^budget=0: "),
        ({"layers": {3: {"sampler": "sketch:sinks=9"}}}, r"^layers\.3\.sinks is no setting of a single layer"),
    ],
    ids=str,
)
def test_what_is_wrong_behind_the_colon_is_named(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        Config(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Config(), "sketch:512"),
        (Config(K=9), "lsh:K=9,L=150"),
        (Config(sampler="full"), "full"),
        (Config(sampler="topk:0.02"), "topk:0.02"),
        (Config(budget=0.1, candidates=2000), "sketch:0.1,candidates=2000"),
        (Config(bits=3, epsilon=0.05, centre=False, exact_below=0), "sketch:512,bits=3,epsilon=0.05,centre=false"),
    ],
    ids=str,
)
def test_a_config_says_in_a_text_how_it_samples(config, text):
    assert config.text() == text
    assert Config(sampler=text, exact_below=config.exact_below) == config


@pytest.mark.parametrize(
    ("settings", "body", "expected"),
    [
        ({}, 100_000, (512, 1024)),
        ({"candidates": 2000}, 1000, (512, 1000)),
        ({"budget": 0.1}, 1000, (100, 200)),
        ({"budget": 0.6}, 1000, (600, 1200)),  # that is, all
        ({"budget": 100, "candidates": 0.5}, 1000, (100, 500)),
        ({"budget": 0.001, "candidates": 0.001}, 10, (1, 1)),
        ({"budget": 100, "candidates": 7}, 1000, (100, 100)),
    ],
    ids=str,
)
def test_candidates_are_as_the_noise_asks_for_unless_said_otherwise(settings, body, expected):
    policy = DrawPolicy.of(Config(**settings))
    budget = policy.budget_for(body)
    assert (budget, candidates_for(policy, body, budget, 0.8)) == expected
    # More rows have as many more candidates.
    assert candidates_for(policy, body, 2 * budget, 0.8) == 2 * expected[1]
    assert (candidates_for(policy, body, budget, 2.6) == 8 * budget) == ("candidates" not in settings)


def test_settings_may_be_changed():
    config = Config(sampler="lsh", K=9, exact_below=0)
    assert config.changed({}) == config
    assert config.changed({"L": 75}) == Config(sampler="lsh", K=9, L=75, exact_below=0)
    assert config.changed({"sampler": "sketch:64"}) == Config(sampler="sketch", budget=64, K=9, exact_below=0)
    assert Config(K=9, sampler="sketch").changed({"budget": 9}).sampler == "sketch"
    assert Config().changed({"K": 9}).sampler == "lsh"
    with pytest.raises(ValueError, match=r"^bits=9: "):
        config.changed({"bits": 9})
