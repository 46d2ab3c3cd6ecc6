"""Every setting of the method, described once. Flags, files, environment variables and OpenAPI are made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from magicpig import strict_json
from magicpig.errors import ArgumentError
from magicpig.wording import LONGEST_VALUE, printable, shown

SamplerName = Literal[
    "lsh", "sketch", "full", "window", "topk", "oracle", "oracle-replacement", "quest", "uniform-tail"
]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
KVDtype = Literal["model", "int8"]
NATIVE = ("lsh", "sketch")  # samplers that the kernels draw by; the others look at every key, in Python
QUANTISED = ("lsh", "sketch", "full")  # samplers that read keys and values in int8
HASHING = ("K", "L", "min_hits")  # settings of "lsh" alone
NAMED_BY = {"lsh": ("K", "L"), "full": (), "window": ()}
"""The settings that say how much a sampler reads: of all others, the budget."""
INDEX_SETTINGS = {"lsh": ("centre", "K", "L", "seed"), "sketch": ("centre", "bits")}
"""The settings that an index depends on, by sampler. All randomness of hashing is in its directions. The rotation of
sketches is the same for every seed: what is random is where a draw starts."""
MOST_TOKENS = 2**40  # more than any memory holds; larger numbers would not fit the kernels' integers
BY_LAYER = ("sampler", "budget", "candidates", "bits", "epsilon", "centre", "K", "L", "min_hits")
"""The settings that a layer may have of its own."""


class Config(BaseModel):
    """Settings of sampled attention. Immutable; unknown names and values out of range raise a one-line ValueError."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sampler: SamplerName = Field(
        "sketch",
        description="How keys are picked: sketch draws them by a few bits of each, lsh reads those that hashing finds, "
        "full reads all, and the others are there for comparison. lsh is meant where only K, L or min_hits is given. "
        "Settings may follow a colon, as in lsh:K=9,L=120 or topk:0.02.",
    )
    budget: float = Field(
        512.0,
        gt=0,
        le=MOST_TOKENS,
        allow_inf_nan=False,
        description="Keys that a head reads per step with any sampler but lsh and full; below 1, a share of the keys.",
    )
    candidates: float | None = Field(
        None,
        gt=0,
        le=MOST_TOKENS,
        allow_inf_nan=False,
        description="Keys that a sketch draws first, to draw the budget from them by the logits that they really have. "
        "Below 1, a share of the keys. By default as many, up to eight for a row, as the noise of its scores asks for, "
        "step by step. Where that is no more than the budget, all are read.",
    )
    bits: int = Field(
        2,
        ge=1,
        le=4,
        description="Bits of a coordinate in a sketch: more of them miss fewer keys, for more memory.",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Relative error that the output of a head may have: a sketch draws as many rows as that takes, "
        "step by step, instead of the budget; where it would be a quarter of the keys, all.",
    )
    centre: bool = Field(
        True, description="Subtract the mean of the keys before they are indexed; without, to see why it is done."
    )
    kv_dtype: KVDtype = Field(
        "model",
        description="What keys and values are kept in: the model's type, or int8, which takes half the memory of "
        "bfloat16 for about 1 % of error.",
    )
    K: int = Field(10, ge=1, le=16, description="Bits per hash table: more bits sample fewer keys.")
    L: int = Field(150, ge=1, le=1024, description="Hash tables: more tables sample more keys.")
    min_hits: int = Field(2, ge=1, le=127, description="Tables in which a key must collide with the query.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampling; attention has no other randomness.")
    sinks: int = Field(4, ge=0, le=MOST_TOKENS, description="First tokens, which every step reads.")
    recent: int = Field(64, ge=0, le=MOST_TOKENS, description="Newest tokens, which every step reads.")
    block: int = Field(
        256,
        ge=8,
        le=4096,
        description="Tokens that are indexed at once as they leave the newest ones; a power of two.",
    )
    exact_below: int = Field(2048, ge=0, le=MOST_TOKENS, description="Contexts with fewer tokens are read in full.")
    dense_layers: tuple[int, ...] = Field((), description="Layers that are read in full, as 0,16, or none.")
    layers: dict[int, dict[str, Any]] = Field(
        {}, description="Settings of single layers, by their index. They come before those of all layers."
    )

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ArgumentError(_one_line(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, settings: Any) -> Any:
        # JSON has no tuples, and no numbers as keys.
        if isinstance(settings, dict) and isinstance(settings.get("dense_layers"), list):
            settings = {**settings, "dense_layers": tuple(settings["dense_layers"])}
        if isinstance(settings, dict) and isinstance(settings.get("layers"), dict):
            settings = {
                **settings,
                "layers": {_number(layer): _expanded(own) for layer, own in settings["layers"].items()},
            }
        return _with_sampler(settings)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.min_hits > self.L:
            raise ValueError(f"min_hits={self.min_hits} is larger than L={self.L}: no key could ever be sampled")
        if self.block & (self.block - 1):
            raise ValueError(f"block={self.block} is not a power of two")
        if self.kv_dtype == "int8" and self.sampler not in QUANTISED:
            raise ValueError(
                f"kv_dtype='int8': sampler={self.sampler!r} does not read it; allowed: {', '.join(QUANTISED)}"
            )
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} has a negative layer; layers count from 0")
        for layer, own in self.layers.items():
            if layer < 0:
                raise ValueError(f"layers.{layer}: there is no such layer; layers count from 0")
            if unknown := sorted(set(own) - set(BY_LAYER)):
                raise ValueError(
                    f"layers.{layer}.{unknown[0]} is no setting of a single layer; these are {', '.join(BY_LAYER)}"
                )
            if layer in self.dense_layers:
                raise ValueError(f"layers.{layer}: the layer is in dense_layers as well")
            try:
                self.of_layer(layer)
            except ValueError as error:
                raise ValueError(f"layers.{layer}.{error}") from None
        return self

    def of_layer(self, layer: int) -> Config:
        """The settings of one layer, as those of a model whose layers are all like it."""
        own = self.layers.get(layer)
        if own is None:
            return self.model_copy(update={"layers": {}}) if self.layers else self
        shared = self.model_dump(exclude={"layers", "dense_layers"})
        return Config(**{**shared, **_with_sampler(own)}, dense_layers=())

    def changed(self, settings: Mapping[str, Any]) -> Config:
        """The same config with other ``settings``. Raises ArgumentError."""
        own = self.model_dump(exclude_defaults=True) | {"sampler": self.sampler}
        return Config(**{**own, **_with_sampler(dict(settings))})

    def nondefault(self) -> dict[str, Any]:
        """The sampler, and the settings that differ from the defaults, ready for JSON."""
        return {"sampler": self.sampler} | self.model_dump(mode="json", exclude_defaults=True)

    def text(self) -> str:
        """How rows are picked, as `parse_sampler` reads it: "sketch:512,bits=3". Single layers are left out."""
        named = {*self.named_by} | set(self.nondefault()) - {"sampler", "budget"}
        parts = [f"{name}={_plain(getattr(self, name))}" for name in BY_LAYER if name in named]
        return ":".join([self.sampler, *([",".join(parts).removeprefix("budget=")] if parts else [])])

    def is_dense(self, layer: int) -> bool:
        """Whether this layer's attention stays exact."""
        config = self.of_layer(layer)
        if not config.samples:
            return True
        return layer in config.dense_layers

    @property
    def samples(self) -> bool:
        """Whether there is anything to sample by: "full" reads all."""
        return self.sampler != "full"

    @property
    def native(self) -> bool:
        """Whether the kernels pick the rows; other samplers look at every key, in Python."""
        return self.sampler in NATIVE

    @property
    def named_by(self) -> tuple[str, ...]:
        """The settings that say how much the sampler reads."""
        return NAMED_BY.get(self.sampler, ("budget",))

    @property
    def hashes(self) -> bool:
        """Whether rows are found by hashing: then K, L and min_hits say how many, and there is no budget."""
        return self.sampler == "lsh"

    @property
    def sketches(self) -> bool:
        """Whether rows are drawn by a sketch."""
        return self.sampler == "sketch"

    @property
    def drawn_candidates(self) -> float:
        """Keys that a sketch draws first; below 1 a share of the keys, and 0 as many as its noise asks for."""
        return self.candidates or 0.0


