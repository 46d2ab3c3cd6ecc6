"""Options that several commands have: from the fields of `Config`, and of how a model is opened.

Each setting of `Config` is described there, with its range and its default.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from magicpig.cli.errors import InputError
from magicpig.cli.options import (
    Adapter,
    KeptWeights,
    RopeScaling,
    TrustRemoteCode,
    Weights,
    checked,
    whole_numbers,
)
from magicpig.config import SAMPLERS, Config
from magicpig.config_file import load_config
from magicpig.where import Where, check_where

PANEL = "Sampling of keys"
WHERE_PANEL = "Device"
IN_FILES_ONLY = ("layers",)
"""Settings that are no single value, so that only files have them."""


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `config` becomes an option for each setting, and --config for a file of them.

    The command needs a parameter `context`. Each setting is also taken from the environment: MAGICPIG_SERVE_BUDGET for
    the command serve alone, MAGICPIG_BUDGET for all that take a config. What is typed comes first.
    """
    file = typer.Option("--config", help="A file of settings: magicpig tune writes one.", rich_help_panel=PANEL)
    names = [name for name in Config.model_fields if name not in IN_FILES_ONLY]
    options = [
        _parameter("config_file", Annotated[Path | None, file], None),
        *(_option(name, variables=(f"{command.__name__}_{name}", name)) for name in names),
    ]

    def config(given: dict[str, Any], own: dict[str, Any]) -> Config:
        path = own.pop("config_file")
        return config_from(given["context"], path, **own)

    return _with_options(command, "config", options, config)


def takes_settings(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter `settings`, a dictionary, becomes an option for each of these settings of `Config`.

    defaults: of this command, where they are not those of `Config`. The environment does not matter here: what a study
    measures is in its command line.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [_option(name, default=defaults.get(name)) for name in names]
        return _with_options(command, "settings", options, lambda _, own: own)

    return decorate


def takes_opening(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `opening` becomes the options of how a model is opened, those of `open_model`."""
    options = [
        _parameter("weights", KeptWeights, Weights.auto),
        _parameter("adapter", Adapter, None),
        _parameter("rope_scaling", RopeScaling, None),
        _parameter("trust_remote_code", TrustRemoteCode, False),
    ]

    def opening(_: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        return own | {"weights": own["weights"].value}

    return _with_options(command, "opening", options, opening)


def takes_where(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `where` becomes --device and --placement, which are also taken from the environment.

    Refuses what does not go together; whether there is such a device is for `options.check_device`, which needs torch.
    """
    options = [
        _option(name, fields=Where.model_fields, panel=WHERE_PANEL, variables=(f"{command.__name__}_{name}", name))
        for name in Where.model_fields
    ]

    def where(_: dict[str, Any], own: dict[str, Any]) -> Where:
        checked(check_where, **own)
        return Where(**own)

    return _with_options(command, "where", options, where)


def config_from(context: typer.Context, file: Path | None, **settings: Any) -> Config:
    """The config of a file, or of the options called like its settings. Raises InputError if there are both.

    `seed` alone may be given beside a file.
    """
    given = {name: source for name in settings if (source := _source(context, name))}
    if file is None:
        return checked(Config, **{name: settings[name] for name in given})
    if others := [name for name in given if name != "seed"]:
        raise InputError(f"{given[others[0]]} and --config: the file has all settings; change it, or leave it out")
    return load_config(file).model_copy(update={name: settings[name] for name in given})


def parse_layers(value: Any) -> tuple[int, ...]:
    """Indices of layers, as "0,16" or "none" says them, or a list of a file. Raises InputError."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return () if value == "none" else whole_numbers(str(value), "--dense-layers", " nor none")


def _option(
    name: str,
    *,
    default: Any = None,
    variables: Iterable[str] = (),
    fields: Mapping[str, FieldInfo] = Config.model_fields,
    panel: str = PANEL,
) -> inspect.Parameter:
    field = fields[name]
    default = field.default if default is None else default
    info = typer.Option(
        *_flags(name, field),
        help=field.description,
        show_default=default not in (None, ()),
        envvar=[f"MAGICPIG_{variable.upper()}" for variable in variables] or None,
        show_envvar=False,
        rich_help_panel=panel,
        **_SPECIAL.get(name, {}),
    )
    annotation = str if name == "sampler" else field.annotation
    if name == "dense_layers":
        annotation = Any
    return _parameter(name, Annotated[annotation, info], default)


def _flags(name: str, field: FieldInfo) -> list[str]:
    flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
    return [f"{flag}/--no-{name}" if field.annotation is bool else flag]


_SPECIAL: dict[str, dict[str, Any]] = {
    "sampler": {"metavar": "<sampler>", "autocompletion": lambda: list(SAMPLERS)},
    "dense_layers": {"metavar": "<layers>", "parser": parse_layers},
}


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_options(
    command: Callable[..., None],
    name: str,
    options: list[inspect.Parameter],
    make: Callable[[dict[str, Any], dict[str, Any]], Any],
) -> Callable[..., None]:
    """The command with ``options`` in place of the parameter ``name``, which gets what ``make`` makes of them."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        own = {option.name: given.pop(option.name) for option in options}
        command(**given, **{name: make(given, own)})

    parameters: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        parameters += options if each.name == name else [each.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _source(context: typer.Context, name: str) -> str | None:
    """How a message calls the place that a value was given in; None where it is the default."""
    source = context.get_parameter_source(name)
    if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP"):
        return None
    parameter = next(each for each in context.command.params if each.name == name)
    if source.name == "ENVIRONMENT":
        return next((each for each in parameter.envvar or () if each in os.environ), parameter.opts[0])
    return str(parameter.opts[0])
