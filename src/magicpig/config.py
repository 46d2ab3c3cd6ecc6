"""Every number of the method, with its default and the reason for it. The command line and YAML map onto this."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from magicpig.errors import ArgumentError
from magicpig.wording import LONGEST_VALUE, printable, shown

DENSE_LAYERS = (0, 16, 32, 48)  # the paper's, of models with 32 and with 80 layers

SamplerName = Literal[
    "lsh", "sketch", "full", "window", "topk", "oracle", "oracle-replacement", "quest", "uniform-tail"
]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
KVDtype = Literal["model", "int8"]
NATIVE = ("lsh", "sketch")  # samplers that find their rows themselves; the others look at every key
QUANTISED = ("lsh", "sketch", "full")  # samplers that attend to keys and values in whole numbers
HASHING = ("K", "L", "min_hits")  # settings of "lsh" alone
INDEX_SETTINGS = {"lsh": ("centre", "K", "L", "seed"), "sketch": ("centre", "bits")}
"""On which settings an index depends, by sampler. All the randomness of hashing is in its directions, that of a sketch
in where a walk along its weights starts: so the rotation of sketches is the same for every seed."""
SKETCH_BYTES = 32  # of a key's codes, at most, with as many bits as by default, unless there must be two
MOST_TOKENS = 2**40  # more than any memory holds; larger numbers would not fit the kernels' integers
BY_LAYER = ("sampler", "budget", "bits", "epsilon", "centre", "K", "L", "min_hits")
"""The settings that a layer may have of its own."""


class Config(BaseModel):
    """Settings of sampled attention. Immutable; unknown names and values out of range raise a one-line ValueError."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sampler: SamplerName = Field(
        "sketch",
        description="how body keys are picked; 'full' reads all of them; where only K, L or min_hits is given, 'lsh'",
    )
    budget: float = Field(
        512.0,
        gt=0,
        le=MOST_TOKENS,
        allow_inf_nan=False,
        description="rows that samplers which can choose read per head and step; below 1, a share of the body",
    )
    bits: int | None = Field(
        None,
        ge=1,
        le=4,
        description="of a coordinate in a sketch; default: as many of 2 to 4 as fit in 32 bytes of a key",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a sketch draws more than the budget until the predicted error of every head is below this",
    )
    centre: bool = Field(True, description="subtract the mean of the body keys before indexing; False to see why")
    kv_dtype: KVDtype = Field(
        "model", description="in which keys and values are kept: the model's, or whole numbers with a scale each"
    )
    K: int = Field(10, ge=1, le=16, description="bits per hash table; codes are 16-bit")
    L: int = Field(150, ge=1, le=1024, description="hash tables; (10, 150) samples about 2 % (paper, table 9)")
    min_hits: int = Field(2, ge=1, le=127, description="tables in which a key must collide with the query")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the sampling; the only randomness there is")
    sinks: int = Field(4, ge=0, le=MOST_TOKENS, description="first tokens, always attended exactly")
    recent: int = Field(64, ge=0, le=MOST_TOKENS, description="newest tokens, always attended exactly")
    block: int = Field(
        256,
        ge=8,
        le=4096,
        description="tokens indexed at once as they leave the recent window; a power of two",
    )
    exact_below: int = Field(
        2048, ge=0, le=MOST_TOKENS, description="contexts shorter than this stay exact: there full attention is cheaper"
    )
    dense_layers: tuple[int, ...] | None = Field(None, description="layers that stay exact; default: 0, 16, 32 and 48")
    layers: dict[int, dict[str, Any]] = Field(
        {}, description="layers with settings of their own, which come before those of all layers and dense_layers"
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
            settings = {**settings, "layers": {_number(layer): own for layer, own in settings["layers"].items()}}
        return _with_sampler(settings)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.block & (self.block - 1):
            raise ValueError(f"block={self.block} is not a power of two")
        if self.min_hits > self.L:
            raise ValueError(f"min_hits={self.min_hits} is larger than L={self.L}: no key could ever be sampled")
        if self.block & (self.block - 1):
            raise ValueError(f"block={self.block} is not a power of two")
        if self.kv_dtype == "int8" and self.sampler not in QUANTISED:
            raise ValueError(
                f"kv_dtype='int8': sampler={self.sampler!r} does not read it; allowed: {', '.join(QUANTISED)}"
            )
        if self.dense_layers is not None and any(layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} has a negative layer; layers count from 0")
        for layer, own in self.layers.items():
            if layer < 0:
                raise ValueError(f"layers.{layer}: there is no such layer; layers count from 0")
            if unknown := sorted(set(own) - set(BY_LAYER)):
                raise ValueError(
                    f"layers.{layer}.{unknown[0]} is no setting of a single layer; these are {', '.join(BY_LAYER)}"
                )
            if layer in (self.dense_layers or ()):
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

    def said(self) -> dict[str, Any]:
        """What has to be said to get this config, ready for JSON."""
        return {"sampler": self.sampler} | self.model_dump(mode="json", exclude_defaults=True)

    def is_dense(self, layer: int) -> bool:
        """Whether this layer's attention stays exact."""
        config = self.of_layer(layer)
        if not config.samples:
            return True
        return layer in (DENSE_LAYERS if config.dense_layers is None else config.dense_layers)

    @property
    def samples(self) -> bool:
        """Whether there is anything to sample by: "full" reads all."""
        return self.sampler != "full"

    @property
    def hashes(self) -> bool:
        """Whether rows are found by hashing: then K, L and min_hits say how many, and there is no budget."""
        return self.sampler == "lsh"

    @property
    def sketches(self) -> bool:
        """Whether rows are drawn by a sketch."""
        return self.sampler == "sketch"

    def sketch_bits(self, head_dim: int) -> int:
        """Bits of a coordinate in a sketch of keys of this length. Short keys need more, since fewer errors cancel."""
        return self.bits if self.bits is not None else max(2, min(4, 8 * SKETCH_BYTES // head_dim))

    def rows(self, body: int) -> int:
        """How many of `body` rows the budget allows a head: at least one, and at most all."""
        wanted = self.budget if self.budget >= 1 else self.budget * body
        return max(1, min(body, round(wanted)))


def _with_sampler(settings: Any) -> Any:
    """Who says how to hash wants to hash."""
    if isinstance(settings, dict) and "sampler" not in settings and not set(settings).isdisjoint(HASHING):
        return {"sampler": "lsh", **settings}
    return settings


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
