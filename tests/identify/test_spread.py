"""Forward-only methods over Ray: the same result as in one process."""

from __future__ import annotations

import pytest

from tests.identify.conftest import tiny_settings
from vllm_duo.identify.run import identify

pytest.importorskip("ray")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["retrieval-score", "induction", "on-the-fly"])
def test_ray_gives_the_result_of_one_process(model_folder, tmp_path, method):
    settings = tiny_settings(method=method, samples=6)
    one = identify(str(model_folder), settings, tmp_path / "one")
    many = identify(str(model_folder), settings, tmp_path / "many", ray="local")
    table = "full_attention_heads.tsv"
    assert (one.folder / table).read_bytes() == (many.folder / table).read_bytes()


def test_no_cluster_at_the_address_is_told(model_folder, tmp_path):
    settings = tiny_settings(method="on-the-fly", samples=2)
    with pytest.raises(
        RuntimeError, match=r"--ray 127\.0\.0\.1:1: expected 'local' or the address"
    ):
        identify(str(model_folder), settings, tmp_path, ray="127.0.0.1:1")
