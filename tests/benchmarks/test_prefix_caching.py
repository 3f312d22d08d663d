"""What the benchmark of prefix hits judges."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.prefix_caching import report


def part(kind, pool, hits, differing=()):
    scenarios = [
        {"name": f"scenario {n}", "prompt_tokens": 1000, "hit_tokens": h, "peak_held_share": 0.5}
        for n, h in enumerate(hits)
    ]
    return {
        "kind": kind,
        "pool": pool,
        "capacity": {"blocks": 9, "pool_bytes": 2**20, "tokens_that_fit": 1000},
        "scenarios": scenarios,
        "prompt_tokens": 1000 * len(hits),
        "hit_tokens": sum(hits),
        "compared_answers": 4,
        "differing_answers": list(differing),
    }


def judge(pool, stock, duo, *, smoke=False, differing=()):
    """Whether it is good, and what is printed."""
    settings = {"block_size": 32, "seed": 0, "smoke": smoke}
    parts = [part("stock", pool, stock), part("duo", pool, duo, differing)]
    printed = Console(file=io.StringIO(), width=120)
    return report({"settings": settings, "parts": parts}, printed), printed.file.getvalue()


@pytest.mark.parametrize(
    ("pool", "duo", "good"),
    [
        ("full", [90, 180], True),
        ("full", [89, 200], False),
        ("third", [91, 210], True),
        ("third", [100, 200], False),
    ],
)
def test_nine_tenths_everywhere_and_more_in_the_small_pool(pool, duo, good):
    assert judge(pool, [100, 200], duo)[0] is good


def test_hits_of_a_quick_look_are_shown_and_not_judged():
    good, printed = judge("full", [100], [80], smoke=True)
    assert good
    assert "0.800" in printed
    assert "hits too few to be judged" in printed


@pytest.mark.parametrize("smoke", [True, False])
def test_an_answer_that_a_cold_cache_does_not_give_is_a_failure(smoke):
    assert not judge("full", [100], [100], smoke=smoke, differing=["a"])[0]
