"""vLLM KV cache specs of the two head classes.

vLLM's own words: a *spec* describes one layer's cache, layers with compatible specs form a *group*
that shares one block table. Source: ``vllm/v1/kv_cache_interface.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from vllm_duo.kv_cache.span import StreamingSpan

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec(FullAttentionSpec):
    """Full paged blocks of a layer's retrieval heads; ``num_kv_heads`` counts only these."""


@dataclass(frozen=True, kw_only=True)
class StreamingSpec(AttentionSpec):
    """Sink and ring of a layer's streaming heads; ``num_kv_heads`` counts only these.

    Not derived from ``SlidingWindowSpec`` or ``FullAttentionSpec``: vLLM would merge it into a group
    of full attention, or admit requests by a sliding window's bound.

    ``block_size`` is that of the retrieval class: by it vLLM hashes prefixes and aligns hits. A
    streaming block has ``slots_per_block`` slots, which need not divide it.

    Attributes:
        slots_per_block: tokens of a streaming block (``P_s``).
        sink_size: first tokens that stay, in tokens; 0 in a layer with a sliding window of its own.
        recent_size: most recent tokens that stay, in tokens; that window, in such a layer.
        draft_size: speculative tokens that may be rolled back, in tokens.
        lookahead_size: tokens beyond a step's own for which a draft model needs blocks.
        bin: streaming layers of one bin share a block table.
        snapshot_interval: with prefix caching, the state is kept at multiples of so many tokens, and
            where a later request is likely to resume.
        max_step_tokens: tokens of a step at most (vLLM's ``--max-num-batched-tokens``): no snapshot
            takes a block that the step's running requests may still need.
    """

    dcp_sharded: bool = False
    slots_per_block: int
    sink_size: int
    recent_size: int
    draft_size: int = 0
    lookahead_size: int = 0
    bin: int = 0
    snapshot_interval: int = 1024
    max_step_tokens: int = 2048

    @property
    def span(self) -> StreamingSpan:
        """What a streaming head keeps, and in which blocks."""
        return StreamingSpan(
            sink_size=self.sink_size,
            recent_size=self.recent_size,
            draft_size=self.draft_size,
            block_size=self.slots_per_block,
        )

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Slots of a block: vLLM's block size is not that of the storage."""
        return self.slots_per_block

    @property
    def block_table_token_alignment(self) -> int | None:
        """The table's width is exact: nothing indexes it by position."""
        return None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that a request of max-model-len tokens holds in this layer.

        Worked example: sink 64, recent 256, 16 tokens per block: min(20, ...) = 20 blocks from 305
        tokens on; at a max-model-len of 100 tokens 4 + 3 = 7 blocks.
        """
        blocks = self.span.blocks(vllm_config.model_config.max_model_len)
        return blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of the worker's block table, in blocks: constant, whatever ``max_len``."""
        return self.span.max_blocks

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all specs belong to this spec's bin; heads per layer may differ."""
        return all(
            isinstance(spec, StreamingSpec) and spec.bin == self.bin and spec.span == self.span
            for spec in kv_cache_specs.values()
        )

    @property
    def uses_slot_mapping(self) -> bool:
        """Ring slots come from positions, never from vLLM's slot mapping."""
        return False
