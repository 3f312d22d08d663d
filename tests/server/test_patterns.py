"""What a server with a bad head pattern or a bad setting of duo's answers."""

from __future__ import annotations

import pytest

from tests.server.configs import PATTERN

BAD_TABLES = {
    "too many layers": (PATTERN + "1.0\t1.0\n", "head pattern has 3 layers, the model has 2"),
    "too few heads": ("1.0\n0.0\n", "has 1 KV heads per layer, the model has 2"),
    "not a number at all": ("0.0\t1.0\n1.0\thalf\n", "line 2, column 2: expected a number"),
    "NaN": ("0.0\tnan\n1.0\t0.0\n", r"line 1, column 2: expected a value in .*, got nan"),
    "too high": ("0.0\t1.0\n1.02\t0.0\n", r"line 2, column 1: .*\[-0.01, 1.01\], got 1.02"),
    "too low": ("0.0\t1.0\n1.0\t-0.02\n", r"line 2, column 2: .*\[-0.01, 1.01\], got -0.02"),
    "ragged": ("0.0\t1.0\n1.0\n", "line 2: expected 2 values as in line 1, found 1"),
    "empty": ("", "expected one line per layer, found an empty file"),
}
BAD_SETTINGS = [
    ({"sparsty": 0.5}, r"sparsty: unknown key \(did you mean sparsity\?\), got 0.5: allowed keys"),
    ({"sparsity": 0.5, "threshold": 0.5}, "expected at most one of them, got sparsity=0.5 and"),
    ({"sparsity": 1.5}, "sparsity: expected a number from 0 to 1, got 1.5"),
    ({"sparsity": float("nan")}, "sparsity: expected a number from 0 to 1, got nan"),
    ({"sink_size": -1}, "sink_size: expected a whole number of tokens from 0 to .*, got -1"),
    ({"recent_size": 0}, "recent_size: expected a whole number of tokens from 1 to .*, got 0"),
    ({"recent_size": "256"}, "recent_size: expected a whole number of tokens .*, got '256'"),
    ({"recent_size": 0, "top": 1}, "(?s)recent_size: expected.*top: unknown key"),
    ({"pattern": "no-such-thing"}, "expected a folder or the name of a shipped pattern"),
    (0.5, "expected an object, got 0.5"),
]


@pytest.mark.parametrize(("table", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table(serve, tmp_path, table, message):
    with pytest.raises(ValueError, match=message) as caught:
        serve(table=table)
    assert str(tmp_path / "duo_pattern") in str(caught.value)


def test_none_found(serve, tmp_path):
    with pytest.raises(ValueError, match="no head pattern for model") as caught:
        serve(table=None)
    assert "make one with `vllm-duo identify MODEL" in str(caught.value)


@pytest.mark.parametrize(("duo", "message"), BAD_SETTINGS)
def test_bad_setting(serve, duo, message):
    with pytest.raises(ValueError, match=message):
        serve(duo=duo)


@pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
def test_settings_without_the_backend(serve, backend):
    with pytest.raises(ValueError, match=r'has a "duo" section.*add --attention-backend'):
        serve(duo={}, attention_backend=backend)
