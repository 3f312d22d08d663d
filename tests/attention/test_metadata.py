"""From vLLM's per-step metadata to the operators' batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_duo.attention.metadata import DuoMetadataBuilder, make_batch
from vllm_duo.kv_cache.spec import RetrievalSpec


def common(query_lens, seq_lens):
    start = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=int(start[-1]),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.zeros(len(query_lens), 4, dtype=torch.int32),
        slot_mapping=torch.zeros(int(start[-1]), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("query_lens", "num_decodes"),
    [
        ([1, 1, 1], 3),
        ([1, 1, 7], 2),
        ([5, 7], 0),
        # The last chunk of a prefill may have one token and stays among the prefills.
        ([1, 1, 3, 2039, 1], 2),
    ],
)
def test_leading_requests_of_one_token_are_decodes(query_lens, num_decodes):
    batch = make_batch(common(query_lens, [length + 10 for length in query_lens]))
    assert batch.num_decodes == num_decodes
    assert batch.num_decode_tokens == num_decodes
    assert batch.query_lens.tolist() == query_lens
    assert batch.context_lens.tolist() == [10] * len(query_lens)


def test_a_draft_models_passes_share_nothing():
    """vLLM lengthens the requests of one metadata object in place from pass to pass."""
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=3, parallel_drafting=False),
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    spec = RetrievalSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    builder = DuoMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))
    given, contexts = common([1, 1], [30, 40]), []
    for index in range(3):
        contexts.append(builder.build_for_drafting(given, index).batch.context_lens.tolist())
        given.seq_lens += 1
    assert contexts == [[29, 39], [30, 40], [31, 41]]
