import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import magicpig.cli.threads as pinning
from magicpig import doctor, generation, machine
from magicpig.cli import app, main
from magicpig.cli.files import OutputFile
from magicpig.config import Config
from magicpig.config_file import to_text
from magicpig.kernels import library
from magicpig.studies import pocket
from magicpig.studies.bench import layer
from magicpig.studies.bench.shapes import SHAPES
from magicpig.studies.capture import load_capture

WORDS = 62
LIMIT = 20_000
PROMPT = " ".join(f"w{7 * i % 31}" for i in range(300))
LONG = f"{PROMPT} {PROMPT}"  # with two strides of 256 tokens before the recent ones


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, save_tiny_llama) -> Path:
    """A tiny Llama with random weights and a tokenizer of 62 words."""
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", words, max_position_embeddings=LIMIT)


@pytest.fixture
def broken(model_dir, tmp_path) -> Path:
    """A copy of the model, to be spoilt."""
    return shutil.copytree(model_dir, tmp_path / "broken")


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, prog_name="magicpig")


def generate(model, *arguments, prompt=PROMPT, new=5, input=None):
    prompt = ("--prompt", prompt) if prompt is not None else ()
    return run("generate", "--model", model, *prompt, "--max-new-tokens", new, *arguments, input=input)


def assert_refused(result, *causes):
    """One line on stderr that names the cause, exit code 2, nothing else anywhere."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("magicpig: error: ")
    for cause in causes:
        assert str(cause) in line


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["generate"],
        ["doctor"],
        ["demo"],
        ["capture"],
        ["figures"],
        ["bench"],
        ["bench", "attention"],
        ["bench", "decode"],
    ],
    ids=" ".join,
)
def test_every_command_has_help(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: magicpig" in result.stdout


def test_no_command_shows_help():
    assert run().stdout == run("--help").stdout


def test_version():
    assert re.fullmatch(r"magicpig \d+\.\d+\.\d+\n", run("--version").stdout)


def test_a_terminal_that_cannot_show_all_text(monkeypatch):
    monkeypatch.setattr("magicpig.cli.end_in_order", lambda: None)  # pytest has its own ways to end
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", ["magicpig", "--version"])
    with pytest.raises(SystemExit):
        main()
    sys.stdout.write("ü")  # would raise


# --- generate ---------------------------------------------------------------------------------------------------------


def test_text_on_stdout_and_summary_on_stderr(model_dir):
    result = generate(model_dir)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"(w\d+ ?){5}\n", result.stdout)
    assert "300 tokens in" in result.stderr
    assert "none: every key was read" in result.stderr  # short contexts stay exact


def test_the_summary_says_what_was_sampled(model_dir):
    result = generate(model_dir, "--exact-below", 0, "-K", 4, "-L", 20, prompt=LONG)
    assert re.search(r"keys sampled +[\d.]+% on average, at most [\d.]+%", result.stderr)
    assert re.search(r"memory +[\d.]+ MiB of keys and values, [\d.]+ MiB of index", result.stderr)
    assert re.search(r"read per step +[\d.]+ MiB, full attention reads [\d.]+ MiB", result.stderr)


def test_json_is_all_there_is_on_stdout(model_dir):
    result = generate(model_dir, "--json", "--exact-below", 0, "-K", 4, "-L", 20, "--seed", 3, prompt=LONG)
    answer = json.loads(result.stdout)
    assert answer["text"].split() == [f"w{i - 2}" for i in answer["token_ids"]]
    assert (answer["prompt_tokens"], answer["new_tokens"]) == (600, 5)
    assert answer["decode_steps"] == 3
    assert answer["prefill_tokens_per_s"] == pytest.approx(600 / answer["prefill_s"])
    assert 0 < answer["cache"]["sampled_share_mean"] <= answer["cache"]["sampled_share_max"] <= 1
    assert answer["cache"]["read_step_bytes"] < answer["cache"]["full_step_bytes"]
    assert answer["cache"]["index_bytes"] > 0
    assert answer["settings"]["K"] == 4
    assert answer["settings"]["seed"] == 3
    assert answer["settings"]["dtype"] == "float32"
    assert answer["versions"]["torch"] == torch.__version__


def test_a_sketch_keeps_to_its_budget_and_says_how_wrong_it_may_be(model_dir):
    options = ["--exact-below", 0, "--sampler", "sketch", "--budget", 0.1, "--bits", 3]
    answer = json.loads(generate(model_dir, "--json", *options, prompt=LONG).stdout)
    assert (answer["settings"]["sampler"], answer["settings"]["bits"], answer["settings"]["epsilon"]) == (
        "sketch",
        3,
        None,
    )
    assert 0.05 < answer["cache"]["sampled_share_mean"] < 0.15
    assert 0 < answer["cache"]["predicted_error_mean"] <= answer["cache"]["predicted_error_max"]
    assert (answer["cache"]["epsilon"], answer["cache"]["all_read"]) == (None, None)
    output = generate(model_dir, *options, "--epsilon", 0.5, prompt=LONG).output
    assert "predicted error" in output
    assert "at most 50.0% was asked for" in output


def test_keys_and_values_may_be_kept_in_whole_numbers(model_dir):
    answers = {
        kv_dtype: json.loads(
            generate(model_dir, "--json", "--exact-below", 0, "--kv-dtype", kv_dtype, prompt=f"{LONG} {LONG}").stdout
        )
        for kv_dtype in ("model", "int8")
    }
    assert answers["int8"]["settings"]["kv_dtype"] == "int8"
    held = {kv_dtype: answer["cache"]["kv_bytes"] for kv_dtype, answer in answers.items()}
    assert held["int8"] < 0.7 * held["model"]  # which is float32, as the newest rows are


def test_a_sampler_for_comparison_keeps_to_its_budget(model_dir):
    options = ("--exact-below", 0, "--sampler", "topk", "--budget", 0.1)
    answer = json.loads(generate(model_dir, "--json", *options, prompt=LONG).stdout)
    assert (answer["settings"]["sampler"], answer["settings"]["budget"]) == ("topk", 0.1)
    assert answer["cache"]["sampled_share_mean"] == answer["cache"]["sampled_share_max"] == 51 / (512 - 4)
    assert answer["cache"]["index_bytes"] == 0


def test_text_equals_that_of_transformers_alone(model_dir):
    model = LlamaForCausalLM.from_pretrained(model_dir, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 300:].tolist()
    everything = ["--exact-below", 0, "--sampler", "oracle", "--budget", 1000]
    for arguments in ([], ["--sampler", "full"], ["--prefill-chunk", 64], everything):
        assert json.loads(generate(model_dir, "--json", *arguments, new=12).stdout)["token_ids"] == expected


@pytest.mark.parametrize("chunk", [64, 100, 299, 300, 301])
def test_every_prompt_token_is_read_once(chunk, model_dir, monkeypatch):
    seen = []
    inner = generation.generate

    def watched(*arguments, on_prefill, **options):
        def spy(tokens):
            seen.append(tokens)
            on_prefill(tokens)

        return inner(*arguments, on_prefill=spy, **options)

    monkeypatch.setattr(generation, "generate", watched)
    assert generate(model_dir, "--prefill-chunk", chunk).exit_code == 0
    assert sum(seen) == 300
    assert max(seen) <= chunk
    assert min(seen) > chunk // 2 or len(seen) == 1  # no small rest, which would be taken for decoding


def test_sampling_follows_the_seed(model_dir):
    def draw(seed):
        return json.loads(generate(model_dir, "--json", "--temperature", 2, "--seed", seed, new=20).stdout)["token_ids"]

    assert draw(1) == draw(1) != draw(2)


def test_a_nucleus_of_one_is_greedy(model_dir):
    greedy, nucleus = (
        json.loads(generate(model_dir, "--json", *arguments).stdout)["token_ids"]
        for arguments in ([], ["--temperature", 3, "--top-p", 0.0001])
    )
    assert greedy == nucleus


def test_one_new_token(model_dir):
    answer = json.loads(generate(model_dir, "--json", new=1).stdout)
    assert answer["new_tokens"] == 1
    assert answer["first_step_s"] is None
    assert answer["decode_tokens_per_s"] is None


def test_dtype(model_dir):
    assert json.loads(generate(model_dir, "--json", "--dtype", "bfloat16").stdout)["settings"]["dtype"] == "bfloat16"


def test_prompt_from_a_file_and_from_standard_input(model_dir, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    expected = generate(model_dir).stdout
    assert generate(model_dir, "--prompt-file", path, prompt=None).stdout == expected
    assert generate(model_dir, "--prompt-file", "-", prompt=None, input=PROMPT).stdout == expected


def test_chat_uses_the_template(broken):
    (broken / "chat_template.jinja").write_text("w1 {% for message in messages %}{{ message.content }}{% endfor %} w2")
    assert json.loads(generate(broken, "--json", "--chat").stdout)["prompt_tokens"] == 302
    assert json.loads(generate(broken, "--json").stdout)["prompt_tokens"] == 300


def test_output_file_gets_what_is_printed(model_dir, tmp_path):
    text, answer = tmp_path / "answer.txt", tmp_path / "answer.json"
    printed = generate(model_dir, "--output", text).stdout
    assert text.read_text() == printed.removesuffix("\n")
    printed = generate(model_dir, "--json", "--output", answer).stdout
    assert answer.read_text() == printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json", "answer.txt"]


def test_generate_takes_its_settings_from_a_file(model_dir, tmp_path):
    path = tmp_path / "tuned.json"
    own = {"sampler": "sketch", "exact_below": 0, "dense_layers": (), "layers": {1: {"sampler": "lsh", "K": 4}}}
    path.write_text(to_text(Config(**own), {}))
    answer = json.loads(generate(model_dir, "--config", path, "--seed", 3, "--json", prompt=LONG).stdout)
    assert Config(**{name: answer["settings"][name] for name in Config.model_fields}) == Config(**own, seed=3)
    sketched, hashed = answer["cache"]["layers"]
    assert 0 < sketched["index_bytes"] < hashed["index_bytes"]


@pytest.mark.parametrize("option", ["-K", "--exact-below", "--budget"])
def test_generate_takes_settings_from_one_place_only(option, model_dir, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(to_text(Config(), {}))
    assert_refused(
        generate(model_dir, "--config", path, option, 9), f"{option} and --config: the file has all settings"
    )


def test_generate_refuses_a_bad_file_of_settings(model_dir, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(to_text(Config(layers={7: {"bits": 3}}), {}))
    assert_refused(generate(model_dir, "--config", path), "layers.7: the model has layers 0 to 1")
    path.write_text("{}")
    assert_refused(generate(model_dir, "--config", path), path, "not a file of settings")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["-K", "0"], "K=0"),
        (["-K", "17"], "K=17"),
        (["-K", "many"], "'-K'"),
        (["-L", "0"], "L=0"),
        (["-L", "1025"], "L=1025"),
        (["-L", "1"], "min_hits=2 is larger than L=1"),
        (["--min-hits", "0"], "min_hits=0"),
        (["--sinks", "-1"], "sinks=-1"),
        (["--seed", "-1"], "seed=-1"),
        (["--sampler", "top-k"], "top-k"),
        (["--budget", "0"], "budget=0"),
        (["--dtype", "int8"], "int8"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "2"], "--top-p"),
        (["--prefill-chunk", "1"], "--prefill-chunk"),
        (["--frobnicate"], "--frobnicate"),
        (["--prompt-file", "also.txt"], "either --prompt or --prompt-file"),
        (["--chat"], "no chat template"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments, cause, model_dir):
    assert_refused(generate(model_dir, *arguments), cause)


def test_no_prompt(model_dir):
    assert_refused(generate(model_dir, prompt=None), "either --prompt or --prompt-file")


@pytest.mark.parametrize("command", ["generate", "capture", "eval ruler"])
def test_without_a_model_the_pocket_model_is_used_and_said(command, tmp_path):
    arguments = {
        "generate": ["--prompt", "one two three", "--max-new-tokens", 2],
        "capture": ["--task", "fwe", "--length", 1000, "--steps", 2, "--new-tokens", 0, "--out", tmp_path / "out"],
        "eval ruler": ["--tasks", "fwe", "--lengths", 1000, "--samples", 1, "--out", tmp_path / "out"],
    }
    result = run(*command.split(), *arguments[command])
    assert result.exit_code == 0, result.output
    assert "Using the pocket model" in result.stderr
    assert "Using" not in result.stdout


def test_unknown_command():
    assert_refused(run("frobnicate"), "frobnicate")


@pytest.mark.parametrize("prompt", ["", "  \n"], ids=["nothing", "only blanks"])
def test_empty_prompt(prompt, model_dir, tmp_path):
    assert_refused(generate(model_dir, prompt=prompt), "the prompt is empty")
    path = tmp_path / "empty.txt"
    path.write_text(prompt)
    assert_refused(generate(model_dir, "--prompt-file", path, prompt=None), "the prompt is empty")


@pytest.mark.parametrize(
    ("content", "cause"),
    [(None, "No such file"), (b"w1 \xff w2", "not UTF-8 text (byte 3)"), (b"w1 \x00", "binary, not text")],
    ids=["missing", "latin-1", "binary"],
)
def test_unreadable_prompt_file(content, cause, model_dir, tmp_path):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    assert_refused(generate(model_dir, "--prompt-file", path, prompt=None), path, cause)


def test_prompt_file_is_a_directory(model_dir, tmp_path):
    assert_refused(generate(model_dir, "--prompt-file", tmp_path, prompt=None), tmp_path, "directory")


def test_prompt_longer_than_the_model_can_read(model_dir, monkeypatch):
    monkeypatch.setattr(generation, "load", lambda *_, **__: pytest.fail("loaded the weights first"))
    result = generate(model_dir, prompt="w1 " * (LIMIT - 4))
    assert_refused(result, f"the prompt has {LIMIT - 4} tokens and 5", f"limit is {LIMIT}")


def test_prompt_of_just_the_limit_is_read(broken):
    edit_config(broken, max_position_embeddings=305)
    assert generate(broken).exit_code == 0


def test_the_limit_counts_rope_scaling_and_can_be_overruled(broken):
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 200}
    edit_config(broken, max_position_embeddings=200, rope_parameters=scaled)
    assert generate(broken).exit_code == 0
    edit_config(broken, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert_refused(generate(broken), "the model's limit is 200 tokens (max_length overrules it)")
    assert generate(broken, "--max-length", 305).exit_code == 0
    assert_refused(generate(broken, "--max-length", 304), "limit is 304 tokens")


def spoil_nothing(model):
    shutil.rmtree(model)


def spoil_file(model):
    shutil.rmtree(model)
    model.write_text("")


def spoil_no_config(model):
    (model / "config.json").unlink()


def spoil_broken_json(model):
    (model / "config.json").write_text('{"model_type": ')


def spoil_list_json(model):
    (model / "config.json").write_text("[]")


def spoil_wrong_type(model):
    edit_config(model, hidden_size="wide")


def spoil_other_shape(model):
    edit_config(model, hidden_size=32)


def spoil_more_layers(model):
    edit_config(model, num_hidden_layers=3)


def spoil_endless_layers(model):
    edit_config(model, num_hidden_layers=1_000_000_000)


def spoil_deep_json(model):
    (model / "config.json").write_text('{"a":' * 200_000)


def spoil_dangling_link(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../blobs/1")


def spoil_unknown_architecture(model):
    edit_config(model, model_type="frobnicator")


def spoil_not_a_language_model(model):
    edit_config(model, model_type="vit")


def spoil_code(model):
    edit_config(model, model_type="custom", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})


def spoil_no_weights(model):
    (model / "model.safetensors").unlink()


def spoil_only_pickled_weights(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def spoil_garbage_weights(model):
    (model / "model.safetensors").write_bytes(b"garbage " * 10)


def spoil_truncated_weights(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def spoil_no_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()


def spoil_broken_tokenizer(model):
    (model / "tokenizer.json").write_text("{")


def spoil_strange_tokenizer(model):
    (model / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (spoil_nothing, "no such directory"),
        (spoil_file, "not a directory"),
        (spoil_no_config, "no config.json"),
        (spoil_broken_json, "config.json: not JSON: Expecting value"),
        (spoil_list_json, "config.json: not a JSON object"),
        (spoil_wrong_type, "hidden_size"),
        (spoil_other_shape, "the weights have lm_head.weight with shape [64, 64], the configuration asks for [64, 32]"),
        (spoil_more_layers, "weights are missing, the first is model.layers.2."),
        (spoil_endless_layers, "num_hidden_layers=1000000000 is out of range"),
        (spoil_deep_json, "values are nested too deep"),
        (spoil_dangling_link, "where nothing is"),
        (spoil_unknown_architecture, "frobnicator"),
        (spoil_not_a_language_model, "ViTConfig"),
        (spoil_code, "brings Python code of its own"),
        (spoil_no_weights, "no weights"),
        (spoil_only_pickled_weights, "no weights in safetensors format"),
        (spoil_garbage_weights, "header too large"),
        (spoil_truncated_weights, "incomplete metadata"),
        (spoil_no_tokenizer, "no tokenizer"),
        (spoil_broken_tokenizer, "cannot read the tokenizer"),
        (spoil_strange_tokenizer, "cannot read the tokenizer"),
    ],
    ids=lambda value: value.__name__.removeprefix("spoil_") if callable(value) else "",
)
def test_unusable_model_directory(spoil, cause, broken):
    spoil(broken)
    assert_refused(generate(broken), broken, cause)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, None),
    ],
    ids=lambda value: "" if value is None or isinstance(value, str) else next(iter(value)),
)
def test_generation_settings_that_one_answer_cannot_have_are_left_out_with_a_word(settings, note, broken, model_dir):
    expected = generate(model_dir, "--json")
    (broken / "generation_config.json").write_text(json.dumps(settings))
    result = generate(broken, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["token_ids"] == json.loads(expected.stdout)["token_ids"]
    assert note is None or f"generation_config.json asks for {note}, which is left out here." in " ".join(
        result.stderr.split()
    )
    assert note is not None or "generation_config" not in result.stderr


def test_generation_settings_that_can_be_heeded_are(broken, model_dir):
    tokens = generate(model_dir, new=20).stdout.split()
    (broken / "generation_config.json").write_text(json.dumps({"suppress_tokens": [int(tokens[0][1:]) + 2]}))
    assert generate(broken, new=1).stdout.split() != tokens[:1]


def test_stop_strings_are_heeded(tmp_path):
    path = shutil.copytree(pocket.path(), tmp_path / "pocket")
    texts = {}
    for stop in (None, "9"):
        (path / "generation_config.json").write_text(json.dumps({"pad_token_id": 1, "stop_strings": stop and [stop]}))
        prompt = "A special magic number is hidden within the following text."
        texts[stop] = json.loads(generate(path, "--json", prompt=prompt, new=12).stdout)["text"]
    before, stop, after = texts[None].partition("9")
    assert after
    assert texts["9"] == before + stop


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": -3.0}, {"no_repeat_ngram_size": "x"}, {"bad_words_ids": 3}], ids=str
)
def test_generation_settings_that_are_wrong(settings, broken):
    (broken / "generation_config.json").write_text(json.dumps(settings))
    assert_refused(generate(broken), "generation_config.json", next(iter(settings)))


def test_a_chat_template_that_does_not_end(broken, monkeypatch):
    monkeypatch.setattr("magicpig.generation.prompt.TEMPLATE_SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (broken / "chat_template.jinja").write_text(loop)
    assert_refused(generate(broken, "--chat"), broken, "the chat template fails: it was not done after 1 seconds")
    (broken / "chat_template.jinja").write_text("{% for i in range(1000000000) %}{% endfor %}")
    assert_refused(generate(broken, "--chat"), broken, "the chat template fails: Range too big")


@pytest.mark.parametrize("reason", ["std::bad_alloc", ""])
def test_memory_that_is_not_given(reason, model_dir, monkeypatch):
    def fail(*_, **__):
        raise MemoryError(reason)

    monkeypatch.setattr(generation, "load", fail)
    assert_refused(generate(model_dir), f"there is not enough memory: {reason or 'Python asked'}")


def test_tokenizer_of_another_model(broken):
    edit_config(broken, vocab_size=20)
    assert_refused(generate(broken), broken, "the tokenizer makes token 32, but the model knows 20 tokens")


def test_broken_chat_template(broken):
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    assert_refused(generate(broken, "--chat"), broken, "the chat template fails: no such role")


def test_weights_that_are_not_numbers(broken):
    model = LlamaForCausalLM.from_pretrained(broken, local_files_only=True)
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(broken)
    assert_refused(generate(broken), "the model computes values", "not finite")


def test_prompt_of_broken_bytes(model_dir):
    assert_refused(generate(model_dir, prompt="w1 \udcff"), "--prompt is not valid UTF-8")


def test_architecture_without_attention_to_sample(tmp_path, model_dir):
    path = tmp_path / "bloom"
    shutil.copytree(model_dir, path)
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(path)
    assert_refused(generate(path), "'bloom' is not supported")


@pytest.mark.parametrize("where", ["missing/answer.txt", "file/answer.txt", "folder"])
def test_impossible_output_is_refused_before_the_work(where, model_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(generation, "open_model", lambda *_, **__: pytest.fail("read the model first"))
    assert_refused(generate(model_dir, "--output", tmp_path / where), "cannot write", tmp_path / where)


def test_read_only_output_directory(model_dir, tmp_path, monkeypatch):
    # Whoever runs the tests may be root, for whom nothing is read-only.
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert_refused(generate(model_dir, "--output", tmp_path / "answer.txt"), "cannot write", "Read-only file system")


def test_read_only_output_file(model_dir, tmp_path, monkeypatch):
    path = tmp_path / "answer.txt"
    path.write_text("precious")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert_refused(generate(model_dir, "--output", path), "cannot write", "read-only")
    assert path.read_text() == "precious"


def test_device_file_is_no_output(model_dir):
    assert_refused(generate(model_dir, "--output", os.devnull), "not a regular file")


@pytest.mark.parametrize("variable", ["MAGICPIG_ISA", "MAGICPIG_POOL"])
def test_bad_environment(variable):
    done = subprocess.run(
        command("doctor"), env=os.environ | {variable: "bad"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"magicpig: error: {variable}=bad" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("bound", ["available_memory", "cgroup_limit"])
def test_weights_larger_than_memory(bound, model_dir, monkeypatch):
    monkeypatch.setattr(machine, bound, lambda: 1000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert_refused(generate(model_dir), model_dir, "the weights take", "0.0 GiB")


@pytest.mark.parametrize(
    "error",
    [MemoryError("the cache needs 99 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["ours", "torch's"],
)
def test_not_enough_memory(error, model_dir, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(generation, "generate", fail)
    assert_refused(generate(model_dir), str(error))


def test_bugs_keep_their_traceback(model_dir, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(generation, "generate", fail)
    result = generate(model_dir)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_says_ok():
    result = run("doctor")
    assert result.exit_code == 0
    assert library.isa() in result.stdout
    assert re.search(r"^OK +\d+ self-checks", result.stdout, re.MULTILINE)


def test_doctor_as_json():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["healthy"] is True
    assert report["isa"] == library.isa()
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_doctor_reports_wrong_kernels(form, monkeypatch):
    wrong = dataclasses.replace(doctor.self_check(["portable"])[0], error=0.5)
    monkeypatch.setattr(doctor, "self_check", lambda: [wrong])
    result = run("doctor", *form)
    assert result.exit_code == 1
    assert ('"healthy": false' if form else "relative error 5.0e-01") in result.stdout
    assert "OK " not in result.stdout


# --- capture ----------------------------------------------------------------------------------------------------------


def capture(model, tmp_path, *arguments, text=PROMPT):
    (tmp_path / "text").write_text(text)
    return run("capture", "--model", model, "--text", tmp_path / "text", "--out", tmp_path / "out", *arguments)


def test_capture_writes_what_load_capture_reads(model_dir, tmp_path):
    result = capture(model_dir, tmp_path, "--layers", "1", "--kv-heads", "0", "--steps", 3, "--length", 200)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert re.search(r"tokens +200, queries of the last 3", result.stderr)
    captured = load_capture(tmp_path / "out")
    (each,) = captured.layers.values()
    assert list(captured.layers) == [1]
    assert (each.tokens, each.steps, each.heads, each.kv_heads) == (200, 3, 2, 1)
    assert captured.about["model"] == "tiny"
    assert captured.about["tokens_read"] == 200
    assert capture(model_dir, tmp_path, "--layers", "all", "--length", 200).exit_code == 0
    assert list(load_capture(tmp_path / "out").layers) == [0, 1]


def test_capture_of_a_task_has_the_queries_of_the_answer(model_dir, tmp_path):
    result = run(
        "capture", "--model", model_dir, "--out", tmp_path / "out", "--task", "fwe", "--length", 2000, "--steps", 5
    )
    assert result.exit_code == 0, result.output
    captured = load_capture(tmp_path / "out")
    assert captured.about["text"] == {"task": "fwe", "length": 2000, "index": 0, "seed": 0}
    assert captured.about["tokens_read"] == 1950  # 50 are for the answer
    assert {each.tokens for each in captured.layers.values()} == {1954}  # the fifth token is written, but not read


def test_capture_reads_a_text_or_a_task(model_dir, tmp_path):
    assert_refused(run("capture", "--model", model_dir, "--out", tmp_path / "out"), "either --text or --task")
    assert_refused(capture(model_dir, tmp_path, "--task", "fwe"), "either --text or --task")
    refused = run("capture", "--model", model_dir, "--out", tmp_path / "out", "--task", "niah")
    assert_refused(refused, "niah")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--layers", "0,x"], "--layers '0,x' is neither whole numbers with commas nor all"),
        (["--layers", "2"], "layers=2: the model has layers 0 to 1"),
        (["--kv-heads", "5"], "kv_heads=5"),
        (["--steps", "1000"], "steps=1000 must be between 1 and the 300 tokens"),
    ],
)
def test_capture_refuses_what_is_not_there(model_dir, tmp_path, arguments, cause):
    assert_refused(capture(model_dir, tmp_path, *arguments), cause)
    assert not (tmp_path / "out").exists()


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(model, out, *arguments):
    small = (
        "--length",
        1000,
        "--tasks",
        "fwe",
        "--needles",
        "fwe",
        "--samplers",
        "full,lsh",
        "--texts",
        1,
        "--steps",
        2,
    )
    return run("figures", "--model", model, "--out", out, "--dense-layers", "none", "--samples", 1, *small, *arguments)


def test_figures_are_pictures_and_the_numbers_behind_them(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "a commit")
    result = figures(model_dir, tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = ("figure1", "figure2", "figure3", "centring")
    expected = {name + suffix for name in names for suffix in (".png", ".svg", ".jsonl")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {
        "figure1-results.jsonl",
        "centring-results.jsonl",
    }
    for name in names:
        header, *rows = map(json.loads, (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines())
        assert header["figure"] == name
        assert header["model"]["name"] == "tiny"
        assert header["made"]["versions"]["torch"] == torch.__version__
        assert header["made"]["commit"] == "a commit"
        assert "date" not in header["made"]
        assert rows
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert figures(model_dir, tmp_path / "out", "--only", "1,3").exit_code == 0  # accuracies are not measured again
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_figures_of_attention_take_texts_and_all_layers(model_dir, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{7 * i % 31}" for i in range(400)))
    options = ["--only", "2,3", "--text", text, "--all-layers", "--length", 380, "--steps", 2, "--samplers", "topk"]
    result = run("figures", "--model", model_dir, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    header, *rows = map(json.loads, (tmp_path / "out" / "figure3.jsonl").read_text().splitlines())
    assert header["settings"]["texts"] == ["words.txt"]
    assert {(row["task"], row["layer"]) for row in rows} == {("words", 0), ("words", 1)}
    _, *rows = map(json.loads, (tmp_path / "out" / "figure2.jsonl").read_text().splitlines())
    assert all("sink_at" in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--only", "1,4"], "--only '4': there is no such figure"),
        (["--samplers", "full"], "--samplers: there is nothing to compare"),
        (["--samplers", "lhs"], "unknown sampler 'lhs'; did you mean lsh"),
        (["--tasks", "few"], "unknown task 'few'; did you mean"),
        (["--length", "50", "--only", "2"], "length=50 is below the minimum of task fwe"),
        (["--length", "1T", "--only", "1"], "length '1T' is not a number"),
    ],
)
def test_figures_refuse_what_cannot_be_drawn(model_dir, tmp_path, arguments, cause):
    assert_refused(figures(model_dir, tmp_path / "out", *arguments), cause)


def test_figures_need_a_directory_that_can_be_written(model_dir, tmp_path):
    (tmp_path / "out").touch()
    assert_refused(figures(model_dir, tmp_path / "out", "--only", "2"), f"cannot write to {tmp_path / 'out'}")
    assert_refused(figures(model_dir, tmp_path / "a" / "b", "--only", "2"), "No such file or directory")


# --- bench ------------------------------------------------------------------------------------------------------------

SMALL = ["--heads", 4, "--kv-heads", 2, "--head-dim", 32, "--repeats", 1, "--steps", 2, "--dtype", "float32"]


def bench(*arguments):
    return run("bench", "attention", "--context", "500,700", *SMALL, *arguments)


@pytest.fixture
def small_evictor(monkeypatch):
    monkeypatch.setattr(layer, "EVICTION_BYTES", 1 << 16)


@pytest.mark.usefixtures("small_evictor")
def test_bench_writes_a_file_and_shows_a_table(tmp_path):
    path = tmp_path / "bench.json"
    result = bench("--samplers", "lsh:K=4,L=20,sketch", "--budget", 32, "--bits", 3, "--json", path)
    assert result.exit_code == 0, result.output
    assert "B/key" in result.stdout
    written = json.loads(path.read_text())
    chosen = [tuple(each[name] for name in ("context", "K", "L", "budget", "bits")) for each in written["results"]]
    lsh, sketch = (4, 20, None, None), (None, None, 32, 3)
    assert chosen == [(500, *lsh), (500, *sketch), (700, *lsh), (700, *sketch)]
    assert written["dtype"] == "float32"


@pytest.mark.usefixtures("small_evictor")
def test_bench_on_standard_output():
    result = bench("--json", "-")
    assert len(json.loads(result.stdout)["results"]) == 4
    assert "B/key" in result.stderr


@pytest.mark.usefixtures("small_evictor")
def test_bench_sets_threads():
    before = torch.get_num_threads()
    try:
        assert json.loads(bench("--json", "-", "--threads", 1).stdout)["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_bench_does_not_time_wrong_kernels(monkeypatch, tmp_path):
    def wrong(shape):
        raise layer.WrongResultError("self-check failed")

    monkeypatch.setattr(layer, "verify_kernels", wrong)
    result = bench("--json", tmp_path / "bench.json")
    assert result.exit_code == 1
    assert result.stderr == "magicpig: no timing, the results are wrong: self-check failed\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--context", "many"], "length 'many' is not a number of tokens"),
        (["--context", "1,,2"], "--context '1,,2' has an empty name"),
        (["--context", "10"], "context=10 has nothing to sample"),
        (["--context", "1000000000000"], "GiB of memory"),
        (["--samplers", "lsh:K=many"], "K='many' is not a number"),
        (["--samplers", "lsh:K=20"], "K=20"),
        (["--samplers", "sketch:0"], "budget=0"),
        (["--samplers", "lsh,topk"], "--samplers 'topk' cannot be measured here; allowed: lsh, sketch"),
        (["--samplers", "full"], "--samplers 'full' cannot be measured here"),
        (["--samplers", "none"], "unknown sampler 'none'"),
        (["--bits", "5"], "bits=5"),
        (["--budget", "0"], "budget=0"),
        (["--dtype", "auto"], "--dtype auto"),
        (["--heads", "3"], "heads=3 is not a multiple of kv_heads=2"),
        (["--head-dim", "1000"], "head_dim=1000 is out of range"),
        (["--json", "/missing/bench.json"], "cannot write /missing/bench.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_bench_options(arguments, cause):
    assert_refused(bench(*arguments), cause)


def bench_decode(*arguments):
    sizes = ["--shape", "qwen3-0.6b", "--layers", 1, "--context", "600", "--steps", 1, "--repeats", 1]
    return run("bench", "decode", *sizes, *arguments)


@pytest.fixture
def small_words(monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "qwen3-0.6b", SHAPES["qwen3-0.6b"] | sizes | {"num_key_value_heads": 2})


@pytest.mark.usefixtures("small_words")
def test_bench_decode_writes_a_file_and_shows_a_table(tmp_path):
    path = tmp_path / "decode.json"
    result = bench_decode("--samplers", "full,sketch", "--budget", 16, "--dense-layers", "none", "--json", path)
    assert result.exit_code == 0, result.output
    assert "us/layer" in result.stdout
    written = json.loads(path.read_text())
    assert [each["name"] for each in written["results"]] == ["full", "sketch"]
    assert written["results"][1]["config"]["budget"] == 16
    assert written["results"][1]["sampled_share"] == pytest.approx(16 / 508, rel=0.1)
    assert written["sizes"]["num_hidden_layers"] == 1


@pytest.mark.usefixtures("small_words")
def test_bench_decode_on_standard_output():
    result = bench_decode("--json", "-", "--dtype", "float32")
    assert len(json.loads(result.stdout)["results"]) == 3
    assert "us/layer" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--shape", "gpt"], "shape='gpt' is not known"),
        (["--layers", "29"], "layers=29 is out of range; qwen3-0.6b has 28"),
        (["--layers", "0"], "'--layers'"),
        (["--context", "10"], "context=10 has nothing to sample"),
        (["--context", "4096M"], "GiB of memory"),
        (["--samplers", "topk"], "--samplers 'topk' cannot be measured here; allowed: full, lsh, sketch"),
        (["--dense-layers", "first"], "--dense-layers 'first'"),
        (["--bits", "5"], "bits=5"),
        (["--dtype", "auto"], "--dtype auto"),
        (["--json", "/missing/bench.json"], "cannot write /missing/bench.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_bench_decode_options(arguments, cause):
    assert_refused(bench_decode(*arguments), cause)


CAPTURE = Path(__file__).parent / "data/captures/random.safetensors"


def bench_frontier(*arguments):
    sizes = ["--heads", 2, "--kv-heads", 1, "--head-dim", 32, "--contexts", "300", "--steps", 1, "--repeats", 1]
    return run("bench", "frontier", *sizes, "--samplers", "sketch:32,block=16,topk:32,block=16", *arguments)


@pytest.mark.usefixtures("small_evictor")
def test_bench_frontier_writes_numbers_and_pictures_and_shows_tables(tmp_path):
    result = bench_frontier("--set", CAPTURE, "--json", tmp_path / "a.json", "--figure", tmp_path / "b.png")
    assert result.exit_code == 0, result.output
    assert "synthetic, 300" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.png", "b.svg"]
    rows = json.loads((tmp_path / "a.json").read_text())["results"]
    layers = list(load_capture(CAPTURE).layers)
    assert [(row["name"], row["layer"]) for row in rows] == [
        (name, layer) for layer in [*layers, None] for name in ("sketch:32,block=16", "topk:32,block=16")
    ]


@pytest.mark.usefixtures("small_evictor")
def test_bench_frontier_on_standard_output():
    result = bench_frontier("--json", "-", "--dtype", "float32")
    assert len(json.loads(result.stdout)["results"]) == 2
    assert "B/key" in result.stderr


@pytest.mark.usefixtures("small_evictor")
def test_bench_frontier_leaves_nothing_behind_when_it_fails(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("magicpig.studies.bench.frontier.measure", interrupt)
    result = bench_frontier("--json", tmp_path / "a.json", "--figure", tmp_path / "b")
    assert result.exit_code != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--contexts", "many"], "length 'many' is not a number of tokens"),
        (["--contexts", "none"], "--contexts none leaves nothing to measure; give --set"),
        (["--contexts", "60"], "context=60 has nothing to sample"),
        (["--contexts", "4096M"], "GiB of memory"),
        (["--contexts", "90"], "nothing to measure"),
        (["--set", "/missing.safetensors"], "cannot read /missing.safetensors"),
        (["--samplers", "full"], "--samplers full has no error to compare"),
        (["--samplers", "lhs"], "unknown sampler 'lhs'"),
        (["--dtype", "auto"], "--dtype auto"),
        (["--heads", "3", "--kv-heads", "2"], "heads=3 is not a multiple of kv_heads=2"),
        (["--json", "/missing/a.json"], "cannot write /missing/a.json"),
        (["--figure", "/missing/a"], "cannot write /missing/a.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("small_evictor")
def test_bad_bench_frontier_options(arguments, cause):
    assert_refused(bench_frontier(*arguments), cause)


def bench_certificates(*arguments):
    sizes = ["--heads", 2, "--kv-heads", 1, "--head-dim", 32, "--contexts", "300", "--steps", 2, "--seeds", 2]
    return run(
        "bench",
        "certificates",
        *sizes,
        "--samplers",
        "sketch:32,block=16,sketch:16,block=16,epsilon=0.3,topk:32,block=16",
        *arguments,
    )


@pytest.mark.usefixtures("small_evictor")
def test_bench_certificates_writes_numbers_and_shows_tables(tmp_path):
    result = bench_certificates("--set", CAPTURE, "--json", tmp_path / "a.json", "--figure", tmp_path / "heads.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "heads.svg").exists()
    assert "synthetic, 300, 8 heads and steps" in result.stdout
    assert "holds" in result.stdout
    rows = json.loads((tmp_path / "a.json").read_text())["results"]
    names = ["sketch:32,block=16", "sketch:16,block=16,epsilon=0.3", "topk:32,block=16"]
    assert [(row["name"], row["source"].startswith("synthetic")) for row in rows] == [
        (name, synthetic) for synthetic in (False, True) for name in names
    ]


@pytest.mark.usefixtures("small_evictor")
def test_bench_certificates_on_standard_output():
    result = bench_certificates("--json", "-")
    assert len(json.loads(result.stdout)["results"]) == 3
    assert "holds" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--contexts", "none"], "--contexts none leaves nothing to measure; give --set"),
        (["--contexts", "60"], "context=60 has nothing to sample"),
        (["--contexts", "80"], "nothing to measure"),
        (["--set", "/missing.safetensors"], "cannot read /missing.safetensors"),
        (["--samplers", "full"], "--samplers 'full' cannot be measured here"),
        (["--heads", "3", "--kv-heads", "2"], "heads=3 is not a multiple of kv_heads=2"),
        (["--json", "/missing/a.json"], "cannot write /missing/a.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("small_evictor")
def test_bad_bench_certificates_options(arguments, cause):
    assert_refused(bench_certificates(*arguments), cause)


PRINT_BINDINGS = """
import sys
from magicpig.cli.threads import pin_threads
pin_threads()
import torch
torch.ones(1 << 20).sin()
from pathlib import Path
from magicpig.machine import usable_cpus
print(usable_cpus())
for status in Path("/proc/self/task").glob("*/status"):
    print(*[line.split()[1] for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list")])
"""


def cpus_of_threads(**variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | variables
    done = subprocess.run(
        [sys.executable, "-c", PRINT_BINDINGS], env=environment, capture_output=True, text=True, check=True
    )
    usable, *cpus = done.stdout.split()
    assert int(usable) == machine.usable_cpus()
    return cpus


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_bench_pins_each_thread_to_a_core():
    if machine.usable_cpus() < 2:
        pytest.skip("one processor: every thread is pinned to it")
    pinned = cpus_of_threads(OMP_NUM_THREADS="2")
    assert len(set(pinned)) == 2
    assert len(set(cpus_of_threads(OMP_NUM_THREADS="2", OMP_PROC_BIND="false"))) == 1


@pytest.mark.parametrize(("quota", "expected"), [(None, None), (1.5, "2")])
def test_threads_follow_the_quota_of_the_container(quota, expected, monkeypatch):
    monkeypatch.setattr(pinning, "cpu_quota", lambda: quota)
    monkeypatch.setattr(pinning, "default_threads", lambda: 2)
    monkeypatch.delitem(sys.modules, "torch")  # else it is too late
    monkeypatch.setenv("MAGICPIG_THREADS", "7")  # what the user has set stays
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    pinning.follow_cpu_quota()
    assert os.environ.get("OMP_NUM_THREADS") == expected
    assert os.environ["MAGICPIG_THREADS"] == "7"


def test_only_measurements_pin(monkeypatch):
    monkeypatch.setattr("magicpig.cli.end_in_order", lambda: None)  # pytest has its own ways to end
    pinned = []
    monkeypatch.setattr("magicpig.cli.pin_threads", lambda: pinned.append(sys.argv))
    for arguments in (["--version"], ["tune", "--help"], ["bench", "attention", "--help"]):
        monkeypatch.setattr(sys, "argv", ["magicpig", *arguments])
        with pytest.raises(SystemExit):
            main()
    assert len(pinned) == 2


def test_too_late_to_pin(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    pinning.pin_threads()  # torch has been imported by this file
    assert os.environ == {}


# --- output files -----------------------------------------------------------------------------------------------------


def test_a_failed_run_leaves_the_old_file(tmp_path):
    path = tmp_path / "answer"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), OutputFile(path):
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with OutputFile(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_full_disk_is_reported(tmp_path, model_dir, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    result = generate(model_dir, "--output", tmp_path / "answer")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- interruption -----------------------------------------------------------------------------------------------------


def command(*arguments):
    return [sys.executable, "-m", "magicpig", *map(str, arguments)]


def test_ctrl_c_keeps_the_text_and_says_so(model_dir):
    arguments = ("--model", model_dir, "--prompt", "w1 w2", "--max-new-tokens", LIMIT - 2)
    with subprocess.Popen(
        command("generate", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        first = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first.startswith("w")
    assert stdout.endswith("\n")
    assert stderr.splitlines()[0] == "magicpig: interrupted"
    assert "Traceback" not in stderr


def test_an_interrupted_training_says_how_it_goes_on(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("magicpig.studies.pocket.train.train", interrupt)
    result = run("pocket", "train", "--out", tmp_path)
    assert result.exit_code == 130
    said = " ".join(result.stderr.split())
    assert said.startswith("The same command goes on from the last checkpoint in ")
    assert said.endswith("magicpig: interrupted")


def test_a_closed_pipe_is_no_error(model_dir):
    arguments = ("--model", model_dir, "--prompt", "w1 w2", "--max-new-tokens", 2000)
    with subprocess.Popen(
        command("generate", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
