"""A GGUF file is the model that it was made from: written here by the package that defines the format."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import gguf as format_
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import magicpig
from magicpig import gguf
from magicpig.model_dir import ModelError, gguf_file

HEADS, KV_HEADS, LAYERS, WIDTH, VOCABULARY = 4, 2, 2, 64, 262
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers": "blk",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGICPIG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def file(tmp_path, network):
    return written(tmp_path / "tiny.gguf", network)


def written(path: Path, network, kind="F32") -> Path:
    """The network as llama.cpp's converter writes it."""
    writer = format_.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*bytes_to_unicode().values(), "ab", "abc", "<|end|>", "<|user|>", "Ġa", "the"])
    writer.add_token_types([1] * 258 + [3, 3] + [1, 1])
    writer.add_token_merges(["a b", "ab c", "Ġ a"])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(258)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    for name, weight in network.state_dict().items():
        for there, here in NAMES.items():
            name = name.replace(there, here)
        numbers = weight.float().numpy()
        if "attn_q" in name or "attn_k" in name:  # llama.cpp has the two halves of a rotated pair side by side
            heads = HEADS if "attn_q" in name else KV_HEADS
            numbers = numbers.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(numbers.shape)
        numbers = np.ascontiguousarray(numbers)
        if numbers.ndim == 2 and kind != "F32":
            own = format_.GGMLQuantizationType[kind]
            writer.add_tensor(name, format_.quants.quantize(numbers, own), raw_dtype=own)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


IDS = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))


def test_a_file_is_the_model_that_it_was_made_from(file, network, cache):
    opened = magicpig.open_model(file)
    assert opened.directory.is_relative_to(cache)
    assert opened.directory.name == "tiny"
    assert opened.limit == 512
    found = magicpig.load(opened)
    assert found.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, network(IDS).logits, rtol=1e-5, atol=1e-5)
    assert opened.tokenizer("abc the")["input_ids"][:1] == [257]
    assert opened.tokenizer.decode(opened.tokenizer("abc the")["input_ids"]) == "abc the"
    assert opened.tokenizer.eos_token == "<|end|>"
    assert "m['content']" in opened.tokenizer.chat_template


def test_packed_weights_become_bfloat16(tmp_path, network):
    opened = magicpig.open_model(written(tmp_path / "packed.gguf", network, "Q8_0"))
    found = magicpig.load(opened)
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        wanted = network(IDS).logits.softmax(-1)
        assert (found(IDS).logits.float().softmax(-1) - wanted).abs().max() < 0.02 * wanted.max()
    assert json.loads((opened.directory / gguf.ABOUT).read_text())["source"] == "packed.gguf"


def test_it_is_converted_once(file, monkeypatch):
    stages: list[str] = []
    first = gguf.converted(file, stages.append)
    assert len(stages) > 2
    monkeypatch.setattr(gguf, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert gguf.converted(file, stages.append) == first
    (file.parent / "moved").mkdir()
    assert gguf.converted(file.rename(file.parent / "moved" / file.name)) == first


def test_a_file_is_not_read_again_to_find_it(file, monkeypatch):
    first = gguf.converted(file)
    monkeypatch.setattr(gguf, "checksum", lambda _: pytest.fail("read again"))
    assert gguf.converted(file) == first


def test_what_a_killed_conversion_left_is_removed(file):
    directory = gguf.converted(file)
    process = subprocess.Popen(["true"])
    process.wait()
    left = directory.parent / f".{directory.name}.{process.pid}.part"
    (left / "some").mkdir(parents=True)
    running = directory.parent / f".{directory.name}.{os.getppid()}.part"
    running.mkdir()
    shutil.rmtree(directory)
    assert gguf.converted(file) == directory
    assert not left.exists()
    assert running.exists()


def test_another_content_is_another_model(file, network, tmp_path):
    first = gguf.converted(file)
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other" / "tiny.gguf", network, "Q8_0")
    assert gguf.converted(other) != first


def test_a_directory_that_holds_one(file, tmp_path):
    assert gguf_file(file.parent) == file
    assert magicpig.open_model(str(file.parent)).directory == gguf.converted(file)
    (tmp_path / "second.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has 2 GGUF files, such as second.gguf; name the one to use"):
        gguf_file(tmp_path)


def test_other_paths_are_left_alone(tmp_path):
    assert gguf_file(tmp_path) is None
    assert gguf_file(tmp_path / "missing") is None
    (tmp_path / "config.json").touch()
    (tmp_path / "x.gguf").touch()
    assert gguf_file(tmp_path) is None


def test_a_conversion_that_fails_leaves_nothing(file, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"^cannot write .*tiny: No space left on device$"):
        gguf.converted(file)
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("cut", [10, 2000, 60_000])
def test_a_damaged_file_is_one_line(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"^.*tiny.gguf: ") as caught:
        gguf.converted(file)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_weights(tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    with pytest.raises(ModelError, match=r"text.gguf: not a GGUF file, it does not begin with GGUF"):
        magicpig.open_model(text)
    with pytest.raises(ModelError, match=r"^cannot read .*none.gguf: No such file or directory"):
        magicpig.open_model(tmp_path / "none.gguf")
    part = tmp_path / "m-00001-of-00003.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="one part of a split file"):
        magicpig.open_model(part)


def test_without_the_package_the_error_says_how(file, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ModelError, match=r"takes the package gguf, .* pip install 'magicpig\[gguf\]'$"):
        magicpig.open_model(file)


def test_convert_does_not_overwrite(file, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="is there already"):
        gguf.convert(file, tmp_path / "there")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert gguf.cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("MAGICPIG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf.cache_directory() == tmp_path / "xdg" / "magicpig"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf.cache_directory() == Path(os.path.expanduser("~")) / ".cache" / "magicpig"
