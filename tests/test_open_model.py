"""What a model can be opened with, and an answer asked with, beside what test_cli.py says of directories."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

import magicpig
from magicpig.cli import app
from magicpig.config import EXACT
from magicpig.generation import encode, generate, load, open_model
from magicpig.model_dir import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own

LIMIT = 256
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, save_tiny_llama) -> Path:
    """A tiny Llama with random weights and a tokenizer of words; a chat model by its template."""
    words = ["<unk>", "<eos>", "system", "user", "assistant", *(f"w{i}" for i in range(59))]
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_llama(path, words, template=TEMPLATE, max_position_embeddings=LIMIT)


def words(ids, tokenizer):
    return tokenizer.decode(ids).split()


def test_the_library_opens_and_loads(directory):
    opened = magicpig.open_model(str(directory))
    network = magicpig.load(opened)
    assert opened.limit == LIMIT
    assert network.config.num_hidden_layers == 2


def test_a_system_message_comes_first(directory):
    opened = open_model(directory)
    ids = encode(opened, "w1 w2", chat=True, system="w9")
    assert words(ids, opened.tokenizer) == ["system", "w9", "user", "w1", "w2", "assistant"]


def test_the_middle_of_a_long_prompt_can_be_left_out(directory):
    opened = open_model(directory)
    text = " ".join(f"w{i % 50}" for i in range(400))
    with pytest.raises(ModelError, match="the prompt has 402 tokens"):
        encode(opened, text, chat=True, new_tokens=10)
    told: list[str] = []
    ids = encode(opened, text, chat=True, new_tokens=11, truncate=True, on_note=told.append)
    said = words(ids, opened.tokenizer)
    assert len(said) == LIMIT - 11
    assert said[:3] == ["user", "w0", "w1"]
    assert said[-3:] == ["w48", "w49", "assistant"]
    assert told == ["157 tokens in the middle of the prompt do not fit the model, left out."]
    with pytest.raises(ModelError, match="the model's limit is 256"):
        encode(opened, text, new_tokens=LIMIT, truncate=True)


def test_an_answer_stops_before_a_text(directory):
    opened = open_model(directory)
    network = load(opened)
    ids = encode(opened, "w1 w2 w3 w4")
    whole = generate(network, opened.tokenizer, ids, EXACT, max_new_tokens=12)
    stop = whole.text.split()[5]
    before = whole.text[: whole.text.index(stop)]
    shown: list[str] = []
    cut = generate(network, opened.tokenizer, ids, EXACT, max_new_tokens=12, stop=["never", stop], on_text=shown.append)
    assert cut.text == before == "".join(shown)
    # The stop itself, and where a token may change the text before it one more.
    assert len(cut.token_ids) <= whole.text.split().index(stop) + 2


def test_rope_scaling_lets_it_read_more(directory):
    opened = open_model(directory, rope_scaling="yarn:4")
    assert opened.limit == 4 * LIMIT
    network = load(opened)
    assert network.config.rope_parameters["rope_type"] == "yarn"
    ids = torch.arange(300)[None] % 60
    plain = load(open_model(directory))
    with torch.no_grad():
        assert not torch.allclose(network(ids).logits, plain(ids).logits, atol=1e-3)
    assert open_model(directory, rope_scaling="linear:2.5").limit == 640


@pytest.mark.parametrize("scaling", ["yarn", "yarn:x", "yarn:1", "yarn:inf", "yarn:nan", "swirl:2", ""])
def test_rope_scaling_that_means_nothing(directory, scaling):
    with pytest.raises(ModelError, match=r"must be a kind and a factor above 1, as yarn:4; the kinds are linear, dyn"):
        open_model(directory, rope_scaling=scaling)


@pytest.fixture
def adapter(directory, tmp_path) -> Path:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(directory)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_an_adapter_is_merged_into_the_weights(directory, adapter):
    from peft import PeftModel

    ids = torch.arange(30)[None]
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), adapter).eval()
    network = load(open_model(directory, adapter=adapter))
    assert type(network) is LlamaForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(network(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network(ids).logits, load(open_model(directory))(ids).logits, atol=1e-2)


def test_adapters_that_cannot_be_merged(directory, adapter, tmp_path):
    with pytest.raises(ModelError, match=r"not the directory of an adapter, it has no adapter_config\.json"):
        open_model(directory, adapter=tmp_path)
    base = AutoModelForCausalLM.from_pretrained(directory)
    prefix = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    prefix.save_pretrained(tmp_path / "prefix")
    with pytest.raises(ModelError, match="adapters of kind 'PREFIX_TUNING' change no weights"):
        load(open_model(directory, adapter=tmp_path / "prefix"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(ModelError, match="cannot read the adapter: "):
        load(open_model(directory, adapter=adapter))


def test_an_adapter_of_another_model(directory, adapter, tmp_path):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", "v_proj", "o_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="cannot read the adapter: Found missing adapter keys"):
        load(open_model(directory, adapter=adapter))


def test_an_adapter_without_the_package(directory, adapter, monkeypatch):
    monkeypatch.setattr(magicpig.adapters, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"the package peft, which is not installed: pip install"):
        open_model(directory, adapter=adapter)


def test_generate_takes_them_all(directory, adapter):
    text = " ".join(f"w{i % 50}" for i in range(600))
    options = ["--system", "w9", "--truncate", "--adapter", adapter, "--rope-scaling", "yarn:2", "--stop", "w3"]
    command = ["generate", "--model", directory, "--prompt", text, "--max-new-tokens", 5, *options, "--json"]
    result = CliRunner().invoke(app, [str(each) for each in command])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["prompt_tokens"] == 2 * LIMIT - 5
    assert found["settings"]["system"] == "w9"
    assert found["settings"]["stop"] == ["w3"]
    assert "w3" not in found["text"]
    assert "tokens in the middle of the prompt do not fit the model" in result.stderr
