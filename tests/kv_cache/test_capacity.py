"""Requests that vLLM's own scheduler keeps in a pool at once, at the shapes of real models."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.capacity import Count, Settings, count

TOKENS = 4096
STOCK_REQUESTS = 100

PREFIX_CACHING = (False, True)

CASES = (("llama-3.1-8b", 0.5), ("llama-2-7b", 0.75))


def settings_of(
    shape: str, sparsity: float, block_size: int, prefix_caching: bool, chunk_tokens: int = 0
) -> Settings:
    return Settings(
        shape=shape,
        sparsity=sparsity,
        block_size=block_size,
        tokens=TOKENS,
        stock_requests=STOCK_REQUESTS,
        prefix_caching=prefix_caching,
        chunk_tokens=chunk_tokens,
    )


counted = cache(count)


@pytest.fixture(params=PREFIX_CACHING, ids=lambda on: f"prefix caching {'on' if on else 'off'}")
def prefix_caching(request) -> bool:
    return request.param


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("shape", "sparsity"), CASES)
class TestOneStep:
    def duo(self, shape, sparsity, block_size, prefix_caching) -> Count:
        return counted(settings_of(shape, sparsity, block_size, prefix_caching), "duo")

    def test_as_many_requests_as_the_layout_promises(
        self, shape, sparsity, block_size, prefix_caching
    ):
        duo = self.duo(shape, sparsity, block_size, prefix_caching)
        assert duo.resident == duo.planned

    def test_blocks_in_use_are_the_planned_ones(self, shape, sparsity, block_size, prefix_caching):
        duo = self.duo(shape, sparsity, block_size, prefix_caching)
        assert duo.held_blocks == duo.resident * duo.blocks_per_request
        # What is left does not hold another request; the null block is never handed out.
        left = duo.pool_blocks - 1 - duo.held_blocks
        assert 0 <= left < duo.blocks_per_request

    def test_every_request_finishes_and_returns_its_blocks(
        self, shape, sparsity, block_size, prefix_caching
    ):
        assert self.duo(shape, sparsity, block_size, prefix_caching).leaked_blocks == 0


@pytest.mark.parametrize(
    ("shape", "sparsity", "factor"), [("llama-3.1-8b", 0.5, 1.94), ("llama-2-7b", 0.75, 3.8)]
)
def test_requests_of_32k_tokens_against_stock(shape, sparsity, factor, prefix_caching):
    settings = Settings(
        shape=shape, sparsity=sparsity, block_size=128, prefix_caching=prefix_caching
    )
    duo = count(settings, "duo")
    assert duo.resident == duo.planned
    assert factor <= duo.resident / settings.stock_requests < 1 / (1 - sparsity)


@pytest.mark.parametrize("block_size", [16, 128])
def test_stock_holds_what_its_pool_was_made_for(block_size, prefix_caching):
    stock = counted(settings_of("llama-3.1-8b", 0.5, block_size, prefix_caching), "stock")
    assert stock.resident == STOCK_REQUESTS
    assert stock.held_blocks == stock.pool_blocks - 1


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("kind", ["duo", "stock"])
def test_requests_that_come_in_chunks_fit_as_planned(kind, block_size, prefix_caching):
    settings = settings_of("llama-3.1-8b", 0.5, block_size, prefix_caching, chunk_tokens=3 * TOKENS)
    result = counted(settings, kind)
    assert result.as_planned
    assert result.leaked_blocks == 0
