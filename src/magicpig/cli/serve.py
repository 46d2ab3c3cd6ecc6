"""`magicpig serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from magicpig.cli.errors import InputError
from magicpig.cli.files import read_text
from magicpig.cli.options import (
    MOST_TOKENS,
    Dtype,
    ModelDtype,
    check_device,
    checked,
    or_pocket,
)
from magicpig.cli.settings import takes_config, takes_opening, takes_where
from magicpig.config import Config
from magicpig.where import Where
from magicpig.wording import printable

KEYS_VARIABLE = "MAGICPIG_API_KEYS"
MOST_REQUESTS = 100_000
MOST_REPLICAS = 1000

MODEL = "Model"
NETWORK = "Network"
ACCESS = "Access"
LOAD = "Load"


def _take_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Options that a YAML file names are as if they were typed, unless they are."""
    if path is None:
        return None
    import yaml

    try:
        settings = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {printable(str(error), 200)}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: must be options by name, as in 'port: 8080'")
    names = {str(name).replace("-", "_"): value for name, value in settings.items()}
    known = {str(parameter.name) for parameter in context.command.params} - {"settings"}
    if unknown := sorted(set(names) - known):
        raise InputError(f"{path}: {unknown[0]}: there is no such option")
    context.default_map = {**(context.default_map or {}), **names}
    return path