def parse_sampler(text: str) -> dict[str, Any]:
    """The settings in a sampler's name: "lsh:K=9,L=120", "topk:0.02", "full". A bare number is the budget.

    Raises ArgumentError for a setting that there is not, or that is not a number, true or false.
    """
    sampler, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        name, equals, value = part.strip().partition("=")
        name, value = (name, value) if equals else ("budget", name)
        allowed = [
            field for field in Config.model_fields if field not in ("sampler", "layers", "dense_layers", *settings)
        ]
        if name not in allowed:
            raise ArgumentError(f"unknown setting {shown(name)} of {shown(text)}; {did_you_mean(name, allowed)}")
        try:
            settings[name] = value if name == "kv_dtype" else strict_json.parse(value)
        except strict_json.JsonError:
            raise ArgumentError(
                f"sampler {shown(text)}: {name}={shown(value)} is not a number, true or false"
            ) from None
    return {"sampler": sampler, **settings}


def did_you_mean(name: str, allowed: Sequence[str]) -> str:
    """The end of a message about an unknown name: those that are like it, or all."""
    near = get_close_matches(name, allowed, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed)}"


def _plain(value: Any) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _with_sampler(settings: Any) -> Any:
    """The settings and their sampler: "lsh", where only settings of hashing are given."""
    settings = _expanded(settings)
    if isinstance(settings, dict) and "sampler" not in settings and not set(settings).isdisjoint(HASHING):
        return {"sampler": "lsh", **settings}
    return settings


def _expanded(settings: Any) -> Any:
    """The settings, with those that their sampler has behind a colon."""
    if not isinstance(settings, dict) or not isinstance(sampler := settings.get("sampler"), str) or ":" not in sampler:
        return settings
    own = parse_sampler(sampler)
    if twice := sorted((set(own) & set(settings)) - {"sampler"}):
        raise ArgumentError(f"{twice[0]}={shown(settings[twice[0]])} and sampler={shown(sampler)}: give it once")
    return {**settings, **own}


EXACT = Config(sampler="full")
"""Full attention, in every layer."""


def _number(key: Any) -> Any:
    # "1" and "01" would be the same layer, so one of them is refused.
    plain = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 and key == str(int(key))
    return int(key) if plain else key


def _one_line(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{printable(name, LONGEST_VALUE)}={shown(item['input'])}: {message}" if name else message)
    return "; ".join(parts)
