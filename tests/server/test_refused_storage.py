"""Servers in which the storage connector is refused, and what is said of its settings."""

from __future__ import annotations

import pytest

from tests.server.configs import reasons_of
from vllm_duo.kv_transfer import CONNECTOR, MODULE
from vllm_duo.kv_transfer.settings import StorageSettings

MULTIPLE = (
    "several ranks or replicas (--tensor-parallel-size, --data-parallel-size): not tested yet, set "
    "them to 1"
)


@pytest.fixture
def transfer(tmp_path):
    """``--kv-transfer-config``, with changes."""

    def make(extra=None, **changes):
        settings = {"path": str(tmp_path / "kv"), "max_bytes": 1 << 20} | (extra or {})
        config = {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings,
        }
        return {"kv_transfer_config": config | changes, "load_format": "auto"}

    return make


def test_it_is_served(serve, transfer, tmp_path):
    serve(**transfer())
    assert (tmp_path / "kv").is_dir()


@pytest.mark.refused("prefixes in files, on several ranks")
def test_ranks(serve, transfer):
    reasons = reasons_of(serve, tensor_parallel_size=2, **transfer())
    assert reasons == [f"{CONNECTOR}: {MULTIPLE}"]


@pytest.mark.refused("prefixes in files, with drafts")
def test_drafts(serve, transfer):
    drafts = {"method": "ngram", "num_speculative_tokens": 2}
    reasons = reasons_of(serve, speculative_config=drafts, **transfer())
    assert reasons == [
        f"{CONNECTOR}: speculative decoding: not tested yet, remove --speculative-config"
    ]


def test_layers_that_are_left_out(serve, transfer):
    cache = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}
    assert reasons_of(serve, **cache, **transfer()) == [
        f"{CONNECTOR}: --kv-cache-dtype-skip-layers: not tested yet, leave it out"
    ]


@pytest.mark.refused("prefixes in files, on a GPU")
def test_gpus(serve, transfer, platform):
    config = serve(**transfer())
    platform("cuda")
    from vllm_duo.kv_transfer.refusals import connector_refusals

    assert list(connector_refusals(config)) == [
        f"{CONNECTOR}: it has never run on a GPU: remove --kv-transfer-config"
    ]


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"enable_prefix_caching": False}, "--no-enable-prefix-caching: "),
        ({"prefix_caching_hash_algo": "xxhash"}, "--prefix-caching-hash-algo xxhash: "),
        ({"load_format": "dummy"}, "--load-format dummy: "),
    ],
    ids=str,
)
def test_settings(settings, start, serve, transfer):
    (reason,) = reasons_of(serve, **(transfer() | settings))
    assert reason.startswith(f"{CONNECTOR}: {start}")


def test_roles(serve, transfer):
    (reason,) = reasons_of(serve, **transfer(kv_role="kv_producer"))
    assert reason == (
        f"{CONNECTOR}: kv_role kv_producer: every server stores and loads, set kv_both"
    )


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (
            {},
            "path: expected the absolute path of a folder, got None; max_bytes: expected a whole ",
        ),
        ({"path": "kv", "max_bytes": 1}, "path: expected the absolute path of a folder, got 'kv'"),
        ({"path": "/kv", "max_bytes": 0}, "max_bytes: expected a whole number of bytes, got 0"),
        (
            {"path": "/kv", "max_bytes": True},
            "max_bytes: expected a whole number of bytes, got True",
        ),
        (
            {"path": "/kv", "max_bytes": 1, "size": 2},
            "size: unknown key, expected path and max_byt",
        ),
    ],
    ids=str,
)
def test_what_settings_must_be(extra, problem):
    with pytest.raises(ValueError, match="^" + problem):
        StorageSettings.read(extra)


def test_a_folder_that_cannot_be_made(serve, transfer, tmp_path):
    (tmp_path / "file").write_text("")
    (reason,) = reasons_of(serve, **transfer({"path": str(tmp_path / "file" / "kv")}))
    assert reason.startswith(f"{CONNECTOR}: kv_connector_extra_config: path: ")
    assert "cannot be made" in reason
