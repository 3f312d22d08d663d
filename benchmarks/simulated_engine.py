"""vLLM's scheduler and KV cache managers at full model shapes, without weights, tensors or workers.

The scheduler, its managers, the block pool and the start-up arithmetic are vLLM's own, in the order
of ``vllm/v1/engine/core.py``; the model is faked: it "samples" given or made-up tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.simulated_config import SHAPES, Kind, ModelShape, cache_specs, make_config
from vllm_duo import plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from vllm_duo.kv_cache.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did.

    Attributes:
        scheduled: tokens computed, by request.
        hits: tokens found in the prefix cache, by request that was admitted in this step.
        preempted: requests that lost their blocks.
        finished: requests that got their last token.
    """

    scheduled: dict[str, int]
    hits: dict[str, int]
    preempted: set[str]
    finished: set[str]


@dataclass(eq=False)
class SimulatedEngine:
    """A scheduler and a model that only pretends; made by ``make_engine``.

    Attributes:
        scheduler: vLLM's.
        layout: what duo planned; None for stock.
        block_hasher: hashes a request's blocks; None without prefix caching.
        outputs: the tokens to sample, by request; others get made-up ones.
    """

    scheduler: Scheduler
    layout: Layout | None
    block_hasher: Callable[[Request], Any] | None
    outputs: dict[str, Sequence[int]] = field(default_factory=dict)

    @property
    def manager(self) -> KVCacheManager:
        """The KV cache manager of vLLM."""
        return self.scheduler.kv_cache_manager

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds; cached ones count as free."""
        return int(self.manager.block_pool.get_num_free_blocks())

    def add(
        self,
        request_id: str,
        prompt: list[int],
        *,
        outputs: Sequence[int] | None = None,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        sampling: dict[str, Any] | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            request_id: its name.
            prompt: token ids.
            outputs: the tokens that the model is to sample; None for made-up ones.
            max_tokens: tokens to sample; default: as many as ``outputs``, else 16.
            cache_salt: requests of different salts share no prefix.
            priority: lower goes first, under the priority policy.
            sampling: more sampling parameters.
        """
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        if outputs is not None:
            self.outputs[request_id] = outputs
        if max_tokens is None:
            max_tokens = 16 if outputs is None else len(outputs)
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, **(sampling or {})
            ),
            pooling_params=None,
            cache_salt=cache_salt,
            priority=priority,
            block_hasher=self.block_hasher,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> Step:
        """Schedule, pretend to compute, and let the scheduler take the tokens."""
        scheduled = self.scheduler.schedule()
        self.scheduler.update_from_output(scheduled, self.sample(scheduled))
        # Finished requests are reported to the workers, and here, with the next step.
        return Step(
            scheduled=dict(scheduled.num_scheduled_tokens),
            hits={new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs},
            preempted=set(scheduled.preempted_req_ids or ()),
            finished=set(self.scheduler.finished_req_ids),
        )

    def run(self, max_steps: int = 1_000_000) -> list[Step]:
        """Step until every request has finished.

        Raises:
            RuntimeError: there is work, but a step computed nothing.
        """
        steps: list[Step] = []
        while self.scheduler.get_num_unfinished_requests() and len(steps) < max_steps:
            steps.append(self.step())
            if not steps[-1].scheduled:
                raise RuntimeError(
                    f"{self.scheduler.get_num_unfinished_requests()} requests are unfinished, but "
                    "no token was scheduled: the pool cannot hold the next request"
                )
        return steps

    def prefilled(self) -> int:
        """Resident requests whose whole prompt has been computed."""
        return sum(
            request.num_computed_tokens >= request.num_prompt_tokens
            for request in self.scheduler.running
        )

    def sample(self, scheduled: SchedulerOutput) -> Any:
        """The model's answer, for every request whose known tokens are all computed.

        A token, and one more for each draft that is what the model sampled before it.
        """
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(scheduled.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests[name]
            answer: list[int] = []
            if request.num_computed_tokens >= request.num_tokens:
                answer.append(self.token(name, request.num_output_tokens))
                for draft in scheduled.scheduled_spec_decode_tokens.get(name, ()):
                    if draft != answer[-1]:
                        break
                    answer.append(self.token(name, request.num_output_tokens + len(answer)))
            sampled.append(answer)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def token(self, name: str, index: int) -> int:
        """What the model samples as a request's token of this number, whatever came before."""
        given = self.outputs.get(name, ())
        return given[index] if index < len(given) else (index * 31 + 7) % 251


def make_engine(
    kind: Kind,
    shape: str | ModelShape,
    *,
    pool_bytes: int,
    sparsity: float = 0.5,
    pattern: str | None = None,
    block_size: int = 128,
    max_model_len: int = 33_792,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8_192,
    prefix_caching: bool = False,
    scheduling_policy: str = "fcfs",
    hash_function: Callable[[Any], bytes] | None = None,
    duo: dict[str, Any] | None = None,
    async_scheduling: bool = False,
    num_speculative_tokens: int = 0,
    eagle_head: ModelShape | None = None,
    cache_events: bool = False,
) -> SimulatedEngine:
    """Make an engine as vLLM's engine core does, from a config alone.

    Args:
        kind: with duo's attention backend or with vLLM's own.
        shape: the model, a key of ``SHAPES`` or given.
        pool_bytes: KV pool; nothing is allocated.
        sparsity: share of the KV heads that stream.
        pattern: folder or name of a pattern; default: the shape's.
        block_size: tokens of a block.
        max_model_len: longest request, in tokens.
        max_num_seqs: most running requests.
        max_num_batched_tokens: most tokens of a step.
        prefix_caching: whether finished blocks may be reused.
        scheduling_policy: "fcfs" or "priority".
        hash_function: of prefix caching; default: vLLM's default, SHA-256.
        duo: more settings of duo's section, such as ``sink_size``.
        async_scheduling: a step is scheduled before the one ahead of it has ended, as on GPUs.
        num_speculative_tokens: drafts of a step at most; whoever steps the engine has to make them.
        eagle_head: makes them instead of n-grams, so its keys and values share the pool.
        cache_events: whether the scheduler hands KV cache events to its ``kv_event_publisher``.

    Raises:
        ValueError: the pool cannot hold one request of ``max_model_len`` tokens (vLLM's message).
    """
    plugin.register()
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.structured_output import StructuredOutputManager

    shape = SHAPES[shape] if isinstance(shape, str) else shape
    section = {"pattern": pattern or shape.pattern, "sparsity": sparsity, **(duo or {})}
    config = make_config(
        shape,
        section if kind == "duo" else None,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        scheduling_policy=scheduling_policy,
        num_speculative_tokens=num_speculative_tokens,
        eagle_head=eagle_head,
        kv_events_config={"enable_kv_cache_events": True, "publisher": "null"}
        if cache_events
        else None,
    )
    config.cache_config.enable_prefix_caching = prefix_caching
    # vLLM's CPU platform switches it off, but the scheduler is the same everywhere.
    config.scheduler_config.async_scheduling = async_scheduling
    register_all_kvcache_specs(config)
    specs, layout = cache_specs(config, kind)
    kv_cache, scheduler_size = _kv_cache_config(config, specs, pool_bytes)
    hash_function = hash_function or sha256
    kv_cache_utils.init_none_hash(hash_function)
    scheduler = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=scheduler_size,
        hash_block_size=kv_cache.hash_block_size,
        log_stats=False,
    )
    hasher = kv_cache_utils.get_request_block_hasher(kv_cache.hash_block_size, hash_function)
    return SimulatedEngine(scheduler, layout, hasher if prefix_caching else None)


def _kv_cache_config(
    config: VllmConfig, specs: dict[str, Any], pool_bytes: int
) -> tuple[KVCacheConfig, int]:
    """What the engine core makes of a worker's specs, and the scheduler's block size in tokens.

    Args:
        config: the server's; takes the number of blocks and the block size.
        specs: of each attention layer.
        pool_bytes: KV pool.
    """
    from vllm.v1.core import kv_cache_utils

    configs = kv_cache_utils.get_kv_cache_configs(config, [specs], [pool_bytes])
    kv_cache = kv_cache_utils.generate_scheduler_kv_cache_config(configs)
    config.cache_config.num_gpu_blocks = kv_cache.num_blocks
    config.cache_config.block_size = min(
        group.kv_cache_spec.block_size
        for group in kv_cache.kv_cache_groups
        if group.kv_cache_spec.prefix_cacheable
    )
    scheduler_size, hash_size = kv_cache_utils.resolve_kv_cache_block_sizes(kv_cache, config)
    kv_cache.hash_block_size = hash_size
    return kv_cache, scheduler_size
