from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

LANE: int = 32

MAX_DIM: int = 512

BLOCK_ROWS: int = 4096

SEGMENT_ROWS: int = 65536

LAW_SIZE: int = 4096

TILE: int = 64

SKETCH_KEYS: int = 64

MAX_THREADS: int = 1024

LEAST_STRIDE: int = 8

MAX_LINEAR: int = 16

BYTE_LANE: int = 64

MAX_GROUP: int = 256

def isa() -> str: ...
def use_isa(name: str) -> None: ...
def isa_levels(supported_only: bool) -> list[str]: ...
def pool() -> str: ...
def use_pool(name: str) -> None: ...
def threads() -> int: ...
def poison_scratch(on: bool) -> None: ...
def allocate(bytes: int) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,))]: ...
def interleave(memory: int, bytes: int, least_nodes: int) -> bool: ...
def stream_read(memory: int, bytes: int) -> int: ...
def hash(
    dtype: int,
    dim: int,
    rows: Sequence[int],
    count: int,
    row_bytes: int,
    centres: int,
    sampler: LshSampler,
    codes: int,
    code_stride: int,
) -> None: ...
def mean_keys(
    dtype: int, rows: Sequence[int], head_dim: int, count: int, row_bytes: int, row_centres: int, means: int
) -> None: ...
def build(codes: int, tables: int, count: int, K: int, offsets: int, ids: int) -> None: ...
def extend(
    a_offsets: int,
    a_ids: int,
    a_count: int,
    b_offsets: int,
    b_ids: int,
    b_count: int,
    tables: int,
    K: int,
    offsets: int,
    ids: int,
) -> None: ...
def shorten(
    a_offsets: int, a_ids: int, a_count: int, count: int, tables: int, K: int, offsets: int, ids: int
) -> None: ...
def lookup(
    query_codes: int, K: int, L: int, offsets: int, ids: int, first: int, count: int, min_hits: int, found: int
) -> int: ...
def attend(
    dtype: int,
    dim: int,
    blocks: Sequence[int],
    ids: int,
    count: int,
    log_u: int,
    query: int,
    offsets: int,
    scale: float,
    softcap: float,
    output: int,
    lse: int,
) -> None: ...
def attend_hashed(
    dtype: int,
    dim: int,
    blocks: Sequence[int],
    ids: int,
    count: int,
    query: int,
    centres: int,
    centre_count: int,
    shift: int,
    offsets: int,
    law: HitLaw,
    scale: float,
    softcap: float,
    log_u: int,
    output: int,
    lse: int,
) -> None: ...
def attend_rows(
    dtype: int,
    dim: int,
    rows: int,
    count: int,
    heads: int,
    queries: int,
    offsets: int,
    scale: float,
    softcap: float,
    output: int,
    lse: int,
) -> None: ...
def merge(parts: int, heads: int, dim: int, outputs: int, lses: int, output: int, lse: int) -> None: ...
def write_bytes(source: int, count: int, head_dim: int, rows: Sequence[int], row_bytes: int, half: int) -> None: ...
def convert(from_dtype: int, source: int, count: int, to_dtype: int, to: int) -> None: ...
def decode_step(
    stores: Sequence[StoreView],
    dtype: int,
    query_heads: int,
    query: int,
    key: int,
    value: int,
    scale: float,
    softcap: float,
    sink_logits: int,
    output: int,
    lse: int,
    predicted_error: int,
    capture: bool,
) -> tuple[
    list[int],
    list[
        tuple[
            Annotated[NDArray[numpy.uint8], dict(shape=(None,))], Annotated[NDArray[numpy.uint8], dict(shape=(None,))]
        ]
    ],
]: ...
def sampled_half(
    stores: Sequence[StoreView],
    dtype: int,
    query_heads: int,
    query: int,
    key: int,
    value: int,
    scale: float,
    softcap: float,
    sink_logits: int,
    codes: Sequence[int],
    rotated: Sequence[int],
    exact_output: int,
    exact_lse: int,
    output: int,
    lse: int,
    spread: int,
    capture: bool,
) -> tuple[
    list[int],
    list[
        tuple[
            Annotated[NDArray[numpy.uint8], dict(shape=(None,))], Annotated[NDArray[numpy.uint8], dict(shape=(None,))]
        ]
    ],
]: ...
def rotate(sampler: SketchSampler, vectors: int, count: int, rotated: int) -> None: ...
def sketch(
    dtype: int,
    rows: Sequence[int],
    count: int,
    row_bytes: int,
    row_centres: int,
    sampler: SketchSampler,
    first: int,
    blocks: int,
    stride_shift: int,
    centred: bool,
    words: int,
    scales: int,
    centres: int,
) -> None: ...
def weigh(
    sampler: SketchSampler,
    queries: int,
    heads: int,
    scale: float,
    softcap: float,
    words: Sequence[int],
    scales: Sequence[int],
    centres: Sequence[int],
    counts: Sequence[int],
    sinks: int,
    stride_shift: int,
    weights: int,
    whole: int,
    offsets: int,
) -> list[float]: ...
def draw(
    weights: int, count: int, sinks: int, budget: int, seed: int, layer: int, head: int, position: int, phase: int
) -> tuple[int, int, list[int], list[float]]: ...
def weigh_rows(
    dtype: int,
    dim: int,
    blocks: Sequence[int],
    ids: int,
    count: int,
    log_u: int,
    queries: int,
    heads: int,
    offsets: int,
    scale: float,
    softcap: float,
    weights: int,
) -> None: ...
def flash_form() -> str: ...
def is_amd() -> bool: ...
def use_tiles(on: bool) -> None: ...
def attend_many(
    dtype: int,
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    keys: int,
    query: int,
    query_strides: tuple[int, int],
    key: int,
    key_strides: tuple[int, int],
    value: int,
    value_strides: tuple[int, int],
    causal: bool,
    scale: float,
    softcap: float,
    output: int,
    lse: int,
) -> None: ...
def linear(
    dtype: int,
    numbers: int,
    scales: int,
    rows: int,
    columns: int,
    stride: int,
    bias: int,
    x_dtype: int,
    x: int,
    vectors: int,
    out: int,
) -> None: ...

