"""The rows without an effect: accepted, because nothing is to be done, or unsupported, because it is not done yet."""

from __future__ import annotations

from lmcache_native.config.table import Key, Kind, Place, Theme

_INF = float("inf")


def _accepted(
    theme: Theme, name: str, takes: str, default: object, meaning: str, place: Place = Place.ANYWHERE, needs: tuple[str, ...] = ()
) -> Key:
    return Key(name, Kind.ACCEPTED, theme, takes, default, meaning, place=place, needs=needs)


def _unsupported(
    theme: Theme, name: str, takes: str, default: object, meaning: str, instead: str, see: str, place: Place = Place.ANYWHERE
) -> Key:
    return Key(name, Kind.UNSUPPORTED, theme, takes, default, meaning, instead=instead, see=see, place=place)


def _part(theme: Theme, needs: str, place: Place, *keys: tuple[str, str, object], see: str = "") -> tuple[Key, ...]:
    """Settings of a feature: unsupported with it, and nothing without it. `see`: where the feature itself is supported."""
    of = tuple(needs.split())
    meaning = "Part of " + " or ".join(of) + "; without it no effect."
    return tuple(
        Key(name, Kind.UNSUPPORTED, theme, takes, default, meaning, see=see, needs=of, place=place) for name, takes, default in keys
    )


# fmt: off
ACCEPTED = (
    _accepted(Theme.HOST, "enable_lazy_memory_allocator", "flag", False,
              "Host memory is always populated in the background; the engine does not wait for it."),
    _accepted(Theme.HOST, "lazy_memory_initial_ratio", "number", 0.2, "As enable_lazy_memory_allocator."),
    _accepted(Theme.HOST, "lazy_memory_expand_trigger_ratio", "number", 0.5, "As enable_lazy_memory_allocator."),
    _accepted(Theme.HOST, "lazy_memory_step_ratio", "number", 0.1, "As enable_lazy_memory_allocator."),
    _accepted(Theme.HOST, "lazy_memory_safe_size", "number, GiB", 0.0, "As enable_lazy_memory_allocator."),
    _accepted(Theme.HOST, "local_cpu.pinned_align_bytes", "whole number, bytes", None,
              "Slots are aligned as the device needs it.", Place.SUB),
    _accepted(Theme.HOST, "max_alloc_attempts", "whole number", 10,
              "Nothing waits for host memory: a chunk that finds no slot is not stored.", Place.SUB),
    _accepted(Theme.HOST, "allocation_attempt_delay_secs", "number, s", 0.1, "As max_alloc_attempts.", Place.SUB),
    _accepted(Theme.NVME, "use_odirect", "flag", False, "NVMe is always read and written with O_DIRECT.", Place.SUB),
    _accepted(Theme.GDS, "use_direct_io", "flag", None, "NVMe is always read with O_DIRECT, or by GPUDirect Storage.", Place.SUB),
    _accepted(Theme.NVME, "disk_io_threads", "whole number", 4,
              "The I/O engine keeps several reads and writes under way by itself.", Place.SUB),
    _accepted(Theme.CHUNKS, "tag_keys", "list of names", None, "Every lmcache.tag of a request counts.", Place.SUB),
    _accepted(Theme.LOADING, "pin_check_interval_sec", "number, s", 30, "request_ttl is checked without an interval."),
    _accepted(Theme.LOADING, "lookup_server_worker_ids", "list of ranks", None,
              "There are no lookup servers: one index in the scheduler's process answers for all ranks."),
    _accepted(Theme.LOADING, "enable_scheduler_bypass_lookup", "flag", False,
              "Lookups are always answered in the scheduler's process."),
    _accepted(Theme.LOADING, "lookup_backoff_time", "number, s", None, "vLLM asks again by itself.", Place.SUB),
    _accepted(Theme.LOADING, "create_lookup_server_only_on_worker_0_for_mla", "flag", None, "There are no lookup servers.",
              Place.SUB),
    _accepted(Theme.LOADING, "lmcache_rpc_port", "whole number or text", None,
              "Processes of an engine meet at a Unix socket named from the engine's id.", Place.SUB),
    _accepted(Theme.LOADING, "use_gpu_connector_v3", "flag", False, "There is one copier; it follows the layout it finds."),
    _accepted(Theme.SAVING, "save_only_first_rank", "flag", None,
              "What each rank stores follows from the model's layout; this setting changes no answer.", Place.SUB),
    _accepted(Theme.PROCESS, "fallback_policy", "recompute or local_cpu", "recompute",
              "For remote stores. Here a tier that fails is left out and its chunks are misses.", Place.SUB),
    _accepted(Theme.PROCESS, "ping_interval", "number, s", 30, "For remote stores; there is nothing to ping.", Place.SUB),
    _accepted(Theme.PROCESS, "ping_timeout", "number, s", 5, "For remote stores; there is nothing to ping.", Place.SUB),
    _accepted(Theme.PROCESS, "get_blocking_failed_threshold", "whole number", 10,
              "The NVMe tier is left out after eight failed reads in a row.", Place.SUB),
    _accepted(Theme.PROCESS, "waiting_time_for_recovery", "number, s", 300, "For remote stores.", Place.SUB),
    _accepted(Theme.PROCESS, "use_native", "flag", False, "Chooses between two adapters of LMCache; neither is used.", Place.EXTRA),
    _accepted(Theme.PROCESS, "use_upstream_mp", "flag", None, "As use_native.", Place.ENVIRONMENT),
    _accepted(Theme.PROCESS, "use_experimental", "flag", None, "Of LMCache before 0.3.", Place.ENVIRONMENT),
    _accepted(Theme.SHARING, "mp_host", "host name", None, "No server is needed: the cache is in the engine's own processes."),
    _accepted(Theme.SHARING, "mp_port", "whole number", 5555, "As mp_host."),
    _accepted(Theme.SHARING, "mp.*", "any", None, "lmcache.mp.host, lmcache.mp.autostart and so on: as mp_host.", Place.EXTRA),
    _accepted(Theme.SHARING, "mq_timeout", "number", None, "As mp_host.", Place.ENVIRONMENT),
    _accepted(Theme.SHARING, "gpu_staging_buffer_bytes", "whole number, bytes", None,
              "Copies need no staging memory on the GPU.", Place.ENVIRONMENT),
    _accepted(Theme.OBSERVING, "track_usage", "flag", None, "There is no telemetry.", Place.ENVIRONMENT),
    _accepted(Theme.OBSERVING, "do_not_track", "flag", None, "There is no telemetry.", Place.ENVIRONMENT),
    _accepted(Theme.OTHER, "ec_*", "any", None,
              "LMCache's encoder cache, which none of these keys turns on: vLLM's --ec-transfer-config does."),
    _accepted(Theme.OTHER, "ec", "mapping", None, "As ec_*."),
    _accepted(Theme.OTHER, "local_device", "text", None,
              "Of LMCache before 0.3; LMCache ignores it too. See local_cpu and local_disk."),
    _accepted(Theme.OTHER, "pipelined_backend", "flag", False, "Of LMCache before 0.3; LMCache ignores it too."),
)

