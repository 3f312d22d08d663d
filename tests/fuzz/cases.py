"""How many cases, and JSON of all kinds."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SUITE_CASES, SOAK_CASES = 1_000, 10_000
CASES = int(os.environ.get("VLLM_DUO_FUZZ_CASES", str(SUITE_CASES)))


def fuzz(share: float = 1.0):
    """Hypothesis settings: a share of the cases, the same ones in every run of the suite.

    A soak, with more cases, draws new ones each time.
    """
    return settings(
        max_examples=max(round(CASES * share), 1),
        deadline=None,
        derandomize=CASES <= SUITE_CASES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


numbers = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([0, 1, 2**31, 2**63, -(2**63) - 1, 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
)
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "auto", "..", "/", "\x00", "a" * 5000, "NaN", "None", "\ud7ff", "💡"]),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=8,
)


def objects(known, values=json_values):
    """Objects with some of the known keys, of plausible or of any value, and sometimes others.

    Args:
        known: key to a strategy of plausible values.
        values: of any kind.
    """
    either = {key: st.one_of(plausible, values) for key, plausible in known.items()}
    return st.builds(
        lambda some, more: more | some,
        st.fixed_dictionaries({}, optional=either),
        st.one_of(st.just({}), st.dictionaries(words, values, max_size=2)),
    )
