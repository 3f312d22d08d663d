"""What the metadata builder does for a GPU, on the CPU: no look at device tensors, kept buffers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from vllm_duo.attention import metadata
from vllm_duo.attention.backend import DuoAttentionBackend
from vllm_duo.attention.metadata import DuoMetadataBuilder, make_batch, step_orders
from vllm_duo.attention.snapshot_buffer import SnapshotBuffer
from vllm_duo.kv_cache.orders import SnapshotOrder
from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec
from vllm_duo.ops import gpu
from vllm_duo.ops.batch import SnapshotCopy

STREAMING = StreamingSpec(
    block_size=16,
    slots_per_block=16,
    num_kv_heads=2,
    head_size=64,
    dtype=torch.float16,
    sink_size=16,
    recent_size=32,
)
RETRIEVAL = RetrievalSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float16)


class DeviceLens:
    """Lengths on a device: their number is known, reading them fails the test."""

    is_cpu = False

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getattr__(self, name):
        raise AssertionError(f"the host looked at a device tensor ({name})")


def common(query_lens, upper_bound=None, seq_lens=None):
    start = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=DeviceLens(len(query_lens)) if seq_lens is None else seq_lens,
        seq_lens_cpu_upper_bound=None if upper_bound is None else torch.tensor(upper_bound),
        num_reqs=len(query_lens),
        num_actual_tokens=int(start[-1]),
        max_query_len=max(query_lens),
        max_seq_len=99,
        block_table_tensor=torch.zeros(len(query_lens), 4, dtype=torch.int32),
        slot_mapping=torch.zeros(int(start[-1]), dtype=torch.int64),
    )


@pytest.fixture
def make_builder(monkeypatch):
    """A builder as on a GPU, its buffers on the CPU."""
    monkeypatch.setattr(DuoMetadataBuilder, "_step", (None, None))
    monkeypatch.setattr(DuoMetadataBuilder, "_group", (None, None))
    reserved = []
    monkeypatch.setattr(gpu, "reserve", lambda *arguments: reserved.append(arguments))
    allocate = SnapshotBuffer.allocate
    monkeypatch.setattr(
        metadata.SnapshotBuffer, "allocate", lambda most, width, _: allocate(most, width, "cpu")
    )

    def make(spec, *, drafts=None, prefix_caching=True):
        speculative = drafts and SimpleNamespace(
            num_speculative_tokens=drafts, parallel_drafting=False
        )
        config = SimpleNamespace(
            speculative_config=speculative,
            use_v2_model_runner=False,
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            model_config=SimpleNamespace(
                get_num_attention_heads=lambda _: 16, get_num_kv_heads=lambda _: 4
            ),
            cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
            scheduler_config=SimpleNamespace(max_num_seqs=2),
        )
        return DuoMetadataBuilder(spec, ["layer"], config, torch.device("cuda", 0))

    make.reserved = reserved
    return make


def test_lengths_on_the_device_are_never_read():
    batch = make_batch(common([1, 1, 7], [30, 40, 50]))
    assert batch.host_seq_lens.tolist() == [30, 40, 50]
    assert batch.knows_prefill_lens  # what vLLM's bounds are for prefills
    assert isinstance(batch.seq_lens, DeviceLens)


def test_without_a_bound_the_longest_request_bounds_all():
    batch = make_batch(common([1, 7]))
    assert batch.host_seq_lens.tolist() == [99, 99]
    assert not batch.knows_prefill_lens


@pytest.mark.parametrize(
    ("query_lens", "longest", "num_decodes"),
    [
        ([4, 4, 1, 4], 4, 4),
        ([4, 4, 5], 4, 2),
        # The padding of a captured batch: requests without tokens.
        ([1, 1, 0, 0], 1, 4),
    ],
)
def test_drafts_and_padding_are_decodes(query_lens, longest, num_decodes):
    batch = make_batch(common(query_lens), longest)
    assert batch.num_decodes == num_decodes


def test_graphs_of_uniform_batches_are_declared():
    support = DuoMetadataBuilder.get_cudagraph_support(None, RETRIEVAL)
    assert support is AttentionCGSupport.UNIFORM_BATCH


@pytest.mark.parametrize(("drafts", "threshold"), [(None, 1), (3, 4), (20, 8)])
def test_workspace_is_reserved_for_the_longest_decodes(make_builder, drafts, threshold):
    builder = make_builder(RETRIEVAL, drafts=drafts)
    assert builder._decode_threshold == threshold
    assert make_builder.reserved == [(torch.device("cuda", 0), threshold, 4, 64)]


def test_capture_and_replay_share_their_buffers(make_builder):
    """What a graph points to is there again, with other contents, in each later step."""
    builder = make_builder(STREAMING)
    lens, table = DeviceLens(2), torch.zeros(2, 3, dtype=torch.int32)
    first = common([1, 1], seq_lens=lens)
    first.block_table_tensor = table
    captured = builder.build_for_cudagraph_capture(first)
    assert int(captured.table.orders[0, 0]) == 0
    order = SnapshotOrder(store=True, request_id="b", bin=0, num_tokens=32, blocks=(7, 8))
    second = common([1, 1], seq_lens=lens)
    second.block_table_tensor = table
    with step_orders([order], lambda: {"a": 0, "b": 1}):
        replayed = builder.build(0, second)
    assert replayed.table.orders is captured.table.orders
    assert replayed.table.block_table is captured.table.block_table
    assert replayed.table.copies == ()
    assert captured.table.orders[0, 0] == 1
    assert captured.table.orders[1, :6].tolist() == [1, 1, 32, 2, 7, 8]
    builder.build(0, common([1, 1], seq_lens=lens))
    assert captured.table.orders[0, 0] == 0


@pytest.mark.parametrize(
    ("spec", "prefix_caching"), [(RETRIEVAL, True), (STREAMING, False)], ids=["full", "no-caching"]
)
def test_no_buffer_where_nothing_is_copied(make_builder, spec, prefix_caching):
    assert make_builder(spec, prefix_caching=prefix_caching)._orders is None


def test_buffer_that_is_too_small_is_named():
    buffer = SnapshotBuffer.allocate(2, 3, torch.device("cpu"))
    copy = SnapshotCopy(False, 0, 16, torch.tensor([5]))
    assert buffer.fill([copy, copy])[0, 0] == 2
    with pytest.raises(RuntimeError, match="3 snapshot copies in one bin and the buffer holds 2"):
        buffer.fill([copy] * 3)


@pytest.mark.parametrize(
    ("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_compute_capability(capability, served):
    assert DuoAttentionBackend.supports_compute_capability(DeviceCapability(*capability)) is served


def test_workspace_grows_and_keeps_what_graphs_point_to(monkeypatch):
    monkeypatch.setattr(gpu, "_workspaces", {})
    device = torch.device("cpu")
    small, _ = gpu.workspace(device, 8, 64)
    assert gpu.workspace(device, 4, 64)[0].data_ptr() == small.data_ptr()
    large, lse = gpu.workspace(device, 100, 64)
    assert large.shape == (100, 64)
    assert lse.shape == (100,)
    assert np.shares_memory(gpu._workspaces[device][0].numpy(), small.numpy())


def test_workspace_does_not_grow_in_a_capture(monkeypatch):
    monkeypatch.setattr(gpu, "_workspaces", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured: reserve it before"):
        gpu.workspace(torch.device("cuda", 0), 8, 64)
