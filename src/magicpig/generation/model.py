"""A local model directory or GGUF file, opened and loaded. Everything that can be wrong with it is a `ModelError`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from transformers.distributed.configuration_utils import DistributedConfig

from magicpig import adapters, gguf, machine
from magicpig.config import Config
from magicpig.errors import ArgumentError, InsufficientMemoryError
from magicpig.integrations.transformers.shapes import layer_shapes, scale_positions, token_limit
from magicpig.model_dir import ModelError, brings_code, check_directory, gguf_file
from magicpig.placement.choice import open_device
from magicpig.placement.device import Device
from magicpig.weights import FORMS, use_weights
from magicpig.wording import one_line, shown

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """A local model directory, looked into: everything but the weights. Settings are those of `open_model`."""

    directory: Path
    config: Any
    tokenizer: Any
    trust_remote_code: bool
    max_length: int | None = None
    adapter: Path | None = None
    rope_scaling: str | None = None
    weights: str = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        """What `open_model` was given beside the directory."""
        names = ("trust_remote_code", "max_length", "adapter", "rope_scaling", "weights")
        return {name: getattr(self, name) for name in names}

    @property
    def limit(self) -> int | None:
        """The most tokens, prompt and answer together, that the model takes; None if it does not say.

        What it was made for, rope scaling included, unless ``max_length`` says otherwise.
        """
        return token_limit(self.config) if self.max_length is None else self.max_length


def open_model(
    path: Path | str,
    *,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    adapter: Path | str | None = None,
    rope_scaling: str | None = None,
    weights: str = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Model:
    """Read configuration and tokenizer of a local model; nothing is ever downloaded. `load` makes the network of it.

    path: a directory, a GGUF file, or a directory that holds one. A file is converted once (`gguf.converted`); on_stage
    is called with a sentence at each stage of that.
    max_length: the most tokens of prompt and answer, in place of what the configuration says.
    adapter: the directory of a PEFT adapter that changes weights (LoRA and its kind), which `load` merges into them.
    rope_scaling: as "yarn:4", a kind of `shapes.ROPE_SCALING` and a factor, for texts longer than the model was made
    for.
    weights: what `load` keeps the weights of linear layers in, as `weights.use_weights`.

    Raises ModelError if anything about it is wrong.
    """
    if weights not in FORMS:
        raise ArgumentError(f"weights={weights!r} is not one of {', '.join(FORMS)}")
    directory = Path(path)
    file = gguf_file(directory)
    if file is not None:
        directory = gguf.converted(file, on_stage)
    check_directory(directory)
    if adapter is not None:
        adapters.check(Path(adapter))
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = _read(directory, "configuration", AutoConfig.from_pretrained, **local)
    if rope_scaling is not None:
        scale_positions(config, rope_scaling)
    tokenizer = _read(directory, "tokenizer", AutoTokenizer.from_pretrained, **local)
    return Model(
        directory,
        config,
        tokenizer,
        trust_remote_code,
        max_length,
        None if adapter is None else Path(adapter),
        rope_scaling,
        weights,
    )


def load(model: Model, *, dtype: str = "auto", ranks: int = 1, device: str | Device = "cpu") -> Any:
    """The network in evaluation mode, its weights read from safetensors files.

    dtype: one of `DTYPES`; "auto" is what the weights are stored in. ranks: processes of the default group of
    torch.distributed that share the weights (tensor parallel), of which this is one. device: where the network goes,
    as in `magicpig.where.Where`.
    Raises ModelError if weights are damaged or missing, MemoryError if they do not fit, ArgumentError where there is no
    such device, or it has no kernels for `Model.weights`.
    """
    opened = open_device(device)
    if opened is not None and model.weights != "auto":
        raise ArgumentError(f"weights={model.weights!r} is for the CPU; with device={opened.name} leave it at 'auto'")
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if ranks > 1:
        _check_split(model, ranks)
    size = sum(path.stat().st_size for path in model.directory.glob("*.safetensors"))
    free = machine.free_memory()
    if size > free:
        raise InsufficientMemoryError(
            f"{model.directory}: the weights take {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        )
    try:
        network, report = _read(
            model.directory,
            "weights",
            AutoModelForCausalLM.from_pretrained,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            **({} if model.rope_scaling is None else {"config": model.config}),
            **({} if ranks == 1 else {"distributed_config": DistributedConfig(tp_size=ranks)}),
        )
    except ModelError as error:
        # transformers refers to a table of its own, which is not shown.
        if isinstance(error.__cause__, RuntimeError) and (difference := _other_shape(model)):
            raise ModelError(f"{model.directory}: {difference}") from error
        raise
    # transformers would fill them with random numbers and only log it
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{model.directory}: {len(missing)} weights are missing, the first is {missing[0]}")
    if model.adapter is not None:
        network = adapters.merged(network, model.adapter)
    if opened is not None:
        return network.eval().to(opened.torch_device)
    # Of several ranks, each has parts of matrices, which torch knows how to multiply.
    return use_weights(network.eval(), model.weights) if ranks == 1 else network.eval()


def stop_tokens(model: Model, network: Any) -> frozenset[int]:
    """The tokens that end an answer: what the model's generation settings say, else the tokenizer's end of text."""
    try:
        return end_tokens(model.tokenizer, network)
    except ModelError as error:
        raise ModelError(f"{model.directory}: {error}") from None


def end_tokens(tokenizer: Any, network: Any) -> frozenset[int]:
    """As `stop_tokens`, for a model that was not opened from a directory."""
    stop = network.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    tokens = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(isinstance(token, int) for token in tokens):
        raise ModelError(f"eos_token_id={shown(stop)}: must be a token or a list of tokens")
    return frozenset(tokens)


def silence_transformers() -> None:
    """Warnings and progress bars of its own would stand among what a command shows."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check_split(model: Model, ranks: int) -> None:
    if model.adapter is not None:
        raise ArgumentError(f"adapter={model.adapter}: merge it first; {ranks} processes cannot")
    if model.weights != "auto":
        raise ArgumentError(f"weights={model.weights!r}: {ranks} processes share weights as they are stored; auto does")
    for shape in layer_shapes(model.config, Config()):
        if shape.kv_heads % ranks:
            raise ArgumentError(f"{ranks} ranks cannot share {shape.kv_heads} kv heads; their number must divide them")


def _other_shape(model: Model) -> str | None:
    """The first weight whose shape is not what the configuration asks for; None where names do not tell."""
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(model.config, trust_remote_code=model.trust_remote_code).state_dict()
    for path in sorted(model.directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                there = file.get_slice(name).get_shape()
                if name in wanted and there != list(wanted[name].shape):
                    asked = list(wanted[name].shape)
                    return f"the weights have {name} with shape {there}, the configuration asks for {asked}"
    return None


def _read(directory: Path, what: str, reader: Callable[..., Any], **options: Any) -> Any:
    try:
        return reader(directory, **options)
    except MemoryError:
        raise
    except Exception as error:
        if not options["trust_remote_code"] and brings_code(directory):
            raise ModelError(
                f"{directory}: cannot read the {what}: {one_line(error)}; the directory brings Python code of its "
                "own, which runs only with --trust-remote-code"
            ) from None
        # Broken files surface as many types, down to plain Exception; whatever it is, it is about this directory.
        raise ModelError(f"{directory}: cannot read the {what}: {one_line(error)}") from error