@takes_config
@takes_where
@takes_opening
def serve(
    context: typer.Context,
    *,
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory of a transformers model.", show_default="the pocket model"),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(help="A YAML file of these options, by their names.", callback=_take_settings, is_eager=True),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients call the model; may be given again.",
            show_default="the directory's name",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: ModelDtype = Dtype.auto,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A Jinja file, in place of the tokenizer's own template.", rich_help_panel=MODEL),
    ] = None,
    opening: dict[str, Any],
    where: Where,
    config: Config,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=NETWORK)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=NETWORK)
    ] = 8000,
    uds: Annotated[
        Path | None, typer.Option(help="Listen on this Unix socket instead.", rich_help_panel=NETWORK)
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for HTTPS.", rich_help_panel=NETWORK)] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its private key.", rich_help_panel=NETWORK)] = None,
    root_path: Annotated[
        str, typer.Option(help="The path under which a proxy shows this server.", rich_help_panel=NETWORK)
    ] = "",
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"API keys, one a line; or in the environment variable {KEYS_VARIABLE}, with commas between them.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A page that may ask from a browser; * for all; may be given again.", rich_help_panel=ACCESS),
    ] = None,
    max_body: Annotated[
        float, typer.Option(min=0.001, help="The largest request, in MiB.", rich_help_panel=ACCESS)
    ] = 32.0,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="For keys, values and indexes of all requests, in GiB.",
            show_default="0.8 of what is free",
            rich_help_panel=LOAD,
        ),
    ] = None,
    cache_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Of this memory, what prompts that were read keep while nobody needs it, for others that begin alike.",
            rich_help_panel=LOAD,
        ),
    ] = 0.5,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="A folder that keeps these prompts when the server ends; magicpig cache shows it.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    cache_limit: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="For its files, in GiB.", show_default="half of what is free there", rich_help_panel=LOAD
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="The most tokens of prompt and answer.",
            show_default="the model's",
            rich_help_panel=LOAD,
        ),
    ] = None,
    token_budget: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Tokens of one step: less answers faster, more reads faster.",
            rich_help_panel=LOAD,
        ),
    ] = 512,
    max_running: Annotated[
        int, typer.Option(min=1, max=MOST_REQUESTS, help="Answers at once.", rich_help_panel=LOAD)
    ] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_REQUESTS, help="Requests that may wait; others get status 429.", rich_help_panel=LOAD
        ),
    ] = 256,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for a request.", rich_help_panel=LOAD)
    ] = None,
    queue_timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds that a request may wait.", rich_help_panel=LOAD)
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for requests to finish at the end.", rich_help_panel=LOAD)
    ] = 30.0,
    replicas: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_REPLICAS,
            help="Servers that share the load, each with the whole model; more than one run on Ray.",
            rich_help_panel=LOAD,
        ),
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_REPLICAS,
            help="As many, while they are busy.",
            show_default="--replicas",
            rich_help_panel=LOAD,
        ),
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
) -> None:
    """Serve a model with OpenAI's interface: /v1/chat/completions, /v1/completions, /v1/models, and /docs for the rest.

    Every option can also be set in the environment, as MAGICPIG_SERVE_PORT=8080, or in the file of --settings. The
    settings of sampling hold for requests that do not bring their own.
    """
    given = {
        "max-body": max_body,
        "memory": memory,
        "cache-limit": cache_limit,
        "timeout": timeout,
        "queue-timeout": queue_timeout,
        "drain": drain,
    }
    for option, value in given.items():
        if value is not None and not math.isfinite(value):
            raise InputError(f"--{option} {value} must be a finite number")
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise InputError("--ssl-certfile and --ssl-keyfile go together")
    many = replicas if max_replicas is None else max_replicas
    if many < replicas:
        raise InputError(f"--max-replicas {max_replicas} must be at least --replicas, {replicas}")
    if many > 1 and (uds is not None or port == 0):
        raise InputError("--replicas listen on a --port of their own, on no Unix socket")
    keys = _api_keys(api_key_file)
    check_device(where)
    folder = or_pocket(model)
    names = tuple(name or [folder.resolve().name if model is not None else "pocket"])
    try:
        from magicpig.server.app import ServerOptions, create_app
        from magicpig.server.metrics import Metrics
        from magicpig.server.middleware import JsonLines
        from magicpig.server.model import ModelOptions, open_engine, open_network
        from magicpig.server.run import Server
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'magicpig[serve]'") from None
    from magicpig.engine.engine import Engine
    from magicpig.engine.options import EngineOptions
    from magicpig.engine.ranks import Group, follow

    _log_to_stderr(JsonLines() if log_json else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    options = checked(
        EngineOptions,
        memory=None if memory is None else int(memory * 2**30),
        cache_share=cache_share,
        cache_dir=cache_dir,
        cache_limit=None if cache_limit is None else int(cache_limit * 2**30),
        max_length=max_length,
        token_budget=token_budget,
        running=max_running,
        waiting=max_waiting,
        timeout=timeout,
        queue_timeout=queue_timeout,
        **where.model_dump(),
    )
    group = Group.of_environment()
    if group is not None and where.device != "cpu":
        raise InputError(f"--device {where.device}: {group.size} ranks choose theirs themselves; leave it out")
    if group is not None and cache_dir is not None:
        raise InputError(f"--cache-dir {cache_dir}: {group.size} ranks cannot keep prompts in files")
    model_options = ModelOptions(
        folder,
        dtype.value,
        None if chat_template is None else read_text(chat_template),
        opening,
    )
    if not keys and uds is None and not _is_loopback(host):
        logging.getLogger("magicpig.server").warning("%s is open to others, and no API key is needed", host)
    server_options = ServerOptions(names, keys, tuple(cors_origin or ()), int(max_body * 2**20), root_path)
    if many > 1:
        _run_on_ray(
            partial(open_engine, model_options, config),
            options,
            server_options,
            group,
            low=replicas,
            high=many,
            drain=drain,
            host=host,
            port=port,
            ssl_certfile=None if ssl_certfile is None else str(ssl_certfile),
            ssl_keyfile=None if ssl_keyfile is None else str(ssl_keyfile),
        )
        return
    with Console(stderr=True).status("Loading the model"):
        network, tokenizer = open_network(model_options, 1 if group is None else group.size, where.device)
        if group is not None and group.rank > 0:
            follow(group, network, config, max_length=options.longest(network))
            return
        metrics = Metrics()
        engine = checked(Engine, network, tokenizer, config, options, observer=metrics, group=group)
    app = create_app(engine, server_options, metrics)
    network_options: dict[str, Any] = {"host": host, "port": port, "ws": "none", "root_path": root_path}
    if uds is not None:
        network_options["uds"] = str(uds)
    if ssl_certfile is not None:
        network_options |= {"ssl_certfile": str(ssl_certfile), "ssl_keyfile": str(ssl_keyfile)}
    engine.start()
    try:
        Server(app, engine, drain=drain, ends_with_engine=group is not None, **network_options).run()
    finally:
        engine.close()
    if group is not None and engine.failure is not None:
        raise engine.failure


def _run_on_ray(make: Any, engine: Any, server: Any, group: Any, **options: Any) -> None:
    if group is not None:
        raise InputError("--replicas: torchrun has started ranks; a replica is one process")
    try:
        from magicpig.server import ray
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'magicpig[ray]'") from None
    ray.run(make, engine, server, ray.ReplicaOptions(**options))


def _api_keys(path: Path | None) -> tuple[str, ...]:
    """From the file and the environment. Raises InputError if the file has none."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if path is not None:
        lines = [line.strip() for line in read_text(path).splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise InputError(f"{path}: has no API key")
        keys += lines
    return tuple(key for key in keys if key)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_to_stderr(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    for name in ("magicpig", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