class LshSampler:
    def __init__(self, head_dim: int, K: int, L: int, directions: int) -> None: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def L(self) -> int: ...

class HitLaw:
    def __init__(self, min_hits: int, log_u: int) -> None: ...

class SketchSampler:
    def __init__(self, head_dim: int, bits: int, distance: float, noise: float, rotation: int) -> None: ...
    @property
    def words(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def head_dim(self) -> int: ...

class StoreView:
    def __init__(
        self, dtype: int, heads: int, head_dim: int, sinks: int, stride_shift: int, layer: int, first_head: int
    ) -> None: ...
    @property
    def length(self) -> int: ...
    @length.setter
    def length(self, arg: int, /) -> None: ...
    @property
    def indexed_to(self) -> int: ...
    @indexed_to.setter
    def indexed_to(self, arg: int, /) -> None: ...
    @property
    def dim(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @steps.setter
    def steps(self, arg: int, /) -> None: ...
    @property
    def sampled_rows(self) -> int: ...
    @sampled_rows.setter
    def sampled_rows(self, arg: int, /) -> None: ...
    @property
    def body_rows(self) -> int: ...
    @body_rows.setter
    def body_rows(self, arg: int, /) -> None: ...
    @property
    def max_share(self) -> float: ...
    @max_share.setter
    def max_share(self, arg: float, /) -> None: ...
    @property
    def whole_bodies(self) -> int: ...
    @whole_bodies.setter
    def whole_bodies(self, arg: int, /) -> None: ...
    @property
    def predicted(self) -> tuple[int, int, float, float, list[int]]: ...
    def count_predicted(self, errors: Sequence[float]) -> None: ...
    def set_sampler(self, lsh: LshSampler | None, sketch: SketchSampler | None) -> None: ...
    def set_policy(
        self, budget: float, candidates: float, epsilon: float, limit: float, seed: int, law: HitLaw | None
    ) -> None: ...
    def set_blocks(self, rows: Sequence[int], head_strides: Sequence[int]) -> None: ...
    def set_row_centres(self, centres: Sequence[int]) -> None: ...
    def set_tail(self, dtype: int, rows: int, head_stride: int, first: int) -> None: ...
    def set_segments(
        self,
        offsets: Sequence[int],
        ids: Sequence[int],
        firsts: Sequence[int],
        counts: Sequence[int],
        centres: Sequence[int],
    ) -> None: ...
    def set_sketches(
        self,
        words: Sequence[int],
        scales: Sequence[int],
        centres: Sequence[int],
        firsts: Sequence[int],
        counts: Sequence[int],
        blocks: Sequence[int],
    ) -> None: ...
