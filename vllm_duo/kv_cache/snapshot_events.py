"""KV cache events of the streaming heads: at which prefixes a group's snapshots let a request resume.

With ``--kv-events-config`` vLLM tells routers and the like which blocks of tokens each group keeps, by
hash. A snapshot is no block of tokens but the state at the end of a prefix, in several pool blocks. So
a group of streaming heads tells of prefixes: stored once a snapshot is whole, removed once it is not.
An event has the hash, parent and tokens of the prefix's last block, the same as the group of retrieval
heads has for that block: a request can resume after a block that every group tells of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    get_group_id,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
    resolve_block_hashes,
)

from vllm_duo.kv_cache.snapshots import parse_key, snapshot_key

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId
    from vllm.v1.request import Request

SNAPSHOT_GROUPS = "duo_snapshot_groups"
"""Attribute of vLLM's ``BlockPool``: the KV cache groups whose cached blocks are snapshots'."""


def mark_group(pool: BlockPool, group_id: int) -> None:
    """Remember that a group's cached blocks are those of snapshots."""
    setattr(pool, SNAPSHOT_GROUPS, {group_id, *getattr(pool, SNAPSHOT_GROUPS, ())})


def tell_stored(
    pool: BlockPool, request: Request, num_tokens: int, block_size: int, group_id: int
) -> None:
    """Tell that the request's first tokens can be resumed after; nothing without events.

    Args:
        pool: vLLM's, which queues the event.
        request: whose tokens.
        num_tokens: boundary of a whole snapshot, a multiple of ``block_size``.
        block_size: tokens by which vLLM hashes prefixes.
        group_id: vLLM's KV cache group.
    """
    if not pool.enable_kv_cache_events:
        return
    hashes = resolve_block_hashes(request.block_hashes, pool.hash_block_size, block_size)
    last, start = num_tokens // block_size - 1, num_tokens - block_size
    extra_keys, _ = generate_block_hash_extra_keys(request, start, num_tokens, 0)
    event = pool._build_block_stored_event(
        request,
        block_hashes=[maybe_convert_block_hash(hashes[last])],
        parent_block_hash=maybe_convert_block_hash(hashes[last - 1]) if last else None,
        start_token_idx=start,
        end_token_idx=num_tokens,
        block_size=block_size,
        kv_cache_group_id=group_id,
        extra_keys_list=[extra_keys],
    )
    pool.kv_event_queue.append(event)


def told_removals(
    pool: BlockPool, keys: Iterable[BlockHashWithGroupId]
) -> list[BlockHashWithGroupId]:
    """Which of the keys that a pool block has just lost consumers are to hear of, as what.

    A snapshot's first block to go takes it away, whichever it is; the others go unheard. A block of
    which there is a copy takes nothing away.

    Args:
        pool: vLLM's, which no longer has the keys for that block.
        keys: vLLM's, of blocks of tokens or of snapshots.
    """
    groups = getattr(pool, SNAPSHOT_GROUPS, ())
    find = pool.cached_block_hash_to_block.get_one_block
    told = []
    for key in keys:
        group_id = get_group_id(key)
        if group_id not in groups:
            told.append(key)
            continue
        prefix, index, size = parse_key(key)
        others = (
            snapshot_key(prefix, other, size, group_id) for other in range(size) if other != index
        )
        if find(key) is None and all(find(other) is not None for other in others):
            told.append(make_block_hash_with_group_id(prefix, group_id))
    return told
