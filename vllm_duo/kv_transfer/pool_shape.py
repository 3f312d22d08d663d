"""Where a page and a ring lie in vLLM's pool of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_duo.kv_cache.span import StreamingSpan

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec


@dataclass(frozen=True)
class GroupShape:
    """One of vLLM's KV cache groups.

    Attributes:
        group_id: vLLM's.
        width: leading bytes of a pool block that the group's layers lie in.
        span: what its streaming heads keep; None: retrieval heads.
    """

    group_id: int
    width: int
    span: StreamingSpan | None = None

    def ring_blocks(self, num_tokens: int) -> int:
        """Blocks of the state at ``num_tokens`` tokens."""
        assert self.span is not None
        return self.span.blocks(num_tokens)


@dataclass(frozen=True)
class PoolShape:
    """The pool.

    Attributes:
        num_blocks: of the pool.
        block_bytes: of each.
        page_tokens: tokens of a retrieval page; hits end at its multiples.
        pages: the retrieval heads' group; None if every head streams.
        rings: the bins of streaming heads; empty if none does.
    """

    num_blocks: int
    block_bytes: int
    page_tokens: int
    pages: GroupShape | None
    rings: tuple[GroupShape, ...]

    @classmethod
    def of(cls, config: KVCacheConfig) -> PoolShape:
        """Read vLLM's.

        Raises:
            RuntimeError: blocks do not lie one behind another.
        """
        from vllm_duo.kv_cache.spec import StreamingSpec

        block_bytes = config.kv_cache_tensors[0].size // config.num_blocks
        if any(tensor.block_stride != block_bytes for tensor in config.kv_cache_tensors):
            raise RuntimeError(
                f"expected every KV cache in blocks of {block_bytes} bytes, got strides of "
                f"{sorted({tensor.block_stride for tensor in config.kv_cache_tensors})}; this is a "
                "defect of vllm-duo, please report it with the server's flags"
            )
        pages, rings = None, []
        for group_id, group in enumerate(config.kv_cache_groups):
            spec = first_spec(group)
            # Of layers that share a placement the end is an upper bound.
            width = min(_width(config, group), block_bytes)
            if isinstance(spec, StreamingSpec):
                rings.append(GroupShape(group_id, width, spec.span))
            else:
                pages = GroupShape(group_id, width)
        size = config.kv_cache_groups[0].kv_cache_spec.block_size
        return cls(config.num_blocks, block_bytes, size, pages, tuple(rings))

    def ring_bytes(self, num_tokens: int) -> int:
        """Bytes of the streaming state of all bins at ``num_tokens`` tokens."""
        return sum(ring.width * ring.ring_blocks(num_tokens) for ring in self.rings)


def first_spec(group: KVCacheGroupSpec) -> object:
    """The spec of a group's first layer."""
    from vllm.v1.kv_cache_interface import iter_layer_specs

    return next(iter(iter_layer_specs(group.kv_cache_spec)))


def _width(config: KVCacheConfig, group: KVCacheGroupSpec) -> int:
    """Bytes from a block's start to the end of the group's last layer in it."""
    spec = group.kv_cache_spec
    of_layer = getattr(spec, "kv_cache_specs", {})
    names = set(group.layer_names)
    ends = [
        tensor.offset
        + tensor.layer_stride * (len(tensor.layers) - 1)
        + of_layer.get(tensor.layers[0], spec).page_size_bytes
        for tensor in config.kv_cache_tensors
        if not names.isdisjoint(tensor.layers)
    ]
    return max(ends)
