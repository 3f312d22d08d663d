"""What is measured on a GPU, and what each point must move and compute: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ELEMENT_BYTES = 2
"""Of bfloat16, in which everything is measured."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's attention layer and the sizes of its caches.

    Attributes:
        name: for people.
        num_heads: Hq.
        num_kv_heads: Hkv.
        head_size: D.
        block_size: tokens of a block, of either class.
        sink_size: first tokens that a streaming head keeps.
        recent_size: most recent tokens that it keeps.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int = 128
    block_size: int = 16
    sink_size: int = 64
    recent_size: int = 256

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all heads."""
        return self.num_kv_heads * 2 * self.head_size * ELEMENT_BYTES


MODELS = {
    shape.name: shape
    for shape in (
        Shape(name="Llama-3-8B", num_heads=32, num_kv_heads=8),
        Shape(name="Llama-2-7B", num_heads=32, num_kv_heads=32),
    )
}
SPARSITIES = (0.0, 0.25, 0.5, 0.75)
CONTEXTS = tuple(1024 * 4**power for power in range(6))
REQUESTS = (1, 4, 16, 64)
CHUNKS = (2048, 8192)


@dataclass(frozen=True)
class Work:
    """The least that a step can do: every byte moved once, every visible pair multiplied once."""

    num_bytes: int
    flop: int


@dataclass(frozen=True)
class Limits:
    """What this machine reached in the same run.

    Attributes:
        copy_gb_s: bytes read and written by a copy within the device's memory.
        gemm_tflop_s: of a bfloat16 matrix product.
    """

    copy_gb_s: float
    gemm_tflop_s: float

    def least_ms(self, work: Work) -> tuple[float, str]:
        """The least time of a step, and which limit sets it: ``memory`` or ``arithmetic``."""
        memory = work.num_bytes / self.copy_gb_s / 1e6
        arithmetic = work.flop / self.gemm_tflop_s / 1e9
        return max((memory, "memory"), (arithmetic, "arithmetic"))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step of a layer, run by every contender.

    Attributes:
        shape: the layer.
        context: tokens of each request at the end of the step.
        chunk: how many of them are the step's own; 1 is a decode.
        requests: B.
        sparsities: shares of streaming KV heads, each a contender.
    """

    shape: Shape
    context: int
    chunk: int = 1
    requests: int = 1
    sparsities: tuple[float, ...] = SPARSITIES

    @property
    def kind(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.chunk == 1 else "prefill"

    @property
    def before(self) -> int:
        """Tokens of each request before the step."""
        return self.context - self.chunk

    @property
    def num_tokens(self) -> int:
        """T, the step's own tokens of all requests."""
        return self.requests * self.chunk

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache that holds every token of every head."""
        return self.requests * self.context * self.shape.token_bytes

    def streaming(self, sparsity: float) -> int:
        """Streaming KV heads at this sparsity."""
        return round(sparsity * self.shape.num_kv_heads)

    def work(self, streaming: int, *, writes: bool = True) -> Work:
        """What a step must do with so many streaming KV heads.

        Worked example: Llama-3-8B, one decode at 1,024 tokens, 4 streaming heads. 4 heads read 1,023
        keys and 4 read 319 of the cache, with their values 512 bytes each; 8 new ones of 512 bytes are
        read and written; 32 query heads of 256 bytes are read and as many results written:
        4 * (1,023 + 319) * 512 + 2 * 8 * 512 + 2 * 32 * 256 = 2,772,992 bytes. 4 query heads share a
        KV head and a visible key costs 4 * 128 operations: 4 * (1,024 + 320) * 4 * 4 * 128.

        Args:
            streaming: KV heads that stream.
            writes: whether the new keys and values are written to the cache.
        """
        shape = self.shape
        row = 2 * shape.head_size * ELEMENT_BYTES
        retrieval = shape.num_kv_heads - streaming
        # The chunk's first query reaches back recent_size - 1 tokens, and sees the sink.
        kept = min(self.before, shape.sink_size + shape.recent_size - 1)
        read = (retrieval * self.before + streaming * kept) * row
        new = self.chunk * shape.token_bytes * (2 if writes else 1)
        queries = 2 * self.chunk * shape.num_heads * shape.head_size * ELEMENT_BYTES
        pairs = retrieval * self.visible() + streaming * self.visible(
            shape.sink_size + shape.recent_size
        )
        group = shape.num_heads // shape.num_kv_heads
        flop = 4 * shape.head_size * group * pairs
        return Work(self.requests * (read + new + queries), self.requests * flop)

    def visible(self, most: int | None = None) -> int:
        """Keys that the queries of one request and head see, together; each at most ``most``."""

        def total(count: int) -> int:
            """Sum of 1 to count, each cut to ``most``."""
            whole = count if most is None else min(count, most)
            return whole * (whole + 1) // 2 + (count - whole) * (most or 0)

        return total(self.context) - total(self.before)


def points(
    *,
    models: Sequence[str] = tuple(MODELS),
    kinds: Sequence[str] = ("decode", "prefill"),
    contexts: Sequence[int] = CONTEXTS,
    requests: Sequence[int] = REQUESTS,
    chunks: Sequence[int] = CHUNKS,
    sparsities: Sequence[float] = SPARSITIES,
) -> Iterator[Point]:
    """Every point, short contexts first, so that a run that is cut short has seen all kinds.

    A chunk is measured at the end of each context that is at least as long.
    """
    for context in sorted(contexts):
        for model in models:
            common = {"shape": MODELS[model], "context": context, "sparsities": tuple(sparsities)}
            if "decode" in kinds:
                for count in requests:
                    yield Point(requests=count, **common)
            if "prefill" in kinds:
                for chunk in chunks:
                    if chunk <= context:
                        yield Point(chunk=chunk, **common)


SMOKE: dict[str, tuple[float, ...]] = {
    "contexts": (1024, 16384),
    "requests": (1, 16),
    "chunks": (2048,),
    "sparsities": (0.0, 0.5),
}
"""A quick look."""
