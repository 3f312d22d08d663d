"""FlashInfer for the retrieval heads of prefills: its plan, and numbers with a stand-in for it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.ops.flashinfer_stand_in import StandIn
from tests.ops.steps import make_step
from vllm_duo.ops.batch import Batch, PagedTable
from vllm_duo.ops.prefill import flashinfer
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill, Shape, plan_pages, workspace_bytes
from vllm_duo.ops.write_kv import reference

SHAPE = Shape(4, 2, 64, 16, torch.bfloat16, 0.125)

# Contexts, chunks and decodes of a step whose blocks have 16 tokens.
BATCHES = {
    "one token": ([0], [1], 0),
    "one chunk in a block": ([0], [9], 0),
    "ends with a block": ([16, 0], [16, 32], 0),
    "one token in the last block": ([15, 32], [2, 17], 0),
    "ragged": ([0, 70, 3, 131], [5, 20, 61, 1], 0),
    "decodes in front": ([90, 33, 16, 0], [1, 1, 7, 40], 2),
    "drafts in front": ([90, 33, 16], [4, 2, 7], 2),
    "a prefill of one token behind": ([90, 0, 47], [1, 12, 1], 1),
    "padding behind": ([20, 7, 0, 0], [1, 30, 0, 0], 1),
    "a request without tokens between": ([20, 7, 0, 3], [1, 30, 0, 4], 1),
}


@pytest.fixture(autouse=True)
def implementation():
    """None of the operators': no operator is called."""


class Wrappers:
    """Makes stand-ins and keeps them."""

    def __init__(self, kind=StandIn):
        self.kind = kind
        self.made = []

    def __call__(self, *arguments):
        self.made.append(self.kind(*arguments))
        return self.made[-1]


def make_batch(contexts, chunks, num_decodes):
    return Batch.from_host(
        np.cumsum([0, *chunks]), np.array(contexts) + np.array(chunks), num_decodes
    )


def make_table(requests, width=12, size=16, seed=0):
    ids = np.random.default_rng(seed).permutation(np.arange(1, requests * width + 1))
    return PagedTable(torch.from_numpy(ids.reshape(requests, width)).int(), size)


