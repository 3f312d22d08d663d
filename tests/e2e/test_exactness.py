"""vLLM with duo against the oracle: every greedy token, every reported log-probability."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from tests.e2e.engine import MAX_NEW_TOKENS, engine, write_pattern
from tests.models.random_models import LAYERS, VOCABULARY, Shape
from tests.oracle import Oracle, assert_right

pytestmark = pytest.mark.engine

# Layer by layer, what the KV heads are; cut to the model's number of KV heads.
PATTERNS = {
    "mixed": ([1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]),
    "exclusive": ([0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]),
    "uneven": ([1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]),
    "streaming": ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    "retrieval": ([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]),
}
SIZES = {"unaligned": (20, 75), "aligned": (16, 64), "no_sink": (0, 33), "one": (7, 1)}
LENGTHS = (1, 19, 96, 333, 900)
LONGER = (*LENGTHS, 2000)


@dataclass(frozen=True)
class Case:
    """One engine."""

    family: str
    group: int
    head_size: int
    pattern: str
    sizes: str
    chunk: int
    block_size: int

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))


FACTORS = (
    ("llama", "mistral", "qwen2", "qwen3"),
    (1, 2, 4, 8),
    (32, 64, 128),
    tuple(PATTERNS),
    tuple(SIZES),
    (100, 2048),
    (16, 128),
)


def pairwise(factors, limit, seed=0):
    """Cases that cover as many pairs of factor values as ``limit`` cases can (greedy, seeded)."""
    rng = random.Random(seed)
    everything = [Case(*values) for values in itertools.product(*factors)]

    def pairs(case):
        return set(itertools.combinations(enumerate(vars(case).values()), 2))

    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing and len(chosen) < limit:
        sample = rng.sample(everything, 400)
        best = max(sample, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


PAIRWISE = pairwise(FACTORS, 8)


def features_of(case):
    """What a case shows, as docs/compatibility.md calls it."""
    grouped = "multi-head attention" if case.group == 1 else "grouped-query attention"
    shape = (case.family.capitalize(), grouped, f"head size {case.head_size}")
    return pytest.mark.feature(*shape, "float32", "eager mode", "log-probabilities", "x86-64 CPUs")


def prompts_of(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(n)] for n in lengths]


def mask_of(name, kv_heads):
    return [[bool(value) for value in row[:kv_heads]] for row in PATTERNS[name]]


def run_case(case, checkpoint, tmp_path, lengths):
    shape = Shape(case.family, case.group, case.head_size, kv_heads=2 if case.group == 8 else 4)
    model = checkpoint(shape)
    mask = mask_of(case.pattern, shape.kv_heads)
    assert len(mask) == LAYERS
    sink_size, recent_size = SIZES[case.sizes]
    prompts = prompts_of(lengths)
    with engine(
        model,
        write_pattern(tmp_path / "pattern", mask),
        sink_size=sink_size,
        recent_size=recent_size,
        block_size=case.block_size,
        max_num_batched_tokens=case.chunk,
    ) as running:
        answers = running.generate(prompts)
    oracle = Oracle(model, mask, sink_size, recent_size)
    assert_right(oracle, prompts, answers, MAX_NEW_TOKENS)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=features_of(case)) for case in PAIRWISE]
)
def test_served_tokens_are_the_oracles(case, checkpoint, tmp_path):
    run_case(case, checkpoint, tmp_path, LENGTHS)


def product():
    """Every family, group, head size and kind of layer; the other factors take turns."""
    kinds = ("mixed", "streaming", "retrieval")
    shapes = itertools.product(*FACTORS[:3], kinds)
    turns = itertools.cycle(itertools.product(*FACTORS[4:]))
    return [Case(*shape, *turn) for shape, turn in zip(shapes, turns, strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("case", product(), ids=str)
def test_served_tokens_are_the_oracles_for_every_combination(case, checkpoint, tmp_path):
    run_case(case, checkpoint, tmp_path, LONGER)
