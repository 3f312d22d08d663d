"""Models with sliding-window layers of their own: the oracle's tokens, and stock vLLM's."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.e2e.engine import MAX_NEW_TOKENS, SETTINGS, answer_of, engine, ranks_of, write_pattern
from tests.e2e.half import errors, rms, rounded
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.e2e.test_quantised_cache import ERROR, MATTERS
from tests.models.random_models import LAYERS, Shape
from tests.oracle import Oracle, assert_right
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.planning.plan import PlanRequest, plan_memory

pytestmark = pytest.mark.engine

SINK, RECENT = 20, 75
SHOWN = {"gemma3": ("Gemma 3",), "gpt_oss": ("gpt-oss", "learned attention sinks")}
"""What docs/compatibility.md calls a family."""
BOTH_WAYS = [pytest.param(True, id="cached"), pytest.param(False, id="not cached")]
RETRIEVAL = [[True] * 4] * LAYERS


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        family: "mistral": every layer slides; "gemma3" and "gpt_oss": the first and the last of three.
        window: tokens.
        chunk: tokens of a step at most.
        block_size: tokens of a retrieval block.
        group: query heads of a KV head.
        pattern: what the heads of the other layers are; rows of layers that slide are not read.
    """

    family: str
    window: int
    chunk: int
    block_size: int
    group: int = 2
    pattern: str = "uneven"

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))

    @property
    def shape(self) -> Shape:
        return Shape(self.family, self.group, 32, kv_heads=4, window=self.window)

    @property
    def mask(self):
        """In the layer that does not slide two heads of four stream."""
        return RETRIEVAL if self.pattern == "retrieval" else mask_of("mixed", 4)

    def lengths(self) -> tuple[int, ...]:
        """Prompts that end before, at and after the window's edge, and long ones."""
        edge = self.window
        return tuple(n for n in (1, edge - 1, edge, edge + 1, 2 * edge + 7, 700) if 0 < n < 1500)


CASES = [
    Case("mistral", window=50, chunk=100, block_size=16),
    Case("gemma3", window=33, chunk=100, block_size=16, group=4),
    Case("gemma3", window=200, chunk=2048, block_size=128, group=1),
    Case("gpt_oss", window=50, chunk=100, block_size=16, group=4),
]
LEARNED = CASES[-1]
MORE_CASES = [
    Case("mistral", window=1, chunk=100, block_size=16),
    Case("mistral", window=128, chunk=64, block_size=16, group=8),
    Case("mistral", window=333, chunk=2048, block_size=128),
    Case("gemma3", window=1, chunk=64, block_size=16),
    Case("gemma3", window=64, chunk=64, block_size=16, pattern="retrieval"),
    Case("gemma3", window=900, chunk=512, block_size=16, group=8),
    Case("gpt_oss", window=1, chunk=64, block_size=16, group=1),
    Case("gpt_oss", window=128, chunk=2048, block_size=128, group=8),
    Case("gpt_oss", window=900, chunk=512, block_size=16),
    Case("gpt_oss", window=64, chunk=64, block_size=16, pattern="retrieval"),
]


def serving(case: Case, checkpoint, tmp_path, **settings):
    """An engine with duo; a model whose layers all slide is served without any setting."""
    model = checkpoint(case.shape)
    settings = {"max_num_batched_tokens": case.chunk, "block_size": case.block_size} | settings
    if case.family == "mistral":
        duo = {"attention_backend": "duo", "additional_config": {"duo": {**SETTINGS}}}
        return engine(model, **duo, **settings)
    pattern = write_pattern(tmp_path / "pattern", case.mask)
    return engine(model, pattern, sink_size=SINK, recent_size=RECENT, **settings)


def oracle_of(case: Case, checkpoint) -> Oracle:
    windows = case.shape.windows
    return Oracle(checkpoint(case.shape), case.mask, SINK, RECENT, windows=windows)


