"""What of vLLM each connector relies on, and how it must look: data for interface_check.py.

compat.py's table says where the names are that we import; _HANDED says where those are that vLLM only hands to us. A name of
compat.py's table without a shape must be there, for both connectors; more is not asked of it.
"""

from __future__ import annotations

from dataclasses import dataclass

OFFLOADING = "NativeOffloadingConnector"
TOKENS = "LMCacheNativeConnector"
CONNECTORS = (TOKENS, OFFLOADING)


@dataclass(frozen=True, slots=True)
class Shape:
    """Methods are written `name(parameter, *others)`, without self or cls; `(parameter)` is the object itself."""

    users: tuple[str, ...] = CONNECTORS
    overrides: tuple[str, ...] = ()  # ours stands in its place: vLLM's has exactly these parameters
    later: tuple[str, ...] = ()  # the same; a vLLM that has no such method never asks for it
    calls: tuple[str, ...] = ()  # takes these, needs no others; `_`: given by position
    fields: str = ""  # read or set: names with spaces between; `a|b`: one of them
    members: str = ""  # of an enum


_T, _O = (TOKENS,), (OFFLOADING,)
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"

# name here -> (module, attribute)
HANDED = {
    "AttentionConfig": ("vllm.config", "AttentionConfig"),
    "BlockPool": ("vllm.v1.core.block_pool", "BlockPool"),
    "CacheConfig": ("vllm.config", "CacheConfig"),
    "CachedRequestData": ("vllm.v1.core.sched.output", "CachedRequestData"),
    "CanonicalKVCacheRef": ("vllm.v1.kv_offload.base", "CanonicalKVCacheRef"),
    "CanonicalKVCaches": ("vllm.v1.kv_offload.base", "CanonicalKVCaches"),
    "CanonicalKVCacheTensor": ("vllm.v1.kv_offload.base", "CanonicalKVCacheTensor"),
    "KVCacheBlockCopy": ("vllm.v1.core.kv_cache_utils", "KVCacheBlockCopy"),
    "KVCacheBlocks": ("vllm.v1.core.kv_cache_manager", "KVCacheBlocks"),
    "KVCacheConfig": ("vllm.v1.kv_cache_interface", "KVCacheConfig"),
    "KVCacheGroupSpec": ("vllm.v1.kv_cache_interface", "KVCacheGroupSpec"),
    "KVConnectorBlockState": ("vllm.v1.core.sched.output", "KVConnectorBlockState"),
    "KVConnectorOutput": ("vllm.v1.outputs", "KVConnectorOutput"),
    "KVTransferConfig": ("vllm.config", "KVTransferConfig"),
    "LoadConfig": ("vllm.config", "LoadConfig"),
    "LoRARequest": ("vllm.lora.request", "LoRARequest"),
    "ModelConfig": ("vllm.config", "ModelConfig"),
    "NewRequestData": ("vllm.v1.core.sched.output", "NewRequestData"),
    "OffloadingConfig": ("vllm.v1.kv_offload.config", "OffloadingConfig"),
    "OffloadingConnectorScheduler": (f"{_CONNECTOR}.offloading.scheduler", "OffloadingConnectorScheduler"),
    "OffloadingConnectorWorker": (f"{_CONNECTOR}.offloading.worker", "OffloadingConnectorWorker"),
    "OffloadingParallelConfig": ("vllm.v1.kv_offload.config", "OffloadingParallelConfig"),
    "ParallelConfig": ("vllm.config", "ParallelConfig"),
    "ReqContext": ("vllm.v1.kv_offload.base", "ReqContext"),
    "Request": ("vllm.v1.request", "Request"),
    "SchedulerConfig": ("vllm.config", "SchedulerConfig"),
    "SchedulerGroupConfig": (f"{_CONNECTOR}.offloading.scheduler", "GroupOffloadConfig"),
    "SchedulerOffloadConfig": (f"{_CONNECTOR}.offloading.scheduler", "SchedulerOffloadConfig"),
    "SchedulerOutput": ("vllm.v1.core.sched.output", "SchedulerOutput"),
    "SpeculativeConfig": ("vllm.config", "SpeculativeConfig"),
}

_BOTH_CONNECTORS = (
    "register_kv_caches(kv_caches)",
    "get_block_ids_with_load_errors()",
    "get_handshake_metadata()",
    "set_xfer_handshake_metadata(metadata)",
    "build_connector_worker_meta()",
    "on_new_request(request)",
    "update_connector_output(connector_output)",
    "build_prom_metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)",
)

