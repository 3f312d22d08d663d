"""What became of an engine's drafts, and a drafter that is right as often as it likes."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import ClassVar

VOCABULARY = 512
TEXTS = "VLLM_DUO_TEST_TEXTS"


class Scripted:
    """A ``custom_class`` drafter: some of the tokens that the model will answer, then wrong ones.

    ``texts`` are prompts with their answers; the drafts of any other text are wrong from the start.
    Workers in processes of their own read them from the JSON file that ``TEXTS`` names.
    """

    texts: ClassVar[list[list[int]]] = []

    def __init__(self, vllm_config):
        if TEXTS in os.environ:
            self.texts = json.loads(Path(os.environ[TEXTS]).read_text())
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.random = random.Random(0)

    def load_model(self, *args, **kwargs):
        """There is none."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None):
        return [
            self.draft(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist()) if sampled else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def draft(self, tokens):
        known = next((text for text in self.texts if text[: len(tokens)] == tokens), tokens)
        right = known[len(tokens) :][: self.random.randrange(self.most + 1)]
        after = known[len(tokens) + len(right) :]
        # Whatever the next right token is, the next draft is not.
        wrong = [((after[0] if after else 0) + 1) % VOCABULARY] * (self.most - len(right))
        return right + wrong


class Outcomes:
    """Counts what a scheduler makes of its drafts.

    Attributes:
        accepted: steps by how many drafts were accepted.
        rejected: rejected drafts by their position.
    """

    def __init__(self, scheduler, monkeypatch):
        self.accepted, self.rejected = Counter(), Counter()
        own = scheduler.make_spec_decoding_stats

        def record(stats, num_draft_tokens, num_accepted_tokens, *args, request_id, **kwargs):
            self.accepted[num_accepted_tokens] += 1
            # The scheduler has taken the rejected ones back by now.
            first = scheduler.requests[request_id].num_computed_tokens
            count = num_draft_tokens - num_accepted_tokens
            self.rejected.update(range(first, first + count))
            return own(
                stats, num_draft_tokens, num_accepted_tokens, *args, request_id=request_id, **kwargs
            )

        monkeypatch.setattr(scheduler, "make_spec_decoding_stats", record)
