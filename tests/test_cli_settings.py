"""Options, environment variables and files give the same settings, and each is described once, in `Config`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from magicpig.cli import app as magicpig
from magicpig.cli.commands import Command
from magicpig.cli.errors import OneLineErrors
from magicpig.cli.settings import IN_FILES_ONLY, takes_config, takes_settings
from magicpig.config import Config
from magicpig.config_file import to_text

# A value that is not the default, as it is typed and as it is meant.
VALUES: dict[str, tuple[str, Any]] = {
    "sampler": ("topk", "topk"),
    "budget": ("0.5", 0.5),
    "candidates": ("2000", 2000.0),
    "bits": ("3", 3),
    "epsilon": ("0.1", 0.1),
    "centre": ("false", False),
    "kv_dtype": ("int8", "int8"),
    "K": ("9", 9),
    "L": ("120", 120),
    "min_hits": ("3", 3),
    "seed": ("7", 7),
    "sinks": ("5", 5),
    "recent": ("32", 32),
    "block": ("64", 64),
    "exact_below": ("0", 0),
    "dense_layers": ("0,5", (0, 5)),
}


@pytest.fixture
def app() -> typer.Typer:
    """Two commands that print the settings they get."""
    app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

    @takes_config
    def ask(context: typer.Context, *, first: int = 1, config: Config, last: int = 2) -> None:
        print(config.model_dump_json())

    @takes_settings("budget", "dense_layers", "exact_below", exact_below=0)
    def study(*, settings: dict[str, Any]) -> None:
        print(json.dumps(settings))

    for command in (ask, study):
        app.command(cls=Command)(command)
    return app


def run(app: typer.Typer, *arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, arguments, env=environment, prog_name="magicpig")


def asked(app: typer.Typer, *arguments: str, **environment: str) -> Config:
    result = run(app, "ask", *arguments, **environment)
    assert result.exit_code == 0, result.output
    return Config(**json.loads(result.stdout))


def test_every_setting_has_a_value_here():
    assert set(VALUES) == set(Config.model_fields) - set(IN_FILES_ONLY)


@pytest.mark.parametrize("name", VALUES)
def test_flags_and_variables_set_what_is_called_like_them(name, app):
    typed, value = VALUES[name]
    flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
    arguments = ["--no-centre"] if name == "centre" else [flag, typed]
    expected = Config(**{name: value})
    assert expected != Config()
    assert asked(app, *arguments) == expected
    assert asked(app, **{f"MAGICPIG_{name.upper()}": typed}) == expected
    assert asked(app, **{f"MAGICPIG_ASK_{name.upper()}": typed}) == expected


def test_what_is_typed_comes_first_then_what_is_meant_for_the_command(app):
    variables = {"MAGICPIG_BUDGET": "8", "MAGICPIG_ASK_BUDGET": "16"}
    assert asked(app, "--budget", "32", **variables).budget == 32
    assert asked(app, **variables).budget == 16


def test_a_sampler_brings_its_settings(app):
    assert asked(app, "--sampler", "lsh:K=9,L=120", "--sinks", "2") == Config(sampler="lsh", K=9, L=120, sinks=2)
    assert asked(app, MAGICPIG_SAMPLER="sketch:0.1,bits=3") == Config(budget=0.1, bits=3)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["-K", "17"], {}, "K=17: Input should be less than or equal to 16"),
        ([], {"MAGICPIG_K": "17"}, "K=17: Input should be less than or equal to 16"),
        (["-K", "many"], {}, "'-K'"),
        (["--sampler", "lsh:K=9", "-K", "8"], {}, "K=8 and sampler='lsh:K=9': give it once"),
        (["--sampler", "lhs"], {}, "sampler='lhs'"),
        (["--dense-layers", "first"], {}, "--dense-layers 'first' is neither whole numbers with commas nor none"),
        (["--config", "{file}", "-K", "9"], {}, "-K and --config: the file has all settings"),
        (["--config", "{file}"], {"MAGICPIG_K": "9"}, "MAGICPIG_K and --config: the file has all settings"),
        (["--config", "{file}"], {"MAGICPIG_ASK_K": "9"}, "MAGICPIG_ASK_K and --config: the file has all settings"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, variables, message, app, tmp_path):
    (tmp_path / "a.json").write_text(to_text(Config(), {}))
    result = run(app, "ask", *[each.format(file=tmp_path / "a.json") for each in arguments], **variables)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_has_all_settings_but_the_seed(app, tmp_path):
    config = Config(sampler="topk", layers={3: {"bits": 2}})
    (tmp_path / "a.json").write_text(to_text(config, {}))
    assert asked(app, "--config", str(tmp_path / "a.json")) == config
    assert asked(app, "--config", str(tmp_path / "a.json"), "--seed", "3") == config.model_copy(update={"seed": 3})


def test_studies_take_what_they_ask_for_from_their_command_line_alone(app):
    result = run(app, "study", "--dense-layers", "none", MAGICPIG_BUDGET="3", MAGICPIG_STUDY_BUDGET="4")
    assert json.loads(result.stdout) == {"budget": 512.0, "dense_layers": [], "exact_below": 0}
    assert run(app, "study", "--sinks", "3").exit_code == 2


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_help_describes_every_setting_as_config_does(command):
    described = {param.name: param.help for param in get_command(magicpig).commands[command].params if param.opts}
    for name in VALUES:
        assert described[name] == Config.model_fields[name].description
        assert described[name].endswith(".")


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["generate", "--prompt", "x", "--placement", "host"], {}, "placement=host needs a GPU"),
        (["generate", "--prompt", "x"], {"MAGICPIG_PLACEMENT": "gpu"}, "placement=gpu needs a GPU"),
        (["generate", "--prompt", "x", "--device", "tpu"], {}, "device='tpu' is not a device"),
        (["chat", "--device", "cuda", "--placement", "cpu"], {}, "placement=cpu leaves device=cuda nothing to do"),
        (["serve"], {"MAGICPIG_SERVE_DEVICE": "cuda:x"}, "device='cuda:x' is not a device"),
        (["generate", "--prompt", "x", "--mode", "lossless", "--device", "cuda"], {}, "--mode lossless is exact"),
    ],
)
def test_a_device_and_its_placement_are_checked_from_wherever_they_come(words, environment, said, monkeypatch):
    monkeypatch.setattr("magicpig.cli.options.check_directory", lambda _: pytest.fail("looked for a model first"))
    result = CliRunner().invoke(magicpig, words, env=environment)
    assert result.exit_code == 2
    assert said in result.output


def test_a_file_of_settings_has_the_placement_too(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("placement: gpu_index\n")
    result = CliRunner().invoke(magicpig, ["serve", "--settings", str(file)])
    assert result.exit_code == 2
    assert "placement=gpu_index needs a GPU" in result.output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TimeoutError("no replica came up in 60 s"), "error: no replica came up in 60 s"),
        (ConnectionError(), "error: ConnectionError"),
        (OSError(28, "No space left on device"), "error: cannot use standard output or standard error: No space left"),
    ],
)
def test_a_librarys_own_words_are_not_taken_for_a_broken_output(error, line):
    app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    @app.command()
    def other() -> None:
        pass

    result = run(app, "fail")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"magicpig: {line}")
