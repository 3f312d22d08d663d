"""Bytes of quantised caches."""

from __future__ import annotations

import pytest
import torch

from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.kv_cache.shape import KVShape
from vllm_duo.ops.quantise import dequantise, quantise
from vllm_duo.ops.quantise.reference import _rotate
from vllm_duo.support import CACHE_DTYPES, UNQUANTISED_CACHE_DTYPES


def test_what_is_served_has_a_format():
    assert set(CACHE_DTYPES) == {*UNQUANTISED_CACHE_DTYPES, *FORMATS}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_size", [16, 80, 128])
def test_rows_have_the_bytes_that_the_layout_counts(name, head_size):
    form = FORMATS[name]
    rows = quantise(torch.randn(3, 2, head_size), torch.randn(3, 2, head_size), form)
    assert rows.shape == (3, 2, form.row_bytes(head_size))
    (shape,) = KVShape.split(
        [[True, False]],
        head_size=head_size,
        dtype_bytes=4,
        row_bytes=form.row_bytes(head_size),
    )
    assert shape.token_bytes == form.row_bytes(head_size)


@pytest.mark.parametrize(
    ("name", "worst"),
    [
        # Half a step of the mantissa, relative to each number.
        ("fp8", 2**-4),
        ("fp8_e5m2", 2**-3),
        ("fp8_per_token_head", 2**-4),
        # Half a step, relative to the row's greatest.
        ("int8_per_token_head", 0.5 / 127),
    ],
)
def test_error_bounds(name, worst):
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(500, 64, generator=generator)
    value = torch.randn(500, 64, generator=generator)
    form = FORMATS[name]
    kept = dequantise(quantise(key, value, form), form)
    for exact, found in zip((key, value), kept, strict=True):
        error = (found - exact).abs()
        if form.number == "int8":
            allowed = worst * exact.abs().amax(-1, keepdim=True).expand_as(exact)
        else:
            # Below the least normal number the step is constant; own scales lie below 1 / 100 here.
            allowed = (worst * exact.abs()).clamp(min=2.0**-10)
        assert (error <= allowed * 1.001).all()


def test_error_bound_of_four_bits():
    """Half a step of each rotated number; rotating back keeps the root of the sum of squares."""
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(500, 64, generator=generator)
    form = FORMATS["int4_per_token_head"]
    kept, _ = dequantise(quantise(key, key, form), form)
    step = _rotate(key).abs().amax(-1) / 7
    assert ((kept - key).norm(dim=-1) <= 1.001 * 64**0.5 * step / 2).all()


def test_rotation_keeps_products():
    generator = torch.Generator().manual_seed(1)
    for head_size in (16, 80, 96, 128, 256):
        a, b = torch.randn(2, 50, head_size, generator=generator, dtype=torch.float64)
        assert torch.allclose((a * b).sum(-1), (_rotate(a) * _rotate(b)).sum(-1))
        assert torch.allclose(_rotate(_rotate(a), back=True), a)


def test_rotation_saves_what_outliers_would_cost():
    """One channel a hundred times the others, as keys have them: rotated, four bits keep the others."""
    generator = torch.Generator().manual_seed(2)
    key = torch.randn(200, 128, generator=generator)
    key[:, 5] = 100
    form = FORMATS["int4_per_token_head"]
    kept, _ = dequantise(quantise(key, key, form), form)
    others = torch.arange(128) != 5
    plain = (key / (100 / 7)).round() * (100 / 7)
    error = (kept - key)[:, others].square().mean().sqrt()
    assert error < (plain - key)[:, others].square().mean().sqrt()
