"""``Scheduler.update_draft_token_ids``: no step has more drafts than a ring has slots for.

Symptom: a proposer class (``custom_class``) that proposes more than ``num_speculative_tokens`` drafts
overwrites what the request's next tokens still see: wrong answers.
Why: vLLM takes what the class proposes as it is.
Condition: a group is of streaming heads, and a request gets more drafts than the server was started
for. The rest is dropped, which changes no answer, and a warning says so.
May go: once vLLM counts them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_duo.compat.pool_report import LAYOUT
from vllm_duo.logging import get_logger

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds

logger = get_logger(__name__)


def patch(module: ModuleType) -> None:
    """Wrap the method.

    Args:
        module: ``vllm.v1.core.sched.scheduler``.
    """
    original = module.Scheduler.update_draft_token_ids

    @wraps(original)
    def update_draft_token_ids(self: Any, draft_token_ids: DraftTokenIds) -> None:
        if getattr(self, LAYOUT) is not None:
            draft_token_ids = cut(draft_token_ids, self.num_spec_tokens)
        original(self, draft_token_ids)

    module.Scheduler.update_draft_token_ids = update_draft_token_ids


def cut(drafts: DraftTokenIds, most: int) -> DraftTokenIds:
    """The drafts of a step, at most so many a request.

    Args:
        drafts: of each request.
        most: slots for drafts in a ring.
    """
    longest = max(map(len, drafts.draft_token_ids), default=0)
    if longest <= most:
        return drafts
    _warn(longest, most)
    return replace(drafts, draft_token_ids=[each[:most] for each in drafts.draft_token_ids])


@cache
def _warn(longest: int, most: int) -> None:
    logger.warning(
        "a request got %d drafts, expected at most num_speculative_tokens = %d: the rest is dropped; "
        "raise num_speculative_tokens in --speculative-config or let the proposer make fewer",
        longest,
        most,
    )
