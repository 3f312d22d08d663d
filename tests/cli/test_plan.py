"""``vllm-duo plan``: what it prints, how fast, without what, and what bad input gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.planning.models import write_model
from vllm_duo.planning.schema import Plan

PATTERN = "Meta-Llama-3.1-8B-Instruct"


@pytest.fixture
def model(tmp_path) -> str:
    return write_model(tmp_path, 32, 32, 8, 4096)


def test_json_follows_the_schema(run, model):
    code, out, _ = run(
        *("plan", model, "--pattern", PATTERN, "--sparsity", "0.5", "--max-model-len", "32768"),
        *("--kv-cache-gib", "40", "--json"),
    )
    plan = Plan.model_validate_json(out)
    assert code == 0
    assert plan.concurrent_requests == 5119 / 259
    design = "concurrent_requests tokens_that_fit bytes_per_token constant_bytes_per_request waste"
    assert {*design.split(), "by_length"} <= json.loads(out)["full"].keys()


def test_tables(run, model):
    code, out, stderr = run("plan", model, "--pattern", PATTERN, "--kv-cache-gib", "40")
    assert (code, stderr) == (0, "")
    assert "50.0% of the heads stream" in " ".join(out.split())
    assert "653,317" in out
    assert "1.99 x" in out


def test_every_flag_counts(run, model):
    _, out, _ = run(
        *("plan", model, "--pattern", PATTERN, "--threshold", "0.9", "--sink-size", "10"),
        *("--recent-size", "20", "--tp", "2", "--dtype", "float32", "--block-size", "16"),
        *("--pp", "3"),
        *("--max-model-len", "auto", "--kv-cache-gib", "0.5", "--lengths", "64,128", "--json"),
        *("--num-speculative-tokens", "3"),
    )
    plan = Plan.model_validate_json(out)
    found = plan.settings
    assert (found.cut, found.cut_value) == ("threshold", 0.9)
    assert (found.sink_size, found.recent_size, found.block_size) == (10, 20, 16)
    assert (found.tensor_parallel_size, found.pipeline_parallel_size) == (2, 3)
    assert found.dtype == "float32"
    assert found.kv_cache_bytes == 2**29
    assert (found.num_speculative_tokens, found.draft_model) == (3, None)
    assert found.max_model_len == plan.longest_request_tokens
    assert [length.tokens for length in plan.by_length][:2] == [64, 128]


def test_a_draft_model_is_planned_with(run, model):
    arguments = ["plan", model, "--pattern", PATTERN, "--kv-cache-gib", "4", "--json"]
    drafts = ["--num-speculative-tokens", "3", "--draft-model", model]
    plain, drafting = (Plan.model_validate_json(run(*arguments, *more)[1]) for more in ([], drafts))
    assert drafting.settings.draft_model == model
    # Half of the heads retrieve, and all of as many again.
    assert drafting.bytes_per_token == 3 * plain.bytes_per_token
    own = Plan.model_validate_json(run(*arguments, *drafts, "--draft-kv-cache-dtype", "fp8")[1])
    assert own.settings.draft_kv_cache_dtype == "fp8"
    assert own.bytes_per_token == 2 * plain.bytes_per_token


def test_balance_is_a_setting_of_the_server(run, model):
    arguments = ["plan", model, "--pattern", PATTERN, "--kv-cache-gib", "4", "--tp", "8", "--json"]
    plain, balanced = (
        Plan.model_validate_json(run(*arguments, *more)[1]) for more in ([], ["--balance"])
    )
    assert (plain.settings.balance, balanced.settings.balance) == (False, True)
    assert plain.settings.mask_hash != balanced.settings.mask_hash
    assert balanced.concurrent_requests > 1.2 * plain.concurrent_requests
    assert plain.tensor_parallel_loss > 0.2 > 0.01 > balanced.tensor_parallel_loss
    assert '"balance": true streams the same share' in plain.notes[-1]
    assert "balance" not in balanced.notes[-1]


def test_no_torch_no_vllm_and_under_two_seconds(model):
    code = (
        "import sys\nfrom vllm_duo.cli.main import main\n"
        "try: main()\nfinally: print(sorted({'torch', 'vllm', 'transformers', 'matplotlib'} "
        "& set(sys.modules)), file=sys.stderr)"
    )
    command = ["plan", model, "--pattern", PATTERN, "--kv-cache-gib", "40"]

    def cpu_seconds() -> float:
        spent = os.times()
        return spent.children_user + spent.children_system

    before, start = cpu_seconds(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    # Processor time: the machine that runs this may be busy with other things.
    spent = cpu_seconds() - before
    assert done.stderr.strip() == "[]"
    assert spent < 2.0, (spent, time.monotonic() - start)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(run, model, tmp_path, suffix):
    file = tmp_path / f"plan.{suffix}"
    code, *_ = run(
        *("plan", model, "--pattern", PATTERN, "--kv-cache-gib", "4", "--plot", str(file))
    )
    start = file.read_bytes()[:100]
    assert code == 0
    assert start.startswith(b"\x89PNG") or b"<?xml" in start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache-gib", "0"], "--kv-cache-gib: expected more than 0, got 0.0"),
        (["--kv-cache-gib", "nan"], "--kv-cache-gib: expected more than 0, got nan"),
        (["--max-model-len", "32k"], "expected a whole number of tokens or auto, got '32k'"),
        (["--max-model-len", "0"], "--max-model-len: expected more than 0, got 0"),
        (["--block-size", "0"], "--block-size: expected more than 0, got 0"),
        (
            ["--num-speculative-tokens", "-1"],
            "--num-speculative-tokens: expected 0 or more, got -1",
        ),
        (["--draft-model", "x"], "--draft-model: expected --num-speculative-tokens of 1 or more"),
        (
            ["--draft-kv-cache-dtype", "fp8"],
            "--draft-kv-cache-dtype: expected --draft-model with it",
        ),
        (["--tp", "3"], "8 KV heads cannot be split over 3 ranks"),
        (["--tp", "0"], "--tp: expected more than 0, got 0"),
        (["--pp", "0"], "--pp: expected more than 0, got 0"),
        (["--pp", "33"], "--pipeline-parallel-size: expected 1 to 32, the model's layers, got 33"),
        (["--dtype", "int8"], "--dtype: expected one of auto, half, float, float16"),
        (["--kv-cache-dtype", "int3"], "--kv-cache-dtype: expected one of auto"),
        (["--lengths", "4k"], "--lengths: expected numbers of tokens as in 4096,32768, got '4k'"),
        (["--sparsity", "1.5"], "sparsity: expected a number from 0 to 1, got 1.5"),
        (["--sparsity", "0.5", "--threshold", "0.5"], "expected at most one of them"),
        (["--pattern", "no-such-thing"], "expected a folder or the name of a shipped pattern"),
        (["--pattern", "Llama-2-7B-32K-Instruct"], "32 KV heads per layer, the model has 8"),
        (["--plot", "plan.doc"], "expected a name that ends in .png, .svg, .pdf"),
        (["--plot", "no-such-folder/plan.png"], "expected an existing folder"),
    ],
)
def test_bad_input(run, model, arguments, message):
    given = ["--pattern", PATTERN, "--kv-cache-gib", "40", *arguments]
    code, out, stderr = run("plan", model, *given)
    assert (code, out) == (2, "")
    assert message in stderr
    assert stderr.startswith("Error: ")


def test_no_pattern_is_told_as_the_server_does(run, model):
    code, _, stderr = run("plan", model, "--kv-cache-gib", "40")
    assert code == 2
    assert "no head pattern for model" in stderr
    assert "nothing falls back to a full cache silently" in stderr


def test_model_that_the_server_refuses(run, tmp_path):
    model = write_model(tmp_path, 32, 32, 8, 4096, attn_logit_softcapping=50.0)
    code, _, stderr = run("plan", model, "--pattern", PATTERN, "--kv-cache-gib", "40")
    assert code == 2
    assert "does not support this server:" in stderr
    assert "- soft-capped attention logits" in stderr
