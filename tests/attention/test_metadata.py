"""From vLLM's per-step metadata to the operators' batch."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_duo.attention.metadata import make_batch


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
