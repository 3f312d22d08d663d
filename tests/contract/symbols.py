"""Every vLLM symbol that the package leans on, by the file that does."""

from __future__ import annotations

from importlib.util import find_spec

from tests.contract.checks import Check, beside, is_, members, names, sets, takes
from vllm_duo.compat.kv_cache_groups import module_name

REGISTRY = "vllm.v1.attention.backends.registry"
BACKEND = "vllm.v1.attention.backend"
INTERFACE = "vllm.v1.kv_cache_interface"
UTILS = "vllm.v1.core.kv_cache_utils"
GROUPING = module_name()
# Who calls the function that we replace.
GROUPS_CALLER = (
    "get_kv_cache_configs"
    if GROUPING == UTILS
    else "DefaultKVCacheConfigBuilder.get_kv_cache_groups"
)
COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
MANAGERS = "vllm.v1.core.single_type_kv_cache_manager"
FLASH = "vllm.v1.attention.backends.fa_utils"
RUNNER = "vllm.v1.worker.gpu_model_runner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
DRAFTERS = "vllm.v1.spec_decode"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base"

# 0.33 has no first Ray executor any more.
HAS_RAY_V1 = find_spec("vllm.v1.executor.ray_executor") is not None
RAY_EXECUTORS = ["ray_executor_v2 import RayExecutorV2"]
RAY_V1: list[tuple[str, Check | None]] = []
if HAS_RAY_V1:
    RAY_EXECUTORS.append("ray_executor import RayDistributedExecutor")
    RAY_V1 = [
        (
            "vllm.v1.executor.ray_executor:RayDistributedExecutor._init_workers_ray",
            takes("placement_group"),
        ),
        (
            "vllm.v1.executor.ray_executor:RayDistributedExecutor._init_executor",
            names("initialize_ray_cluster(self.parallel_config)", "self._init_workers_ray("),
        ),
    ]