@pytest.mark.parametrize(("contexts", "chunks", "num_decodes"), BATCHES.values(), ids=BATCHES)
def test_plan_arrays(contexts, chunks, num_decodes):
    """Token by token: the blocks that hold a request's positions, in order."""
    batch, table = make_batch(contexts, chunks, num_decodes), make_table(len(chunks))
    pages = plan_pages(batch, table)
    queries, starts, last, lens, blocks = [0], [0], [], [], []
    for row in range(num_decodes, len(chunks)):
        if not chunks[row]:
            continue
        positions = range(contexts[row] + chunks[row])
        held = [table.block_table[row, p // 16].item() for p in positions]
        blocks += list(dict.fromkeys(held))
        queries.append(queries[-1] + chunks[row])
        starts.append(len(blocks))
        last.append(held.count(held[-1]))
        lens.append(len(held))
    assert pages.query_starts.tolist() == queries
    assert pages.page_starts.tolist() == starts
    assert pages.last_page_lens.tolist() == last
    assert pages.seq_lens.tolist() == lens
    assert pages.page_indices.tolist() == blocks


def test_worked_example():
    pages = plan_pages(make_batch([0, 28], [5, 20], 0), make_table(2))
    assert pages.query_starts.tolist() == [0, 5, 25]
    assert pages.page_starts.tolist() == [0, 1, 4]
    assert pages.last_page_lens.tolist() == [5, 16]


def test_plan_reads_a_table_with_longer_rows():
    """vLLM's table is a part of a larger buffer."""
    buffer = make_table(3, width=20).block_table
    batch = make_batch([3, 40, 70], [1, 20, 9], 1)
    part = plan_pages(batch, PagedTable(buffer[:, :6], 16))
    assert not buffer[:, :6].is_contiguous()
    assert part.page_indices.tolist() == buffer[1, :4].tolist() + buffer[2, :5].tolist()


def test_nothing_on_the_device_is_looked_at():
    """On PyTorch's device without memory every look is an error."""
    batch = make_batch([3, 40, 70], [1, 20, 9], 1)
    table = PagedTable(torch.empty(3, 9, dtype=torch.int32, device="meta"), 16)
    pages = plan_pages(batch, table)
    assert pages.page_starts.tolist() == [0, 4, 9]
    assert pages.page_indices.shape == (9,)
    assert pages.page_indices.is_meta
    for array in (pages.query_starts, pages.page_starts, pages.last_page_lens, pages.seq_lens):
        assert array.is_cpu


def test_plan_needs_exact_lengths():
    batch = dataclasses.replace(make_batch([3], [5], 0), knows_prefill_lens=False)
    with pytest.raises(RuntimeError, match=r'exact lengths .* set "retrieval_prefill" to'):
        plan_pages(batch, make_table(1))


def serve(step, wrappers):
    """Output of the kernel for a step whose tokens are in the retrieval cache."""
    reference.write_retrieval(step.k, step.v, step.heads, step.caches, step.batch)
    output = torch.full_like(step.q, torch.nan)
    kernel = FlashInferPrefill(wrappers)
    kernel(step.q, step.heads, step.caches, step.batch, step.scale, output)
    return output


def check(step, output):
    """Right to one rounding in the prefills' retrieval heads, and nothing else written."""
    exact, group = step.exact(), step.q.shape[1] // step.heads.num_kv_heads
    served = torch.zeros(step.q.shape[:2], dtype=torch.bool)
    prefills = slice(step.batch.num_decode_tokens, step.batch.num_tokens)
    served[prefills] = torch.tensor(step.mask).repeat_interleave(group)
    assert torch.equal(output.isnan().all(-1), ~served)
    assert torch.equal(output.isnan().any(-1), ~served)
    exact = exact[served[: len(exact)]]
    # The stand-in computes in float64, so one rounding is all that separates the two.
    bound = torch.finfo(output.dtype).eps / 2 * exact.abs().max()
    assert (output[served].double() - exact).abs().max() <= bound


@pytest.mark.parametrize("mask", [[True], [True, False, True, False], [False, True, True]])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("name", BATCHES)
def test_retrieval_heads(name, group, mask):
    contexts, chunks, num_decodes = BATCHES[name]
    step = make_step(
        mask, contexts, chunks, num_decodes=num_decodes, group=group, dtype=torch.bfloat16, seed=1
    )
    check(step, serve(step, Wrappers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 32), (128, 16), (256, 64)])
def test_shapes_and_another_scale(head_size, block_size, dtype):
    step = make_step(
        [True, False, True],
        [100, 0, 64],
        [30, 65, 1],
        num_decodes=0,
        group=7,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        seed=2,
    )
    step.scale = 0.3  # not head_size ** -0.5, which FlashInfer would take by itself
    check(step, serve(step, Wrappers()))


def test_caches_are_read_in_place():
    wrappers = Wrappers()
    step = make_step([True, False], [20], [30], num_decodes=0, dtype=torch.bfloat16)
    serve(step, wrappers)
    (wrapper,) = wrappers.made
    assert wrapper.layout == "HND"
    ((_, (keys, values), _),) = wrapper.runs
    cache = step.caches.retrieval
    assert keys.data_ptr() == cache.data_ptr()
    assert values.data_ptr() == cache.data_ptr() + 64 * cache.element_size()
    assert keys.stride() == values.stride() == cache.stride()


@pytest.mark.parametrize(
    ("contexts", "chunks", "mask"),
    [([30, 40], [1, 1], [True, False]), ([30], [20], [False, False])],
    ids=["decodes alone", "no retrieval head"],
)
def test_nothing_is_planned_where_nothing_is_to_do(contexts, chunks, mask):
    wrappers = Wrappers()
    num_decodes = None if max(chunks) == 1 else 0
    step = make_step(mask, contexts, chunks, num_decodes=num_decodes, dtype=torch.bfloat16)
    output = torch.full_like(step.q, torch.nan)
    kernel = FlashInferPrefill(wrappers)
    kernel(step.q, step.heads, step.caches, step.batch, step.scale, output)
    assert wrappers.made == []
    assert output.isnan().all()


def test_a_step_is_planned_once_for_all_layers_of_a_shape():
    wrappers = Wrappers()
    kernel = FlashInferPrefill(wrappers)
    layers = [
        make_step(mask, [50, 20], [1, 40], num_decodes=1, dtype=torch.bfloat16, seed=seed)
        for seed, mask in enumerate(
            [[True, False, True], [False, True, True], [True, False, False]]
        )
    ]
    # One table and one batch a step, as vLLM's layers have them.
    first = layers[0]
    for layer in layers:
        caches = dataclasses.replace(layer.caches, paged=first.caches.paged)
        layer.caches = dataclasses.replace(caches, retrieval=caches.retrieval.nan_to_num(0.0))

    def step(batch):
        for layer in layers:
            output = torch.empty_like(layer.q)
            kernel(layer.q, layer.heads, layer.caches, batch, layer.scale, output)

    step(first.batch)
    two, one = wrappers.made
    assert (two.shape, one.shape) == ((4, 2, 64, 16), (2, 1, 64, 16))
    assert [len(wrapper.plans) for wrapper in wrappers.made] == [1, 1]
    assert [len(wrapper.runs) for wrapper in wrappers.made] == [2, 1]
    assert two.workspace is one.workspace
    step(make_batch([10, 5], [1, 40], 1))
    assert len(wrappers.made) == 2
    assert [len(wrapper.plans) for wrapper in wrappers.made] == [2, 2]
    assert two.plans[1][0] == [0, 40]
    assert two.plans[1] != two.plans[0]


def test_another_table_of_the_same_step_is_planned_anew():
    """A wrapper holds one plan: it must never be used for another one's blocks."""
    wrappers = Wrappers()
    kernel = FlashInferPrefill(wrappers)
    batch = make_batch([20], [30], 0)
    tables = [make_table(1, seed=seed) for seed in (1, 2)]
    for table in (*tables, tables[0]):
        kernel._plan(SHAPE, batch, table)
    (wrapper,) = wrappers.made
    blocks = [plan[3] for plan in wrapper.plans]
    assert blocks[0] == blocks[2] != blocks[1]
    assert blocks[1] == tables[1].block_table[0, :4].tolist()


def test_a_plan_waits_until_the_last_one_has_left_the_host(monkeypatch):
    """FlashInfer writes every plan into one buffer, from which the device copies it."""
    log = []

    class Logged(StandIn):
        def plan(self, **arguments):
            log.append("plan")
            super().plan(**arguments)

    events = iter(
        SimpleNamespace(synchronize=lambda name=name: log.append(f"wait {name}")) for name in "abc"
    )

    def record(device):
        log.append("record")
        return next(events)

    monkeypatch.setattr(flashinfer, "_record", record)
    kernel = FlashInferPrefill(Wrappers(Logged))
    table = make_table(1)
    for context in (0, 5, 9):
        kernel._plan(SHAPE, make_batch([context], [7], 0), table)
    assert log == ["plan", "record", "wait a", "plan", "record", "wait b", "plan", "record"]


def test_a_failed_plan_is_not_taken_for_one():
    class Failing(StandIn):
        broken = True

        def plan(self, **arguments):
            if self.broken:
                raise RuntimeError("out of workspace")
            super().plan(**arguments)

    wrappers = Wrappers(Failing)
    kernel = FlashInferPrefill(wrappers)
    batch, table = make_batch([0], [7], 0), make_table(1)
    with pytest.raises(RuntimeError, match="out of workspace"):
        kernel._plan(SHAPE, batch, table)
    wrappers.made[0].broken = False
    assert kernel._plan(SHAPE, batch, table).plans


def test_nothing_is_planned_in_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        flashinfer._refuse_capture(torch.device("cuda", 0))
    flashinfer._refuse_capture(torch.device("cpu"))


def test_prepare_loads_the_kernel_and_leaves_no_plan_behind():
    wrappers = Wrappers()
    kernel = FlashInferPrefill(wrappers)
    device = torch.device("cpu")
    kernel.prepare(device, SHAPE)
    kernel.prepare(device, SHAPE)
    (wrapper,) = wrappers.made
    assert wrapper.plans[0] == ([0, 1], [0, 1], [1], [0])
    kernel._plan(SHAPE, make_batch([0], [1], 0), make_table(1))
    assert len(wrappers.made) == 1
    assert wrapper.plans[-1][3] != [0]


def test_prepare_names_what_flashinfer_lacks():
    class Failing(StandIn):
        def plan(self, **arguments):
            raise OSError("nvcc not found")

    kernel = FlashInferPrefill(Failing)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"head size 64 .*bfloat16.*OSError: nvcc not found.*set"
        ):
            kernel.prepare(torch.device("cpu"), SHAPE)


