"""Settings in a file: they come back as they were, and whatever is wrong is named."""

import json

import pytest

from magicpig.config import Config
from magicpig.config_file import ConfigFileError, load_config, to_text

GOOD = {"format": "magicpig.config", "version": 1, "settings": {"K": 9}, "about": {"model": "some"}}


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(sampler="sketch", budget=0.5, epsilon=0.1, seed=7),
        Config(dense_layers=(), layers={4: {"sampler": "sketch", "bits": 3}, 11: {"K": 9}}),
    ],
    ids=["defaults", "one setting for all", "layers"],
)
def test_settings_come_back_as_they_were(config, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(to_text(config, {"text": "ü"}))
    assert load_config(path) == load_config(str(path)) == config


def test_a_file_by_hand_needs_little(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"format": "magicpig.config", "version": 1, "settings": {}}')
    assert load_config(path) == Config()


def test_a_file_says_the_sampler_where_it_would_be_another_one(tmp_path):
    for config in (Config(sampler="sketch", K=9), Config(K=9), Config(sampler="lsh")):
        (tmp_path / "a.json").write_text(to_text(config, {}))
        assert load_config(tmp_path / "a.json") == config


def test_a_file_says_only_what_is_not_so_anyway():
    content = json.loads(to_text(Config(sampler="sketch", K=10, budget=512.0), {"date": "today"}))
    assert content == {
        "format": "magicpig.config",
        "version": 1,
        "settings": {"sampler": "sketch"},
        "about": {"date": "today"},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, 'not a file of settings: it has no "format": "magicpig.config"'),
        ({"version": 2}, "version=2 of the format; this package reads 1"),
        ({"setings": {}}, "'setings': there is no such key; allowed: format, version, settings, about"),
        ({"settings": [1]}, r"settings=\[1\]: must be an object"),
        ({"settings": {"K": 99}}, "K=99: .* less than or equal to 16"),
        ({"settings": {"buget": 3}}, "buget=3: "),
        ({"settings": {"layers": {"3": {"bits": 9}}}}, r"layers\.3\.bits=9: "),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_named(change, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ConfigFileError, match=rf"a\.json: {message}") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not JSON: Expecting value \(line 1, column 1\)"),
        (b'{"format":\n oh', r"not JSON: Expecting value \(line 2, column 2\)"),
        (b"\xff\xfe\x00", r"not UTF-8 text \(byte 2\)"),
        (b"[]", "not a file of settings"),
        (b"3", "not a file of settings"),
    ],
    ids=str,
)
def test_what_is_no_file_of_settings_is_refused(content, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigFileError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigFileError, match=r"^cannot read .*none\.json: No such file or directory$"):
        load_config(tmp_path / "none.json")