# By our file: symbol (module:attribute) and check; None asks only that it exists.
SYMBOLS: dict[str, list[tuple[str, Check | None]]] = {
    "plugin.py": [
        ("vllm:__version__", None),
        ("vllm.plugins:DEFAULT_PLUGINS_GROUP", is_("vllm.general_plugins")),
        (f"{REGISTRY}:AttentionBackendEnum", members("CUSTOM", "_member_map_")),
        (f"{REGISTRY}:register_backend", takes("backend", "class_path")),
    ],
    "server_plan.py": [
        (f"{REGISTRY}:AttentionBackendEnum.get_path", None),
        (f"{REGISTRY}:AttentionBackendEnum.is_overridden", None),
        (
            "vllm.config:VllmConfig",
            members("attention_config", "additional_config", "model_config"),
        ),
        ("vllm.config:AttentionConfig", members("backend", "backend_per_kind")),
        ("vllm.config:ModelConfig", members("model", "dtype", "hf_text_config", "max_model_len")),
        (
            "vllm.config:ModelConfig",
            sets("original_max_model_len", "model_arch_config", by="__post_init__"),
        ),
        ("vllm.config:ModelConfig.get_sliding_window", None),
        (
            "vllm.config.model_arch:ModelArchitectureConfig",
            members("derived_max_model_len_and_key"),
        ),
        ("vllm.config:ModelConfig.get_total_num_hidden_layers", None),
        ("vllm.config:ModelConfig.get_total_num_kv_heads", None),
    ],
    "drafts.py": [
        (
            "vllm.config:SpeculativeConfig",
            members("method", "num_speculative_tokens", "draft_model_config", "kv_cache_dtype"),
        ),
        (
            f"{DRAFTERS}.draft_model:DraftModelProposer._get_model",
            names('set_model_tag("draft_model")', 'prefix="draft_model"'),
        ),
        (
            f"{DRAFTERS}.llm_base_proposer:SpecDecodeBaseProposer._get_model",
            names('set_model_tag("eagle_head")'),
        ),
        (
            f"{DRAFTERS}.llm_base_proposer:SpecDecodeBaseProposer._create_draft_vllm_config",
            names("cache_dtype=spec_cfg.kv_cache_dtype"),
        ),
        ("vllm.compilation.backends:model_tag", is_("backbone")),
        # Both are made once the model's layers are there, and share the context that these are in.
        ("vllm.config:CompilationConfig", members("static_forward_context")),
        (f"{RUNNER}:GPUModelRunner.load_model", names("self.drafter.load_model(self.model)")),
        (
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
            names("self.drafter.load_model(self.model)"),
        ),
        # An EAGLE head's layers are numbered on from the model's.
        (
            "vllm.model_executor.models.llama_eagle:EagleLlamaForCausalLM.__init__",
            names("start_layer_id=target_layer_num"),
        ),
        (
            "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.__init__",
            names("start_layer_id=target_layer_num"),
        ),
        ("vllm.config:VllmConfig", members("num_lookahead_tokens")),
    ],
    "support.py": [
        ("vllm.config:SchedulerConfig", members("async_scheduling")),
        ("vllm.config:SpeculativeConfig", members("parallel_drafting", "kv_cache_dtype")),
        ("vllm.platforms.interface:Platform", members("is_cpu", "device_name", "ray_device_key")),
        ("vllm.config:ModelConfig", sets("runner_type", by="__post_init__")),
        (
            "vllm.config:ModelConfig",
            members("hf_text_config", "hf_config", "use_mla", "is_encoder_decoder"),
        ),
        (
            "vllm.config:ModelConfig",
            members("is_hybrid", "is_attention_free", "is_mm_prefix_lm"),
        ),
        (
            "vllm.config:ModelConfig",
            members(
                "is_multimodal_model", "supports_multimodal_inputs", "using_transformers_backend"
            ),
        ),
        ("vllm.config:ModelConfig.get_sliding_window", None),
        ("vllm.config:ModelConfig.get_head_size", None),
        ("vllm.config:ParallelConfig", members("tensor_parallel_size", "pipeline_parallel_size")),
        ("vllm.config:ParallelConfig", members("data_parallel_size", "use_ubatching")),
        ("vllm.config:ParallelConfig", members("data_parallel_backend", "world_size")),
        ("vllm.config:ParallelConfig", members("nnodes", "distributed_executor_backend")),
        (
            "vllm.config:ParallelConfig",
            members("decode_context_parallel_size", "prefill_context_parallel_size"),
        ),
        (
            "vllm.config:CacheConfig",
            members("cache_dtype", "kv_sharing_fast_prefill"),
        ),
        ("vllm.config:CacheConfig", members("kv_offloading_size")),
        ("vllm.config:AttentionConfig", members("use_non_causal")),
        ("vllm.config:ModelConfig", members("uses_alibi", "has_noops", "rswa_window")),
        ("vllm.config:ModelConfig", members("is_diffusion")),
        ("vllm.config:VllmConfig", members("use_v2_model_runner")),
        ("vllm.config:VllmConfig", members("speculative_config", "kv_transfer_config")),
        ("vllm.config:VllmConfig", members("parallel_config", "scheduler_config")),
        ("vllm.config:VllmConfig", members("kv_events_config", "cache_config")),
        ("vllm.config:KVEventsConfig", members("enable_kv_cache_events")),
        ("vllm.config:SchedulerConfig", members("disable_hybrid_kv_cache_manager")),
    ],
    "compat/cpu_platform.py": [
        ("vllm.platforms:current_platform", None),
        ("vllm.platforms.cpu:CpuPlatform.check_and_update_config", takes("vllm_config")),
        ("vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls", takes("selected_backend")),
    ],
    "compat/cpu_platform.py, draft models": [
        (
            f"{DRAFTERS}.llm_base_proposer:SpecDecodeBaseProposer._create_draft_vllm_config",
            names("backend=spec_cfg.attention_backend"),
        ),
    ],
    "compat/coordinator.py": [
        ("vllm.v1.core.kv_cache_manager:get_kv_cache_coordinator", None),
        (
            "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__",
            names("get_kv_cache_coordinator("),
        ),
    ],
    "compat/kv_cache_groups.py": [
        (f"{GROUPING}:get_kv_cache_groups", takes("vllm_config", "kv_cache_spec")),
        (f"{GROUPING}:{GROUPS_CALLER}", names("get_kv_cache_groups(")),
        (f"{INTERFACE}:KVCacheGroupSpec", takes("layer_names", "kv_cache_spec")),
        (f"{INTERFACE}:UniformTypeKVCacheSpecs.from_specs", takes("kv_cache_specs")),
    ],
    "compat/model_runner.py": [
        ("vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features", None),
        ("vllm.config.vllm:envs", None),
        (
            "vllm.config.vllm:VllmConfig.use_v2_model_runner.fget",
            names(
                "use_v2_model_runner = envs.VLLM_USE_V2_MODEL_RUNNER\n"
                "        if use_v2_model_runner is not None:\n"
                "            return use_v2_model_runner\n",
                "unsupported = self._get_v2_model_runner_unsupported_features()",
                "; using the V1 model ",
            ),
        ),
    ],
    "compat/pool_report.py": [
        (
            "vllm.v1.core.sched.scheduler:Scheduler.__init__",
            takes("vllm_config", "kv_cache_config"),
        ),
        (f"{INTERFACE}:KVCacheGroupSpec", members("layer_names", "kv_cache_spec")),
    ],
    "compat/ray_nodes.py": [
        ("vllm.v1.executor.ray_executor_v2:RayExecutorV2._build_runtime_env", None),
        (
            "vllm.v1.executor.ray_executor_v2:RayExecutorV2._init_executor",
            beside(
                "initialize_ray_cluster(self.parallel_config",
                "runtime_env = self._build_runtime_env()",
                "os.environ.setdefault(key, value)",
            ),
        ),
        *RAY_V1,
        ("vllm.v1.executor.abstract:Executor.get_class", names(*RAY_EXECUTORS)),
        (
            "vllm.v1.executor.ray_utils:initialize_ray_cluster",
            names("parallel_config.placement_group ="),
        ),
        ("vllm.config:ParallelConfig", members("placement_group", "pipeline_parallel_size")),
    ],
    "compat/worker_specs.py": [
        ("vllm.v1.executor.abstract:Executor.get_kv_cache_specs", None),
        ("vllm.v1.executor.abstract:Executor.collective_rpc", takes("method")),
        ("vllm.v1.engine.core:EngineCore._initialize_kv_caches", names(".get_kv_cache_specs()")),
    ],
    "compat/scheduler_stats.py": [
        ("vllm.v1.core.sched.scheduler:Scheduler.make_stats", None),
        ("vllm.v1.core.sched.scheduler:Scheduler", sets("kv_cache_manager")),
        ("vllm.v1.metrics.stats:SchedulerStats", members("num_kv_fetch_reqs_by_stage")),
        ("vllm.v1.core.kv_cache_manager:KVCacheManager", sets("coordinator", "kv_cache_config")),
        (COORDINATOR, sets("single_type_managers")),
        (
            f"{INTERFACE}:KVCacheConfig",
            members("num_blocks", "kv_cache_tensors", "kv_cache_groups"),
        ),
        (f"{INTERFACE}:KVCacheTensor", members("size")),
    ],
    "compat/stat_loggers.py": [
        (
            "vllm.v1.metrics.loggers:StatLoggerManager",
            takes("vllm_config", "engine_idxs", "custom_stat_loggers"),
        ),
    ],
    "compat/slot_mapping.py": [
        (f"{RUNNER}:GPUModelRunner.may_reinitialize_input_batch", takes("kv_cache_config")),
        (f"{INTERFACE}:iter_layer_specs", takes("kv_cache_spec")),
        ("vllm.v1.worker.block_table:SlotMappingMode", members("NONE")),
        ("vllm.v1.worker.block_table:BlockTable", sets("slot_mapping_mode")),
        (
            "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping",
            names("self.slot_mapping_mode"),
        ),
        ("vllm.v1.worker.block_table:MultiGroupBlockTable", sets("block_tables")),
        ("vllm.v1.worker.gpu_input_batch:InputBatch", sets("block_table")),
    ],
    "kv_cache/spec.py": [
        (f"{INTERFACE}:FullAttentionSpec", None),
        (
            f"{INTERFACE}:AttentionSpec",
            members("block_size", "num_kv_heads", "head_size", "dtype", "dcp_sharded"),
        ),
        (f"{INTERFACE}:AttentionSpec", members("page_size_bytes")),
        (
            f"{INTERFACE}:KVCacheSpec",
            members("block_table_token_alignment", "uses_slot_mapping", "prefix_cacheable"),
        ),
        (f"{INTERFACE}:KVCacheSpec.get_num_kernel_states", takes("kernel_block_size")),
    ],
    "compat/spec_registry.py": [
        (f"{MANAGERS}:FullAttentionManager", None),
        (f"{MANAGERS}:register_all_kvcache_specs", takes("vllm_config")),
        (
            "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
            takes("kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
        ),
    ],
    "kv_cache/coordinator.py": [
        (COORDINATOR, sets("single_type_managers", "block_pool")),
        (f"{MANAGERS}:FullAttentionManager", None),
    ],
    "kv_cache/manager.py": [
        (
            f"{MANAGERS}:SingleTypeKVCacheManager",
            sets("req_to_blocks", "num_cached_block", "block_pool"),
        ),
        (
            f"{MANAGERS}:get_manager_for_kv_cache_spec",
            names("manager_class(kv_cache_spec, **kwargs)"),
        ),
    ],
    "kv_cache/snapshots.py": [
        ("vllm.v1.core.block_pool:BlockPool.touch", takes("blocks")),
        ("vllm.v1.core.block_pool:BlockPool.evict_blocks", takes("block_ids")),
        ("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", None),
        (
            "vllm.v1.core.block_pool:BlockPool._insert_block_hash",
            takes("block_hash_with_group_id", "block", "num_tokens"),
        ),
        (
            "vllm.v1.core.block_pool:BlockPool",
            sets("cached_block_hash_to_block", "hash_block_size"),
        ),
        ("vllm.v1.core.block_pool:BlockHashToBlockMap.get_one_block", takes("key")),
        (f"{UTILS}:make_block_hash_with_group_id", takes("block_hash", "group_id")),
        (f"{UTILS}:KVCacheBlock", members("block_hash", "next_free_block")),
        ("vllm.v1.core.block_pool:BlockPool", sets("free_block_queue")),
        (f"{UTILS}:FreeKVCacheBlockQueue", sets("fake_free_list_head")),
        (f"{UTILS}:FreeKVCacheBlockQueue.remove", takes("block")),
        (f"{UTILS}:FreeKVCacheBlockQueue.prepend_n", takes("blocks")),
    ],
    "kv_cache/snapshot_manager.py": [
        (f"{UTILS}:resolve_block_hashes", None),
        ("vllm.v1.request:Request", sets("shared_prefix_boundary", "block_hashes")),
        # No draft is counted as known before it is accepted.
        (
            "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
            names("num_tokens_to_cache = min(", "            request.num_tokens,\n"),
        ),
        (f"{MANAGERS}:SingleTypeKVCacheManager._get_num_evictable_blocks", takes("blocks")),
        # With an EAGLE head every group drops a block that vLLM has asked for beyond what it wants.
        (f"{MANAGERS}:SingleTypeKVCacheManager", sets("use_eagle")),
        (
            f"{MANAGERS}:SingleTypeKVCacheManager.find_longest_cache_hit",
            takes("max_length", "drop_eagle_block"),
        ),
        (COORDINATOR, sets("eagle_group_ids = set(range(len(kv_cache_config.kv_cache_groups)))")),
        (
            "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit",
            names("curr_hit_length + eagle_margin", "drop_eagle_block=drop_eagle_block"),
        ),
    ],
    "kv_cache/snapshot_manager.py, states that a KV connector brings": [
        (
            f"{MANAGERS}:SingleTypeKVCacheManager.allocate_external_computed_blocks",
            takes("num_local_computed_tokens", "num_external_computed_tokens"),
        ),
        (
            f"{COORDINATOR}.allocate_new_computed_blocks",
            names(
                "manager.add_local_computed_blocks(", "manager.allocate_external_computed_blocks("
            ),
        ),
        (
            "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
            names(
                "self.coordinator.allocate_new_blocks(", "self.coordinator.cache_blocks(request,"
            ),
        ),
    ],
    "compat/reloaded_weights.py": [
        ("vllm.v1.engine.core:EngineCore.collective_rpc", takes("method")),
        ("vllm.v1.engine.core:EngineCore", sets("scheduler")),
        ("vllm.v1.core.sched.scheduler:Scheduler.get_kv_connector", None),
        ("vllm.v1.worker.gpu_worker:Worker.reload_weights", None),
    ],
    "kv_transfer/connector.py": [
        (
            f"{CONNECTOR}:KVConnectorBase_V1",
            members("requires_kv_delivery", "bind_kv_cache_manager", "reset_cache", "shutdown"),
        ),
        (f"{CONNECTOR}:KVConnectorBase_V1", members("register_kv_caches", "wait_for_save")),
        (f"{CONNECTOR}:SupportsHMA.request_finished_all_groups", takes("request", "block_ids")),
        (
            f"{CONNECTOR}:KVConnectorBase_V1.get_num_new_matched_tokens",
            takes("request", "num_computed_tokens"),
        ),
        (
            f"{CONNECTOR}:KVConnectorBase_V1.update_state_after_alloc",
            takes("request", "blocks", "num_external_tokens"),
        ),
        ("vllm.v1.metrics.cache_hit_source:CacheHitSource", members("DISK")),
        # Loads come before the forward pass, saves after it.
        (
            "vllm.v1.worker.kv_connector_model_runner_mixin:"
            "KVConnectorModelRunnerMixin._get_kv_connector_output",
            names("scheduler_output.has_sync_kv_loads", "kv_connector.wait_for_save()"),
        ),
        # What is not asked for is not loaded; hits are whole blocks.
        (
            "vllm.v1.core.sched.scheduler:Scheduler.schedule",
            names(
                "self.connector.get_num_new_matched_tokens(",
                "num_external_computed_tokens = ext_tokens",
                "self.connector.update_state_after_alloc(",
                "has_sync_kv_loads = True",
            ),
        ),
        (
            "vllm.v1.core.sched.scheduler:Scheduler",
            sets("connector = KVConnectorFactory.create_connector(", "requests"),
        ),
    ],
    "kv_transfer/pool_shape.py": [
        (
            f"{INTERFACE}:KVCacheTensor",
            members("size", "layers", "layer_stride", "block_stride", "offset"),
        ),
        (
            f"{INTERFACE}:KVCacheConfig",
            members("num_blocks", "kv_cache_groups", "kv_cache_tensors"),
        ),
    ],
    "kv_transfer/copier.py": [
        ("vllm.v1.worker.utils:allocate_kv_cache", names("buf = torch.zeros(buf_size")),
    ],
    "kv_transfer/planner.py": [
        (
            "vllm.v1.request:Request",
            sets("lora_request", "mm_features", "prompt_embeds", "skip_reading_prefix_cache"),
        ),
        ("vllm.v1.request:Request", sets("num_prompt_tokens", "num_computed_tokens")),
        ("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", takes("request_id")),
        ("vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids", None),
    ],
    "kv_transfer/refusals.py": [
        (
            "vllm.config:KVTransferConfig",
            members("kv_connector", "kv_connector_module_path", "kv_role", "engine_id"),
        ),
        ("vllm.config:KVTransferConfig", members("kv_connector_extra_config")),
        ("vllm.config:CacheConfig", members("prefix_caching_hash_algo", "enable_prefix_caching")),
        ("vllm.config:VllmConfig", members("weight_transfer_config", "load_config")),
        # These hashes are the same in every process.
        (f"{UTILS}:resolve_none_hash_seed", names("return DEFAULT_NONE_HASH_SEED")),
    ],
    "compat/preempted_pages.py": [
        ("vllm.v1.core.sched.scheduler:Scheduler._preempt_request", takes("request")),
    ],
    "compat/cache_events.py": [
        ("vllm.v1.core.block_pool:BlockPool", sets("enable_kv_cache_events")),
        ("vllm.v1.core.block_pool:BlockPool._emit_block_removed_events", takes("block_hashes")),
        (
            f"{COORDINATOR}.emit_cached_block_events",
            takes("request", "computed_blocks"),
        ),
        (f"{UTILS}:KVCacheBlock", members("block_hash_num_tokens")),
    ],
    "kv_cache/snapshot_events.py": [
        ("vllm.v1.core.block_pool:BlockPool", sets("kv_event_queue")),
        (
            "vllm.v1.core.block_pool:BlockPool._build_block_stored_event",
            takes("request", "parent_block_hash", "start_token_idx", "extra_keys_list"),
        ),
        (f"{UTILS}:generate_block_hash_extra_keys", takes("request")),
        (f"{UTILS}:maybe_convert_block_hash", takes("hash_bytes")),
        (f"{UTILS}:get_group_id", takes("key")),
    ],
    "compat/draft_count.py": [
        (
            "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids",
            takes("draft_token_ids"),
        ),
        ("vllm.v1.core.sched.scheduler:Scheduler", sets("num_spec_tokens")),
        ("vllm.v1.outputs:DraftTokenIds", members("draft_token_ids")),
    ],
    "compat/snapshot_orders.py": [
        ("vllm.v1.core.sched.scheduler:Scheduler.schedule", None),
        (f"{RUNNER}:GPUModelRunner.execute_model", takes("scheduler_output")),
        (f"{RUNNER}:GPUModelRunner", sets("input_batch")),
        ("vllm.v1.worker.gpu_input_batch:InputBatch", sets("req_id_to_index")),
    ],
    "compat/snapshot_orders.py, model runner V2": [
        (f"{RUNNER_V2}:GPUModelRunner.execute_model", takes("scheduler_output")),
        (
            f"{RUNNER_V2}:GPUModelRunner.execute_model",
            names("input_batch = self.prepare_inputs(", "self.model_state.prepare_attn("),
        ),
        (f"{RUNNER_V2}:GPUModelRunner.prepare_inputs", names("return input_batch")),
        ("vllm.v1.worker.gpu.input_batch:InputBatch", members("req_ids")),
        # Groups without slots of vLLM's.
        (f"{RUNNER_V2}:GPUModelRunner.initialize_kv_cache", names("layer_spec.uses_slot_mapping")),
        # One object of a step tells it from others, and one of a group.
        (
            "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
            names("query_start_loc_cpu = torch.from_numpy(", "query_start_loc_cpu=query_start_loc"),
        ),
        (
            "vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
            names(
                "for i in range(num_kv_cache_groups):", "common_attn_metadata = CommonAttentionM"
            ),
        ),
        # Short queries come first.
        (
            f"{RUNNER_V2}:sort_batch_req_ids",
            names("num_tokens_per_req[r]) != decode_query_len,"),
        ),
    ],
    "kv_cache/allocator.py": [
        ("vllm.v1.core.block_pool:BlockPool.get_new_blocks", takes("num_blocks")),
        ("vllm.v1.core.block_pool:BlockPool.free_blocks", takes("ordered_blocks")),
        (f"{UTILS}:KVCacheBlock", members("block_id", "ref_cnt", "is_null")),
    ],
    "attention/backend.py": [
        ("vllm.v1.kv_cache_layout:KVCacheLayout", members("BLHNC")),
        (
            f"{BACKEND}:AttentionBackend",
            members("supported_dtypes", "supported_kv_cache_dtypes"),
        ),
        (f"{BACKEND}:AttentionBackend", members("forward_includes_kv_cache_update")),
        (f"{BACKEND}:AttentionBackend.supports_compute_capability", takes("capability")),
        ("vllm.platforms.interface:DeviceCapability", members("major", "minor")),
    ],
    "attention/retrieval_prefill.py": [
        (f"{FLASH}:get_flash_attn_version", takes("head_size")),
        (f"{FLASH}:is_flash_attn_varlen_func_available", None),
        # Bound on a GPU alone.
        (f"{FLASH}:get_flash_attn_version", beside("        flash_attn_varlen_func,\n")),
        ("vllm.utils.flashinfer:has_flashinfer", None),
    ],
    "attention/head_buffers.py": [
        ("vllm.v1.worker.gpu_worker:Worker.sleep", names("model.named_buffers()")),
        ("vllm.v1.worker.gpu_worker:Worker.wake_up", names("buffer.data.copy_(")),
    ],
    "attention/impl.py": [
        ("vllm.config:get_current_vllm_config", None),
        ("vllm.forward_context:get_forward_context", None),
        ("vllm.forward_context:ForwardContext", members("attn_metadata")),
        ("vllm.model_executor.models.utils:extract_layer_index", takes("layer_name")),
        (f"{BACKEND}:AttentionType", members("DECODER")),
        ("vllm.config:CompilationConfig", members("static_forward_context")),
        ("vllm.config:DeviceConfig", members("device_type")),
        ("vllm.config:CacheConfig", members("block_size")),
        (
            "vllm.model_executor.layers.attention:Attention",
            sets("impl", "head_size", "kv_cache_dtype", "kv_cache_torch_dtype", "layer_name"),
        ),
        ("vllm.model_executor.layers.attention:Attention.get_kv_cache_spec", takes("vllm_config")),
        # Layers are renamed after loading: the model must ask for their name as it runs.
        ("vllm.model_executor.layers.attention:Attention.forward", names("self.layer_name")),
    ],
    "attention/layer_cache.py": [
        # Scales of a quantised cache, on the host.
        (
            "vllm.model_executor.layers.attention:Attention",
            beside("    layer._k_scale_float = 1.0\n", "    layer._v_scale_float = 1.0\n"),
        ),
        # How many scales there are, and scales of what is not quantised here.
        (
            "vllm.model_executor.layers.attention:Attention",
            beside(
                'register_buffer("_k_scale"', 'register_buffer("_v_scale"', "_q_scale_float = 1.0"
            ),
        ),
        (
            "vllm.model_executor.layers.attention:Attention",
            beside('register_buffer("_prob_scale"'),
        ),
        # Scales are whole before the backend hears that weights have loaded.
        (
            "vllm.model_executor.model_loader.utils:process_weights_after_loading",
            names(
                "quant_method.process_weights_after_loading(module)",
                "NOTE: Happens after other modules",
                "module.process_weights_after_loading(model_config.dtype)",
            ),
        ),
    ],
    "checkpoint_cache.py": [
        # The layers' own way from "auto" to what the checkpoint asks for.
        (
            "vllm.model_executor.layers.attention:Attention.__init__",
            names('if kv_cache_scheme is not None and kv_cache_dtype == "auto":', '= "fp8"'),
        ),
        (
            "vllm.utils.torch_utils:get_kv_cache_quant_algo_string",
            names(
                'quant_method.startswith("modelopt")', '"kv_cache_scheme"', '"kv_cache_quant_algo"'
            ),
        ),
    ],
    "skipped_layers.py": [
        (
            "vllm.model_executor.layers.attention:Attention.__init__",
            names(
                '"sliding_window" in cache_config', "if str(layer_idx) in cache_config", '= "auto"'
            ),
        ),
        ("vllm.config:CacheConfig", members("kv_cache_dtype_skip_layers")),
    ],
    "attention/specs.py": [
        (
            "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype",
            takes("kv_cache_dtype", "model_config"),
        ),
        ("vllm.utils.torch_utils:get_dtype_size", None),
        (f"{INTERFACE}:get_kv_quant_mode", takes("kv_cache_dtype")),
        (f"{INTERFACE}:AttentionSpec", members("kv_quant_mode", "state_content_bytes")),
        ("vllm.distributed:get_tensor_model_parallel_rank", None),
        ("vllm.distributed:get_pp_group", None),
        ("vllm.distributed.parallel_state:GroupCoordinator", sets("rank_in_group")),
        ("vllm.config:CacheConfig", members("block_size")),
        ("vllm.config:ParallelConfig", members("tensor_parallel_size", "pipeline_parallel_size")),
    ],
    "kv_cache/ranks.py": [
        (
            "vllm.model_executor.layers.linear:QKVParallelLinear",
            sets("num_kv_heads", "num_kv_head_replicas"),
        ),
        ("vllm.distributed.utils:get_pp_indices", names("VLLM_PP_LAYER_PARTITION")),
    ],
    "attention/metadata.py": [
        (f"{BACKEND}:AttentionMetadata", None),
        (
            f"{BACKEND}:CommonAttentionMetadata",
            members("query_start_loc", "query_start_loc_cpu", "seq_lens", "block_table_tensor"),
        ),
        (
            f"{BACKEND}:AttentionMetadataBuilder",
            members("reorder_batch_threshold", "_init_reorder_batch_threshold"),
        ),
        (
            f"{BACKEND}:AttentionMetadataBuilder._init_reorder_batch_threshold",
            takes("supports_spec_as_decode"),
        ),
        (
            f"{BACKEND}:AttentionMetadataBuilder.build_for_drafting",
            takes("common_attn_metadata", "draft_index"),
        ),
        (f"{BACKEND}:AttentionMetadataBuilder", members("_cudagraph_support")),
        (f"{BACKEND}:AttentionCGSupport", members("UNIFORM_BATCH")),
        (
            f"{BACKEND}:CommonAttentionMetadata",
            members("seq_lens_cpu_upper_bound", "max_seq_len"),
        ),
        ("vllm.config:ModelConfig.get_num_attention_heads", takes("parallel_config")),
        ("vllm.config:ModelConfig.get_num_kv_heads", takes("parallel_config")),
        ("vllm.config:SchedulerConfig", members("max_num_seqs")),
        ("vllm.config:CacheConfig", members("enable_prefix_caching")),
    ],
    "metrics.py": [
        ("vllm.plugins:STAT_LOGGER_PLUGINS_GROUP", is_("vllm.stat_logger_plugins")),
    ],
}