SHAPES = {
    "AllBlocksCleared": Shape(_T, calls=("()",)),
    "AttentionConfig": Shape(fields="backend backend_per_kind"),
    "AttentionLayerBase": Shape(calls=("get_attn_backend()",)),
    "BlockPool": Shape(_T, calls=("evict_blocks(_)",)),
    "BlockStored": Shape(_T, calls=("(block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name)",)),
    "CacheConfig": Shape(
        fields="block_size cache_dtype kv_cache_dtype_skip_layers kv_cache_layout kv_offloading_size "
        "prefix_caching_hash_algo user_specified_block_size"
    ),
    "CachedRequestData": Shape(_T, fields="new_block_ids"),
    "CacheHitSource": Shape(members="EXTERNAL_UNSPECIFIED HOST DISK"),
    "CanonicalKVCacheRef": Shape(_O, fields="tensor_idx page_size_bytes"),
    "CanonicalKVCaches": Shape(_O, fields="tensors group_data_refs"),
    "CanonicalKVCacheTensor": Shape(_O, fields="tensor"),
    "ChunkedLocalAttentionSpec": Shape(_O, fields="attention_chunk_size block_size"),
    "current_platform": Shape(calls=("is_cuda()",)),
    "FullAttentionSpec": Shape(fields="block_size head_size head_size_v kv_quant_mode non_causal num_kv_heads"),
    "get_hash_fn_by_name": Shape(_O, calls=("(_)",)),
    "get_layers_from_vllm_config": Shape(calls=("(_, _, _)",)),
    "GPULoadStoreSpec": Shape(_O, fields="block_ids block_indices"),
    "group_kernel_blocks": Shape(calls=("(_, _)",)),
    "KVCacheBlockCopy": Shape(_T, fields="dst_block_id"),
    "KVCacheBlocks": Shape(_T, calls=("get_block_ids()",)),
    "KVCacheConfig": Shape(fields="kv_cache_groups num_blocks"),
    "KVCacheGroupSpec": Shape(fields="kv_cache_spec layer_names"),
    "KVConnectorBase_V1": Shape(
        overrides=(
            *_BOTH_CONNECTORS,
            "(vllm_config, role, kv_cache_config)",
            "bind_gpu_block_pool(gpu_block_pool)",
            "handle_preemptions(kv_connector_metadata)",
            "start_load_kv(forward_context, **kwargs)",
            "wait_for_layer_load(layer_name)",
            "save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)",
            "wait_for_save()",
            "get_finished(finished_req_ids)",
            "shutdown()",
            "get_kv_connector_stats()",
            "get_num_new_matched_tokens(request, num_computed_tokens)",
            "update_state_after_alloc(request, blocks, num_external_tokens)",
            "build_connector_meta(scheduler_output)",
            "request_finished(request, block_ids)",
            "take_events()",
            "has_pending_push_work()",
            "requires_piecewise_for_cudagraph(extra_config)",
            "build_kv_connector_stats(data)",
            "reset_cache()",
        ),
        later=("get_external_cache_hit_sources(request, num_external_tokens)", "get_transfer_results(finished_req_ids)"),
        fields="requires_kv_delivery _vllm_config _kv_cache_config _get_connector_metadata",
    ),
    "KVConnectorBlockState": Shape(_T, fields="get_block_ids|block_ids"),
    "KVConnectorFactory": Shape(calls=("get_connector_class(_)",), fields="_registry"),
    "KVConnectorHandshakeMetadata": Shape(calls=("()",)),
    "KVConnectorMetadata": Shape(_T, calls=("()",)),
    "KVConnectorOutput": Shape(fields="kv_connector_worker_meta"),
    "KVConnectorRole": Shape(members="SCHEDULER WORKER"),
    "KVConnectorWorkerMetadata": Shape(_T, overrides=("aggregate(other)",)),
    "KVTransferConfig": Shape(
        fields="engine_id kv_connector kv_connector_extra_config kv_connector_module_path kv_load_failure_policy kv_role"
    ),
    "LoadConfig": Shape(fields="download_dir load_format model_loader_extra_config"),
    "LoadStoreSpec": Shape(_O),
    "Locality": Shape(_O, members="LOCAL"),
    "LookupResult": Shape(_O, members="MISS HIT HIT_PENDING RETRY"),
    "LoRARequest": Shape(fields="lora_name lora_path lora_int_id load_inplace"),
    "Medium": Shape(_O, members="STORAGE"),
    "MLAAttentionSpec": Shape(
        fields="block_size head_size kv_quant_mode non_causal num_kv_heads state_content_bytes tokens_per_state"
    ),
    "ModelConfig": Shape(
        fields="dtype hf_config hf_text_config is_hybrid max_model_len model model_weights quantization "
        "quantization_config revision seed use_mla"
    ),
    "NewRequestData": Shape(_T, fields="block_ids"),
    "OffloadingConfig": Shape(_O, fields="engine_id parallel"),
    "OffloadingConnector": Shape(
        _O,
        overrides=(
            *_BOTH_CONNECTORS,
            "(vllm_config, role, kv_cache_config)",
            "get_required_kvcache_layout(vllm_config)",
            "start_load_kv(forward_context, **kwargs)",
            "get_num_new_matched_tokens(request, num_computed_tokens)",
            "update_state_after_alloc(request, blocks, num_external_tokens)",
            "request_finished(request, block_ids)",
            "request_finished_all_groups(request, block_ids)",
            "build_kv_connector_stats(data)",
        ),
        fields="connector_scheduler connector_worker",
    ),
    "OffloadingConnectorScheduler": Shape(_O, fields="config manager"),
    "OffloadingConnectorStats": Shape(
        calls=(
            "(data)",
            "aggregate(_)",
            "increase_counter(_, _, _)",
            "observe_histogram(_, _)",
            "set_gauge(_, _)",
        )
    ),
    "OffloadingConnectorWorker": Shape(_O, fields="worker"),
    "OffloadingCounterMetadata": Shape(calls=("(documentation, labelnames)",)),
    "OffloadingGaugeMetadata": Shape(calls=("(documentation)",)),
    "OffloadingManager": Shape(
        _O,
        overrides=(
            "lookup(key, req_context)",
            "prepare_load(keys, req_context)",
            "complete_load(keys, req_context)",
            "prepare_store(keys, req_context)",
            "complete_store(keys, req_context, success)",
            "on_new_request(req_context)",
            "on_request_finished(req_context)",
            "take_events()",
            "reset_cache()",
            "get_stats()",
            "shutdown()",
        ),
        later=("get_load_source(key, req_context)",),
    ),
    "OffloadingParallelConfig": Shape(_O, fields="rank world_size"),
    "OffloadingSpec": Shape(
        overrides=("(config)", "build_metric_definitions(extra_config)", "get_manager()", "get_worker(kv_caches)"),
        fields="config extra_config blocks_per_chunk",
    ),
    "OffloadingSpecFactory": Shape(calls=("register_spec(_, _, _)",), fields="_registry"),
    "OffloadingWorker": Shape(
        overrides=(
            "submit_store(job_id, src_spec, dst_spec)",
            "submit_load(job_id, src_spec, dst_spec)",
            "get_finished()",
            "wait(job_ids)",
            "shutdown()",
        )
    ),
    "OffloadingWorkerMetadata": Shape(
        _O, overrides=("aggregate(other)",), calls=("(_, _)",), fields="completed_jobs transfer_stats"
    ),
    "OffloadPromMetrics": Shape(_T, calls=("(vllm_config, metric_types, labelnames, per_engine_labelvalues)",)),
    "ParallelConfig": Shape(
        fields="data_parallel_index data_parallel_rank_local data_parallel_size decode_context_parallel_size "
        "distributed_executor_backend nnodes pipeline_parallel_size prefill_context_parallel_size rank "
        "tensor_parallel_size world_size"
    ),
    "PrepareStoreOutput": Shape(_O, calls=("(keys_to_store, store_spec, evicted_keys)",)),
    "ReqContext": Shape(_O, calls=("get_state(_)", "set_state(_)"), fields="req_id load_tier_filter"),
    "Request": Shape(
        _T,
        fields="all_token_ids cache_salt kv_transfer_params lora_request mm_features num_computed_tokens "
        "num_prompt_tokens num_tokens priority prompt_embeds request_id resumable skip_reading_prefix_cache status",
    ),
    "RequestOffloadingContext": Shape(_O, calls=("()",)),
    "RequestStatus": Shape(_T, members="WAITING WAITING_FOR_REMOTE_KVS"),
    "resolve_none_hash_seed": Shape(_O, calls=("(_)",)),
    "SchedulerConfig": Shape(fields="async_scheduling"),
    "SchedulerGroupConfig": Shape(_O, fields="tokens_per_chunk"),
    "SchedulerOffloadConfig": Shape(_O, fields="blocks_per_chunk kv_group_configs tokens_per_hash"),
    "SchedulerOutput": Shape(
        _T,
        fields="kv_cache_block_copies kv_connector_block_state num_scheduled_tokens preempted_req_ids "
        "scheduled_cached_reqs scheduled_new_reqs",
    ),
    "SlidingWindowSpec": Shape(_O, fields="block_size extra_retained_tokens sliding_window"),
    "SpeculativeConfig": Shape(fields="draft_model_config method"),
    "SupportsHMA": Shape(_T, overrides=("request_finished_all_groups(request, block_ids)",)),
    "TierFilter": Shape(_O, calls=("allows(_, _)",)),
    "TransferResult": Shape(_O, calls=("(job_id, success, transfer_size, transfer_time)",)),
    "UniformTypeKVCacheSpecs": Shape(fields="kv_cache_specs"),
    "VllmConfig": Shape(
        fields="_post_init_kv_transfer_config attention_config cache_config device_config kv_transfer_config load_config "
        "model_config parallel_config scheduler_config speculative_config use_v2_model_runner"
    ),
}