def test_workspace_holds_the_most_partial_results():
    assert workspace_bytes(132, dataclasses.replace(SHAPE, head_size=128)) == 128 << 20
    wide = dataclasses.replace(SHAPE, num_heads=32, head_size=256)
    # Two tiles of 128 rows a multiprocessor, 16 query heads a KV head, 257 float32 a row.
    assert workspace_bytes(188, wide) == 2 * 188 * 128 * 16 * 257 * 4 + 64


@pytest.mark.parametrize("change", ["dtype", "transposed"])
def test_caches_that_flashinfer_cannot_read_are_refused(change):
    step = make_step([True], [20], [30], num_decodes=0, dtype=torch.bfloat16)
    cache = step.caches.retrieval
    cache = (
        cache.half() if change == "dtype" else cache.transpose(2, 3).contiguous().transpose(2, 3)
    )
    caches = dataclasses.replace(step.caches, retrieval=cache)
    with pytest.raises(ValueError, match=r"FlashInfer reads caches .* set"):
        FlashInferPrefill(Wrappers())(
            step.q, step.heads, caches, step.batch, step.scale, torch.empty_like(step.q)
        )


# What a wrong caller could pass; the stand-in must show each.
MISTAKES = {
    "not causal": lambda a: a.pop("causal"),
    "default scale": lambda a: a.pop("sm_scale"),
    "queries of one more": lambda a: a.update(qo_indptr=a["qo_indptr"] + 1),
    "blocks in another order": lambda a: a.update(paged_kv_indices=a["paged_kv_indices"].flip(0)),
    "another request's blocks": lambda a: a.update(paged_kv_indices=a["paged_kv_indices"].roll(1)),
    "full last blocks": lambda a: (
        a["paged_kv_last_page_len"].fill_(a["page_size"]),
        a.pop("seq_lens"),
    ),
    "one token less": lambda a: (a["paged_kv_last_page_len"].sub_(1), a.pop("seq_lens")),
    "lengths that disagree": lambda a: a.update(seq_lens=a["seq_lens"] + 1),
    "chunks of other lengths": lambda a: a["qo_indptr"][1].add_(1),
    "heads of another layer": lambda a: a.update(num_kv_heads=1),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_stand_in_shows_a_wrong_plan(mistake):
    class Mistaken(StandIn):
        def plan(self, **arguments):
            mistake(arguments)
            super().plan(**arguments)

    step = make_step(
        [True, False, True], [40, 3, 77], [1, 20, 35], num_decodes=1, dtype=torch.bfloat16, seed=3
    )
    step.scale = 0.3
    check(step, serve(step, Wrappers()))
    with pytest.raises(AssertionError):
        check(step, serve(step, Wrappers(Mistaken)))


def test_the_stand_in_shows_keys_and_values_swapped():
    class Mistaken(StandIn):
        def run(self, q, paged_kv_cache, *, out):
            return super().run(q, paged_kv_cache[::-1], out=out)

    step = make_step([True, False], [40], [20], num_decodes=0, dtype=torch.bfloat16, seed=4)
    with pytest.raises(AssertionError):
        check(step, serve(step, Wrappers(Mistaken)))
