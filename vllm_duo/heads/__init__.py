"""Head patterns: which KV heads need the whole context (retrieval) and which only stream."""

from vllm_duo.heads.discovery import find_pattern
from vllm_duo.heads.pattern import HeadPattern, HeadSelection

__all__ = ["HeadPattern", "HeadSelection", "find_pattern"]