def ask(running, prompts, max_tokens=MAX_NEW_TOKENS):
    """Answers, and how many tokens of each prompt were prefix hits."""
    outputs = running.llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        running.sampling(max_tokens),
        use_tqdm=False,
    )
    return [answer_of(output) for output in outputs], [o.num_cached_tokens for o in outputs]


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_the_oracles_window_is_transformers_own(family, checkpoint):
    """An off-by-one in both would else go unseen. float32 twice: 1e-3, as ``mismatches`` has it."""
    case = Case(family, window=33, chunk=0, block_size=0, pattern="retrieval")
    (tokens,) = prompts_of([120], seed=3)
    own = AutoModelForCausalLM.from_pretrained(checkpoint(case.shape), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = own(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    found = oracle_of(case, checkpoint).logprobs(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    wider = Oracle(
        checkpoint(case.shape), RETRIEVAL, 0, 1, windows=[w and w + 1 for w in case.shape.windows]
    )
    assert (wider.logprobs(tokens) - expected).abs().max() > 1e-2


def test_the_oracle_sees_the_sinks_of_other_heads(checkpoint, tmp_path):
    """Whoever leaves them out, or gives a head another one's, would be found."""
    model = checkpoint(LEARNED.shape)
    (tokens,) = prompts_of([120], seed=3)
    expected = oracle_of(LEARNED, checkpoint).logprobs(tokens)
    weights = load_file(model / "model.safetensors")
    learned = {name: weight for name, weight in weights.items() if name.endswith(".sinks")}
    assert len(learned) == LAYERS
    for name, change in {"none": lambda x: x - 1e4, "others": lambda x: x.roll(1)}.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(model / "config.json", folder)
        changed = weights | {key: change(weight) for key, weight in learned.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        other = Oracle(folder, LEARNED.mask, SINK, RECENT, windows=LEARNED.shape.windows)
        assert (other.logprobs(tokens) - expected).abs().max() > 0.1


def run(case, checkpoint, tmp_path, caching):
    """Ask twice; with prefix caching the second time resumes at snapshots of the rings."""
    prompts = prompts_of(case.lengths())
    with serving(case, checkpoint, tmp_path, enable_prefix_caching=caching) as running:
        first, _ = ask(running, prompts)
        second, hits = ask(running, prompts)
    oracle = oracle_of(case, checkpoint)
    assert_right(oracle, prompts * 2, first + second)
    whole = [(len(prompt) - 1) // case.block_size * case.block_size for prompt in prompts]
    assert hits == (whole if caching else [0] * len(prompts))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=pytest.mark.feature(*SHOWN.get(case.family, ())))
        for case in CASES
    ],
)
@pytest.mark.feature("sliding-window layers", "prefix caching")
def test_served_tokens_are_the_oracles(case, checkpoint, tmp_path):
    run(case, checkpoint, tmp_path, True)


@pytest.mark.slow
@pytest.mark.parametrize("caching", BOTH_WAYS)
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
def test_served_tokens_are_the_oracles_for_every_case(case, caching, checkpoint, tmp_path):
    run(case, checkpoint, tmp_path, caching)


@pytest.mark.parametrize(
    ("family", "caching"),
    [
        ("gemma3", True),
        ("gpt_oss", True),
        pytest.param("gpt_oss", False, marks=pytest.mark.slow),
        pytest.param("gemma3", False, marks=pytest.mark.slow),
        pytest.param("mistral", True, marks=pytest.mark.slow),
        pytest.param("mistral", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.feature("sliding-window layers", "preemption")
def test_a_small_pool_preempts_and_the_tokens_are_stock_vllms(
    family, caching, checkpoint, tmp_path
):
    """Every other head is a retrieval head; what a request holds is what the plan says."""
    case = Case(family, window=50, chunk=64, block_size=16, pattern="retrieval")
    prompts = prompts_of([90, 130, 49, 200, 171, 8, 150, 230], seed=5)
    with engine(checkpoint(case.shape), block_size=16) as stock:
        expected = [answer.tokens for answer in stock.generate(prompts)]
    duo = {} if family == "mistral" else {"pattern": str(tmp_path / "pattern"), "threshold": 0.5}
    if duo:
        write_pattern(tmp_path / "pattern", RETRIEVAL)
    plan = plan_memory(
        PlanRequest(
            model=str(checkpoint(case.shape)),
            duo=duo,
            kv_cache_bytes=1 << 30,
            max_model_len=320,
            dtype="float32",
            block_size=16,
        )
    )
    (longest,) = (each for each in plan.by_length if each.tokens == 320)
    settings = {"attention_backend": "duo", "additional_config": {"duo": duo | SETTINGS}}
    with engine(
        checkpoint(case.shape),
        **settings,
        enable_prefix_caching=caching,
        max_model_len=320,
        max_num_batched_tokens=case.chunk,
        block_size=16,
        num_gpu_blocks_override=1 + 2 * longest.blocks,
    ) as running:
        scheduler, preempted, held = running.core.scheduler, [], []
        preempt, schedule = scheduler._preempt_request, scheduler.schedule

        def preempting(request, *args, **kwargs):
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        def watched(*args, **kwargs):
            output = schedule(*args, **kwargs)
            running.check_pool(idle=False)
            ids = [running.manager.get_block_ids(r.request_id) for r in scheduler.running]
            held.extend(sum(map(len, tables)) for tables in ids)
            return output

        scheduler._preempt_request, scheduler.schedule = preempting, watched
        answers = running.generate(prompts)
    # A model that keeps a window alone has requests that grow to one size and no further.
    assert preempted or family == "mistral"
    assert max(held) <= longest.blocks
    assert [answer.tokens for answer in answers] == expected


HYBRID = Case("gemma3", window=50, chunk=100, block_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
@pytest.mark.feature("sliding-window layers", "tensor parallelism")
def test_two_ranks_give_the_same_tokens(family, checkpoint, tmp_path):
    """Rank 0 has one retrieval head of the layer that does not slide, rank 1 has one as well."""
    case = replace(HYBRID, family=family)
    prompts = prompts_of(case.lengths())
    with serving(case, checkpoint, tmp_path, **ranks_of(2)) as running:
        answers, _ = ask(running, prompts)
        again, hits = ask(running, prompts)
    assert_right(oracle_of(case, checkpoint), prompts * 2, answers + again)
    assert max(hits) > 600


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
@pytest.mark.feature("sliding-window layers", "speculative decoding, n-gram")
def test_drafts_change_no_token(family, checkpoint, tmp_path):
    """Every ring has slots for drafts, the window's too."""
    case = replace(HYBRID, family=family)
    # Text that repeats itself, so that there are n-grams to find.
    prompts = [prompt * 3 for prompt in prompts_of([10, 40, 90])]
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}
    with serving(case, checkpoint, tmp_path, speculative_config=drafts) as running:
        spans = [
            manager.allocator.span
            for manager in running.manager.coordinator.single_type_managers
            if isinstance(manager, RingManager)
        ]
        answers, _ = ask(running, prompts)
        again, _ = ask(running, prompts)
    assert {span.draft_size for span in spans} == {4}
    assert 50 in {span.recent_size for span in spans}
    assert_right(oracle_of(case, checkpoint), prompts * 2, answers + again)


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["int8_per_token_head", "int4_per_token_head"])
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
@pytest.mark.feature("sliding-window layers")
def test_quantised_caches(family, cache_dtype, checkpoint, tmp_path):
    """As ``test_quantised_cache.py`` has it, whose bounds these are: the oracle keeps what is kept."""
    case = replace(HYBRID, family=family)
    prompts, form = prompts_of([150, 80], seed=43), FORMATS[cache_dtype]
    with serving(case, checkpoint, tmp_path, kv_cache_dtype=cache_dtype) as running:
        answers, _ = ask(running, prompts)
    oracle = oracle_of(case, checkpoint)
    unquantised = rms(errors(oracle, prompts, answers))
    oracle.form = form
    error = rms(errors(oracle, prompts, answers))
    assert error <= ERROR
    assert unquantised > MATTERS * error, "what is kept must matter"


@pytest.mark.slow
def test_bfloat16_is_as_near_to_the_oracle_as_stock(checkpoint, tmp_path):
    """Sinks in bfloat16 too. As ``test_half_precision.py`` has it, whose bounds these are."""
    model = rounded(checkpoint(LEARNED.shape), torch.bfloat16, tmp_path / "model")
    prompts, windows = prompts_of([1, 40, 130, 300], seed=40), LEARNED.shape.windows
    settings = {"dtype": "bfloat16", "block_size": 128, "max_num_batched_tokens": 128}
    with engine(model, **settings) as stock:
        expected = stock.generate(prompts)
    pattern = write_pattern(tmp_path / "pattern", LEARNED.mask)
    with engine(model, pattern, sink_size=SINK, recent_size=RECENT, **settings) as running:
        answers = running.generate(prompts)
    full = Oracle(model, RETRIEVAL, SINK, RECENT, windows=windows)
    streaming = Oracle(model, LEARNED.mask, SINK, RECENT, windows=windows)
    allowed = 2 * rms(errors(full, prompts, expected))
    assert rms(errors(streaming, prompts, answers)) <= allowed
    assert rms(errors(full, prompts, answers)) > allowed, "the mask must matter"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
@pytest.mark.feature("sliding-window layers", "torch.compile")
def test_compiled_model_gives_the_same_tokens(family, checkpoint, tmp_path):
    case = replace(HYBRID, family=family)
    prompts = prompts_of(case.lengths())
    with serving(case, checkpoint, tmp_path, enforce_eager=False) as running:
        answers, _ = ask(running, prompts)
    assert_right(oracle_of(case, checkpoint), prompts, answers)
