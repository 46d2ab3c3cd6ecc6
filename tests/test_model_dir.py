"""What is wrong with a model directory is said before anything is loaded; see tests/test_cli.py for the rest."""

import json
import os
import struct

import pytest

from magicpig.model_dir import MOST_PARTS, ModelError, brings_code, check_directory, read_settings


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(3)})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(12))
    return folder


def refused(folder):
    with pytest.raises(ModelError) as caught:
        check_directory(folder)
    return str(caught.value)


def test_a_sound_directory_passes(model):
    check_directory(model)
    (model / "tokenizer").mkdir()  # as some repositories have
    check_directory(model)


def test_a_directory_that_is_not_there(model, tmp_path):
    assert refused(tmp_path / "missing").endswith("missing: no such directory")
    assert "not a directory" in refused(model / "config.json")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "a link to nowhere, where nothing is" in refused(tmp_path / "dangling")
    (tmp_path / "loop").symlink_to("loop")
    assert "Too many levels of symbolic links" in refused(tmp_path / "loop") or "loop" in refused(tmp_path / "loop")
    assert "too long" in refused(tmp_path / ("x" * 10_000))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_of_a_download_cache_that_lead_nowhere(model, name):
    (model / name).unlink()
    (model / name).symlink_to("../blobs/1234")
    assert refused(model) == f"{model / name}: a link to ../blobs/1234, where nothing is"
    (model / name).unlink()
    (model / name).symlink_to(name)
    assert refused(model).startswith(f"cannot read {model / name}: Too many levels of symbolic links")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_not_missing(model, name, monkeypatch):
    # Whoever runs the tests may be root, who may read everything.
    opened = type(model).open

    def deny(path, *arguments, **options):
        if path.name == name:
            raise PermissionError(13, os.strerror(13), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(type(model), "open", deny)
    assert refused(model) == f"cannot read {model / name}: Permission denied"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "cause"),
    [('{"a":' * 200_000, "nested too deep"), ("[]", "not a JSON object"), ("{", "not JSON"), ("9" * 5000, "digits")],
    ids=["deep", "list", "broken", "long"],
)
def test_settings_that_cannot_be_read(model, name, text, cause):
    (model / name).write_text(text)
    assert refused(model).startswith(f"{model / name}: ")
    assert cause in refused(model)


def test_settings_may_have_numbers_that_only_python_knows(model):
    (model / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "num_hidden_layers": 2}')
    check_directory(model)
    assert read_settings(model / "missing.json") == {}


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (
            {"num_hidden_layers": 1_000_000_000},
            f"num_hidden_layers=1000000000 is out of range; allowed: 0 to {MOST_PARTS}",
        ),
        ({"text_config": {"num_hidden_layers": -1}}, "num_hidden_layers=-1 is out of range"),
        ({"num_local_experts": 10**30}, "num_local_experts=1000000000000000000000000000000 is out of range"),
        ({"num_hidden_layers": 4}, "num_hidden_layers=4, but the weights are only 3 tensors"),
    ],
    ids=["layers", "nested", "experts", "more than tensors"],
)
def test_numbers_of_parts_that_would_take_for_ever_to_build(model, settings, cause):
    (model / "config.json").write_text(json.dumps(settings))
    assert cause in refused(model)


def test_code_of_its_own_is_seen(model):
    assert not brings_code(model)
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.T", null]}}')
    assert brings_code(model)