UNSUPPORTED = (
    _unsupported(Theme.HOST, "first_rank_max_local_cpu_size", "number, GiB", None, "Host memory of the first rank alone.",
                 "give max_local_cpu_size, the total of all ranks", "host-memory-by-rank", Place.SUB),
    _unsupported(Theme.HOST, "shm_name", "name", None, "Host memory under a name that other programs open.",
                 "leave it out: the arena has no name, it is handed to the engine's own workers", "host-memory-by-rank", Place.SUB),
    _unsupported(Theme.LOADING, "max_tokens_per_load", "whole number, tokens", 0, "Limits the tokens of one load.",
                 "a load takes what was found; leave it out", "limits-of-a-load-or-a-store", Place.EXTRA),
    _unsupported(Theme.SAVING, "skip_last_n_tokens", "whole number, tokens", 0, "Leaves the end of each prompt out.",
                 "the whole prompt counts; leave it out", "limits-of-a-load-or-a-store", Place.EXTRA),
    _unsupported(Theme.SAVING, "force_store_wait", "flag", False, "Makes the engine wait for host memory.",
                 "the engine never waits for a store; leave it out and give more host memory",
                 "limits-of-a-load-or-a-store", Place.SUB),
    *_part(Theme.GDS, "gds_path", Place.ANYWHERE, ("gds_path_sharding", "by_gpu", "by_gpu"), ("gds_backend", "name", "cufile"),
           see="gpudirect-storage"),
    _unsupported(Theme.REMOTE, "remote_url", "URL", None, "A store on another machine.",
                 "use local_disk, which keeps chunks across restarts of this engine", "remote-stores"),
    *_part(Theme.REMOTE, "remote_url", Place.ANYWHERE,
           ("remote_serde", "name", "naive"), ("audit_actual_remote_url", "URL", None)),
    *_part(Theme.REMOTE, "remote_url remote_storage_plugins", Place.SUB,
           ("audit_*", "any", None), ("aws_*", "any", None), ("azure_*", "any", None), ("s3_*", "any", None),
           ("mooncake_*", "any", None), ("fs_connector_*", "any", None), ("infinistore_*", "any", None),
           ("redis_*", "any", None), ("remote_enable_mla_worker_id_as0", "flag", None), ("valkey_*", "any", None),
           ("hf3fs_*", "any", None), ("sagemaker_hyperpod_*", "any", None), ("username", "text", None),
           ("password", "text", None), ("connection_timeout", "number, s", None), ("request_timeout", "number, s", None),
           ("transfer_timeout", "number, s", None), ("resp_num_threads", "whole number", None), ("tls_enable", "flag", None),
           ("disable_tls", "flag", None), ("fs_base_path", "path", None), ("storage_root_dir", "path", None),
           ("save_chunk_meta", "flag", None), ("use_exists_sync", "flag", None)),
    _unsupported(Theme.REMOTE, "storage_plugins", "list of names", None, "Storage backends in Python.",
                 "use local_disk", "storage-plugins"),
    *_part(Theme.REMOTE, "storage_plugins", Place.SUB,
           ("rust_raw_block.*", "any", None), ("dax.*", "any", None), ("storage_plugin.*", "any", None),
           ("external_backend.*", "any", None)),
    _unsupported(Theme.REMOTE, "remote_storage_plugins", "list of names", None, "Remote stores in Python.",
                 "use local_disk", "storage-plugins"),
    *_part(Theme.REMOTE, "remote_storage_plugins", Place.SUB, ("remote_storage_plugin.*", "any", None)),
    _unsupported(Theme.REMOTE, "runtime_plugin_locations", "list of paths", None, "Programs that LMCache starts beside itself.",
                 "start them yourself", "runtime-plugins"),
    _unsupported(Theme.REMOTE, "maru_path", "path", None, "A tier in shared CXL memory.", "use max_local_cpu_size",
                 "shared-cxl-memory"),
    *_part(Theme.REMOTE, "maru_path", Place.ANYWHERE, ("maru_pool_size", "number, GiB", 4.0)),
    *_part(Theme.REMOTE, "maru_path", Place.SUB, ("maru_*", "any", None)),
    _unsupported(Theme.REMOTE, "external_lookup_client", "URL", None, "Asks another service what is cached.",
                 "the index is in the engine's own process", "external-lookup"),
    _unsupported(Theme.REMOTE, "remote_config_url", "URL", None, "Fetches further configuration at start.",
                 "give it in LMCACHE_CONFIG_FILE", "remote-configuration"),
    *_part(Theme.REMOTE, "remote_config_url", Place.ANYWHERE, ("app_id", "text", None)),
    _unsupported(Theme.SHARING, "enable_controller", "flag", False, "Registers with LMCache's controller.",
                 "there is no controller", "controller"),
    *_part(Theme.SHARING, "enable_controller", Place.ANYWHERE,
           ("controller_pull_url", "URL", None), ("controller_reply_url", "URL", None),
           ("lmcache_worker_ports", "list of ports", None), ("lmcache_worker_ids", "list of ranks", None),
           ("lmcache_worker_heartbeat_delay_time", "whole number, s", 10),
           ("lmcache_worker_heartbeat_time", "whole number, s", None)),
    *_part(Theme.SHARING, "enable_controller", Place.SUB,
           ("full_sync_*", "any", None), ("kv_msg_*", "any", None), ("heartbeat_url", "URL", None),
           ("worker_socket_*", "any", None), ("controller_packages", "list of modules", None),
           ("disabled_controllers", "list of names", None)),
    _unsupported(Theme.SHARING, "enable_p2p", "flag", False, "Loads chunks from other engines' memory.",
                 "each engine has its own cache", "p2p-sharing"),
    *_part(Theme.SHARING, "enable_p2p", Place.ANYWHERE,
           ("p2p_host", "host name", None), ("p2p_init_ports", "list of ports", None), ("p2p_lookup_ports", "list of ports", None)),
    *_part(Theme.SHARING, "enable_p2p", Place.SUB, ("p2p_*", "any", None)),
    *_part(Theme.SHARING, "enable_p2p enable_pd", Place.ANYWHERE, ("transfer_channel", "name", None)),
    _unsupported(Theme.DISAGGREGATED, "enable_pd", "flag", False, "Hands KV from a prefill engine to a decode engine.",
                 "use another connector of vLLM for it", "disaggregated-prefill"),
    *_part(Theme.DISAGGREGATED, "enable_pd", Place.ANYWHERE,
           ("pd_role", "sender or receiver", None), ("pd_buffer_size", "whole number, bytes", None),
           ("pd_buffer_device", "name", None), ("pd_peer_host", "host name", None), ("pd_peer_init_port", "list of ports", None),
           ("pd_peer_alloc_port", "list of ports", None), ("pd_peer_query_port", "list of ports", None),
           ("pd_proxy_host", "host name", None), ("pd_proxy_port", "whole number", None),
           ("pd_allocation_timeout_sec", "number, s", _INF), ("pd_shutdown_timeout_sec", "number, s", 5.0),
           ("pd_condition_poll_interval_sec", "number, s", 0.005), ("pd_max_prefill_len", "whole number, tokens", 0),
           ("pd_backend_mode", "async or sync", "async"), ("pd_skip_proxy_notification", "flag", False),
           ("pd_bidirectional", "flag", False)),
    _unsupported(Theme.DISAGGREGATED, "enable_nixl_storage", "flag", False, "A tier reached over NIXL.",
                 "use local_disk", "nixl-storage", Place.SUB),
    *_part(Theme.DISAGGREGATED, "enable_nixl_storage enable_pd enable_p2p", Place.ANYWHERE,
           ("nixl_backends", "list of names", None), ("nixl_buffer_size", "whole number, bytes", None),
           ("nixl_buffer_device", "name", None)),
    *_part(Theme.DISAGGREGATED, "enable_nixl_storage enable_pd enable_p2p", Place.SUB, ("nixl_*", "any", None)),
    _unsupported(Theme.BLENDING, "enable_blending", "flag", False,
                 "Reuses KV of text that is not a prefix, and computes a part of it again.", "only prefixes are reused",
                 "blending"),
    *_part(Theme.BLENDING, "enable_blending", Place.ANYWHERE,
           ("blend_recompute_ratios", "list of numbers", None), ("blend_thresholds", "list of numbers", None),
           ("blend_check_layers", "list of layers", None), ("blend_min_tokens", "whole number, tokens", 256),
           ("blend_special_str", "text", " # # ")),
    *_part(Theme.BLENDING, "enable_blending", Place.SUB, ("enable_sparse", "flag", None)),
    _unsupported(Theme.OBSERVING, "internal_api_server_enabled", "flag", False, "An HTTP server in each process.",
                 "vLLM's /metrics has our metrics, its log our messages", "http-server-in-each-process"),
    *_part(Theme.OBSERVING, "internal_api_server_enabled", Place.ANYWHERE,
           ("internal_api_server_host", "host name", "127.0.0.1"), ("internal_api_server_port_start", "whole number", 6999),
           ("internal_api_server_include_index_list", "list of numbers", None),
           ("internal_api_server_socket_path_prefix", "path", None), ("run_script_api_enabled", "flag", False),
           ("script_allowed_imports", "list of modules", None)),
    *_part(Theme.OBSERVING, "internal_api_server_enabled", Place.SUB, ("internal_api_server_*", "any", None)),
    _unsupported(Theme.OBSERVING, "enable_chunk_statistics", "flag", False, "Counts different chunks.",
                 "see the metrics of hits and stores", "chunk-statistics"),
    *_part(Theme.OBSERVING, "enable_chunk_statistics", Place.ANYWHERE,
           ("chunk_statistics_auto_start_statistics", "flag", False),
           ("chunk_statistics_auto_exit_timeout_hours", "number, h", 0.0),
           ("chunk_statistics_auto_exit_target_unique_chunks", "whole number", 0),
           ("chunk_statistics_strategy", "name", "memory_bloom_filter")),
    *_part(Theme.OBSERVING, "enable_chunk_statistics", Place.SUB, ("chunk_statistics_*", "any", None)),
    _unsupported(Theme.OBSERVING, "enable_cache_usage_details_in_response", "flag", False, "Adds hits to each answer.",
                 "use vLLM's --enable-prompt-tokens-details", "cache-usage-in-responses", Place.SUB),
    _unsupported(Theme.OTHER, "enable_hidden_state_cache", "flag", False, "Keeps hidden states of vLLM-Omni beside the KV.",
                 "only KV is kept", "hidden-states"),
    *_part(Theme.OTHER, "enable_hidden_state_cache", Place.ANYWHERE,
           ("max_hidden_state_cpu_size", "number, GiB", 2.0), ("hidden_state_layers", "list of layers", None),
           ("hidden_states_retrieve_mode", "name", "prefix_strict")),
)

# What vLLM's own offloading specs read; ours is another. Named in one warning when given.
VLLM_IGNORED = tuple(
    Key(name, Kind.ACCEPTED, Theme.VLLM, "any", None, "Of vLLM's own specs; ignored, with a warning.", place=Place.EXTRA)
    for name in ("backpressure", "cache_policy_module_path", "canonical_layout", "enable_telemetry", "eviction_policy",
                 "max_tracker_size", "secondary_tiers", "store_threshold")
)
# fmt: on

ROWS = ACCEPTED + UNSUPPORTED + VLLM_IGNORED
