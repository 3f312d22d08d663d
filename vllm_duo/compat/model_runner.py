"""``VllmConfig._get_v2_model_runner_unsupported_features``: duo runs with vLLM's model runner V1.

Symptom: on CUDA every user of ``--attention-backend duo`` would have to set
``VLLM_USE_V2_MODEL_RUNNER=0``.
Why: where that variable is unset vLLM takes its runner V2 unless this method lists a feature that V2
lacks, and a registered backend has no say in it. With an entry vLLM takes V1, in every process, and
logs once: ``Model Runner V2 does not yet support the attention backend duo; using the V1 model runner
instead.``
Condition: the variable is unset and the selected backend is ours. ``VLLM_USE_V2_MODEL_RUNNER=1`` is
still refused (``support.py``); so is what needs V2 whatever the variable (HiSparse, watermarks).
May go: once duo runs with V2 (docs/gpu.md has what is missing), or a backend can name its runners.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING

from vllm_duo.server_plan import is_duo

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FEATURE = "the attention backend duo"
"""Our entry in vLLM's list, as its log line has it."""


def patch(module: ModuleType) -> None:
    """Wrap the method.

    Args:
        module: ``vllm.config.vllm``.
    """
    original = module.VllmConfig._get_v2_model_runner_unsupported_features

    @wraps(original)
    def _get_v2_model_runner_unsupported_features(self: VllmConfig) -> list[str]:
        unsupported: list[str] = original(self)
        # A runner that was asked for is support.py's to refuse, with the other reasons.
        if module.envs.VLLM_USE_V2_MODEL_RUNNER is None and is_duo(self):
            return [*unsupported, FEATURE]
        return unsupported

    module.VllmConfig._get_v2_model_runner_unsupported_features = (
        _get_v2_model_runner_unsupported_features
    )
