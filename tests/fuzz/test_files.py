"""Settings, pattern folders and config.json of all kinds: understood, or refused in a sentence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.cases import fuzz, json_values, numbers, objects, words
from tests.planning.models import write_model
from tests.server.configs import cache_scheme
from vllm_duo import HeadPattern
from vllm_duo.heads.folder import CONFIG_NAME, TSV_NAME
from vllm_duo.planning.plan import PlanRequest, plan_memory
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render
from vllm_duo.server_plan import make_plan

LAYERS, HEADS = 4, 2
REFUSALS = (ValueError, NotImplementedError)
shares = st.floats(0, 1)
sizes = st.integers(0, 400)


@pytest.fixture(scope="module")
def pattern():
    with tempfile.TemporaryDirectory() as folder:
        HeadPattern(np.linspace(0, 1, LAYERS * HEADS).reshape(LAYERS, HEADS)).save(folder)
        yield folder


def assert_told(error: Exception, *named: str) -> None:
    """A sentence of some length that names the place, and no Python error dressed up as one."""
    text = str(error)
    assert len(text) > 20
    assert any(name in text for name in named), text
    for leak in (
        "Traceback",
        "object has no attribute",
        "unsupported operand",
        "unexpected keyword",
    ):
        assert leak not in text


@pytest.mark.usefixtures("pattern")
class TestSettings:
    @fuzz()
    @given(st.data())
    def test_plan_or_a_sentence(self, pattern, data):
        known = {
            "pattern": st.just(pattern),
            "sparsity": shares,
            "threshold": shares,
            "sink_size": sizes,
            "recent_size": sizes,
            "snapshot_interval": sizes,
            "retrieval_prefill": st.sampled_from(["auto", "triton"]),
            "streaming_cache_dtype": st.sampled_from(["same", "model"]),
            "untested_gpu": st.booleans(),
            "untested_model_runner": st.booleans(),
        }
        section = st.one_of(objects(known), json_values)
        config = data.draw(st.one_of(st.builds(lambda s: {"duo": s}, section), json_values))
        try:
            plan = make_plan(config, "nobody/knows-me", LAYERS, HEADS)
        except REFUSALS as error:
            assert_told(error, "--additional-config", "pattern", "sparsity", "threshold")
            return
        resolved = plan.resolved
        assert resolved.selection.retrieval.shape == (LAYERS, HEADS)
        assert resolved.recent_size >= 1
        given_section = config["duo"]
        for key in ("sink_size", "recent_size"):
            if given_section.get(key) is not None:
                assert getattr(resolved, key) == given_section[key]
        if given_section.get("sparsity") is not None:
            assert abs(resolved.selection.sparsity - given_section["sparsity"]) <= 1 / 8 + 1e-9


odd_cells = st.sampled_from(["", " ", "x", "nan", "1e999", "1_0"])
rows = st.lists(
    st.lists(
        st.one_of(
            shares.map(str),
            numbers.map(str),
            odd_cells,
        ),
        min_size=HEADS,
        max_size=HEADS + 1,
    ).map("\t".join),
    min_size=LAYERS - 1,
    max_size=LAYERS + 1,
)
tables = st.one_of(rows.map("\n".join).map(str.encode), st.binary(max_size=40))
good_table = b"0.5\t1.0\n" * LAYERS
configs = st.one_of(
    objects(
        {
            "sink_size": sizes,
            "recent_size": sizes,
            "deploy_sink_size": sizes,
            "deploy_recent_size": sizes,
            "sparsity": shares,
        }
    ).map(json.dumps),
    json_values.map(json.dumps),
    st.text(max_size=20),
)


class TestPatternFolders:
    @fuzz()
    @given(table=st.one_of(tables, st.just(good_table)), config=st.one_of(st.none(), configs))
    @example(table=good_table, config="null")
    @example(table=b"\xff\xfe", config=None)
    def test_loaded_or_a_sentence(self, table, config):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / TSV_NAME).write_bytes(table)
            if config is not None:
                (folder / CONFIG_NAME).write_text(config, encoding="utf-8", errors="surrogatepass")
            try:
                plan = make_plan({"duo": {"pattern": name}}, "nobody/knows-me", LAYERS, HEADS)
            except REFUSALS as error:
                assert_told(error, TSV_NAME, CONFIG_NAME, "head pattern", "deploy_")
                return
            values = plan.pattern.values
            assert values.shape == (LAYERS, HEADS)
            assert np.isfinite(values).all()
            plan.pattern.save(folder / "again")
            assert (HeadPattern.load(folder / "again").values == values).all()


model_keys = {
    "architectures": st.just(["LlamaForCausalLM"]),
    "model_type": st.sampled_from(["llama", "qwen3", "gemma2", "gpt_oss", "mamba", "whisper"]),
    "num_hidden_layers": st.just(LAYERS),
    "num_attention_heads": st.just(4),
    "num_key_value_heads": st.just(HEADS),
    "hidden_size": st.just(256),
    "head_dim": st.just(64),
    "max_position_embeddings": st.integers(1, 2**20),
    "torch_dtype": st.sampled_from(["float32", "bfloat16"]),
    "sliding_window": st.one_of(st.none(), st.integers(0, 4096)),
    "layer_types": st.just(["full_attention"] * LAYERS),
    "rope_scaling": st.sampled_from([None, {"rope_type": "yarn"}, {"type": "llama3"}]),
    "quantization_config": st.sampled_from(
        [
            {"kv_cache_scheme": None},
            {"quant_method": "compressed-tensors", "kv_cache_scheme": {"strategy": "tensor"}},
            cache_scheme()["quantization_config"],
            {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}},
        ]
    ),
    "kv_lora_rank": st.none(),
    "text_config": st.none(),
    "attn_config": st.just({"alibi": False}),
}


class TestModels:
    @fuzz()
    @given(st.data())
    def test_planned_or_a_sentence(self, pattern, data):
        changed = data.draw(objects(model_keys))
        dropped = data.draw(st.sets(st.sampled_from(sorted(model_keys)), max_size=3))
        with tempfile.TemporaryDirectory() as name:
            folder = write_model(Path(name) / "m", LAYERS, 4, HEADS, 256)
            file = Path(folder) / CONFIG_NAME
            config = json.loads(file.read_text()) | changed
            file.write_text(json.dumps({k: v for k, v in config.items() if k not in dropped}))
            request = PlanRequest(
                model=str(folder),
                duo={"pattern": pattern},
                kv_cache_bytes=2**30,
                max_model_len=4096,
            )
            try:
                plan = plan_memory(request)
            except REFUSALS as error:
                assert_told(error, CONFIG_NAME, "duo does not support", "head pattern", "--")
                return
        assert plan.concurrent_requests > 0
        assert plan.full.concurrent_requests > 0


class TestResults:
    @fuzz(0.3)
    @given(
        data=st.one_of(
            objects({"schema_version": st.just(1), "kind": st.just("eval")}), json_values
        )
    )
    def test_a_report_or_a_sentence(self, data):
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "results.json"
            file.write_text(json.dumps(data))
            with pytest.raises(ValueError, match=r"results\.json"):
                render(load_results([file]))


names = st.one_of(words, st.sampled_from(["~nobody-of-that-name", "~", "a/b/c", "x" * 300]))


class TestNames:
    @fuzz(0.3)
    @given(name=names)
    def test_no_such_pattern(self, name):
        with pytest.raises(ValueError, match="pattern"):
            make_plan({"duo": {"pattern": f"{name}-"}}, "nobody/knows-me", LAYERS, HEADS)

    @fuzz(0.3)
    @given(name=names)
    def test_no_such_model(self, pattern, name):
        with pytest.raises(ValueError, match="model"):
            plan_memory(
                PlanRequest(model=f"{name}-", duo={"pattern": pattern}, kv_cache_bytes=2**30)
            )
