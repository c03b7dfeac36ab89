"""The rows that have an effect. LMCache's names where they mean the same; the others are ours."""

from __future__ import annotations

from lmcache_native.config.table import BLOCK, TOKEN, Key, Kind, Place, Theme
from lmcache_native.config.values import (
    ADMISSIONS,
    HASH_ALGORITHMS,
    IO_ENGINES,
    LOAD_FAILURE_POLICIES,
    VERIFY,
    Profile,
    byte_count,
    daily_size,
    directories,
    flag,
    mapping,
    mebibytes,
    milliseconds,
    numa_mode,
    numa_nodes,
    one_of,
    ratio,
    reserve,
    retrieves_nvme,
    seconds,
    seconds_or_zero,
    size,
    size_or_zero,
    sizes,
    striped,
    text,
    use_gds,
    whole,
)

_D = Kind.DONE

# fmt: off
HOST = (
    Key(
        "max_local_cpu_size", _D, Theme.HOST, "number, GiB", 5.0,
        "Host memory. The total of one engine; LMCache counts per rank. --kv-offloading-size wins over it.",
        size, "host_bytes", "GiB", shown_default={Profile.LMCACHE: "5", Profile.OFFLOADING: "required"},
    ),
    Key(
        "cpu_bytes_to_use", _D, Theme.HOST, "number, bytes", None,
        "What vLLM makes of --kv-offloading-size GIB. Above all other sources for the size of host memory.",
        byte_count, "host_bytes", secondary=True, place=Place.EXTRA,
    ),
    Key(
        "reserve_local_cpu_size", _D, Theme.HOST, "number, GiB", 0.0,
        "Leave at least this much of the memory that is available at start; host memory becomes smaller for it. An error when "
        "less than 4 MiB would be left.",
        reserve, unit="GiB",
    ),
    Key(
        "local_cpu", _D, Theme.HOST, "flag", True,
        "false needs local_disk. Host memory of max_local_cpu_size is then what stages NVMe; unlike in LMCache, what lies in it "
        "is a hit all the same.",
        flag,
    ),
    Key(
        "local_cpu_use_hugepages", _D, Theme.HOST, "flag", False,
        "Host memory from the machine's reserved huge pages (vm.nr_hugepages).",
        flag, "hugetlb",
    ),
    Key(
        "numa_mode", _D, Theme.HOST, "auto, manual or null", None,
        "Where host memory lies: auto, on the NUMA nodes of the engine's GPUs; manual, on the nodes in extra_config's "
        "gpu_to_numa_mapping; null, wherever the kernel puts it.",
        numa_mode, shown_default="null",
    ),
    Key(
        "gpu_to_numa_mapping", _D, Theme.HOST, "mapping, GPU to node", None,
        "For numa_mode manual. Host memory is spread over all nodes named; LMCache gives each rank its GPU's.",
        numa_nodes, "numa_nodes", needs=("numa_mode",), place=Place.SUB,
    ),
)

NVME = (
    Key(
        "local_disk", _D, Theme.NVME, "path, list, or text with commas", None,
        "Directory of the NVMe tier; file:// is allowed. Each engine owns one below it (vllm-dp0, vllm-dp1, ...). With several "
        "directories, one per drive, chunks are striped over them and one that fails costs its chunks only. Kept across restarts, "
        "unlike in LMCache.",
        directories, "directories", shown_default="none: host memory only",
    ),
    Key(
        "max_local_disk_size", _D, Theme.NVME, "number, GiB", 0.0,
        "Hard limit on NVMe, required with local_disk. The total of all engines of the node and of all directories, shared evenly; "
        "LMCache counts per rank.",
        size_or_zero, "nvme_bytes", "GiB", shown_default="required with local_disk",
    ),
    Key(
        "local_disk_sizes", _D, Theme.NVME, "list of numbers, GiB", None,
        "Hard limit of each directory, in the order of local_disk, for drives of different sizes. max_local_disk_size is their sum "
        "then, and may be left out.",
        sizes, "directory_bytes", "GiB", shown_default="even shares of max_local_disk_size",
    ),
    Key(
        "local_disk_path_sharding", _D, Theme.NVME, "by_gpu or by_engine", "by_gpu",
        "How several directories are used. by_gpu: all by each engine, as LMCache's ranks together use all. by_engine: engine i "
        "uses directory i modulo their number.",
        striped, "striped",
    ),
    Key(
        "local_disk_min_free", _D, Theme.NVME, "number, GiB", 0.25,
        "Space of each file system that is never taken. Where less is free, regions are reused instead of added.",
        reserve, "nvme_free_floor_bytes", "GiB",
    ),
    Key(
        "local_disk_daily_writes", _D, Theme.NVME, "number, GiB, or unlimited", None,
        "Hard limit on what is written to NVMe within 24 hours, over restarts: a drive wears out by it. The total of all "
        "engines of the node.",
        daily_size, "nvme_daily_bytes", "GiB", shown_default="what the file systems hold, once a day",
    ),
    Key(
        "local_disk_admission", _D, Theme.NVME, "auto, always or second_touch", "auto",
        "What is written to NVMe. auto: everything; once three quarters of the day's limit are written, or while writes wait "
        "longer than a second, only what was stored or used before. always: everything within the limit. second_touch: only what "
        "was stored or used before.",
        one_of(*ADMISSIONS), "admission",
    ),
    Key(
        "local_disk_write_deadline", _D, Theme.NVME, "number, s", 10.0,
        "A chunk that waited so long for its write is given up: the device cannot keep up.",
        seconds, "write_deadline_s",
    ),
    Key(
        "verify", _D, Theme.NVME, "off, nvme or all", "nvme",
        "What is checked before a request gets it. nvme: all that comes from NVMe. all: chunks in host memory too, which costs a "
        "checksum over each. off: of records only their identity, not the payload; for measuring.",
        one_of(*VERIFY), "verify",
    ),
    Key(
        "io_engine", _D, Theme.NVME, "auto, io_uring or threads", "auto",
        "How NVMe is read and written. auto takes io_uring where the kernel allows it and says which in the log.",
        one_of(*IO_ENGINES), "io_engine",
    ),
    Key(
        "region_size", _D, Theme.NVME, "number, GiB", None,
        "Piece in which NVMe space is reused.",
        size, "region_bytes", "GiB", shown_default="0.25 where there is room",
    ),
    Key(
        "fail_when_locked", _D, Theme.NVME, "flag", False,
        "Whether a directory that another process owns is an error. Otherwise the engine runs with host memory only until it can "
        "take the directory over.",
        flag, "fail_when_locked",
    ),
    Key(
        "lock_wait", _D, Theme.NVME, "number, s", 10.0,
        "How long the start waits for a directory that another process owns: until the error of fail_when_locked. Without that, "
        "a second at most.",
        seconds_or_zero, "lock_wait_s",
    ),
    Key(
        "local_disk_io_timeout", _D, Theme.NVME, "number, s", 30.0,
        "A disk that answers nothing for so long is not used any more: what is on it is a miss until the engine is started anew. "
        "A sync may take up to four times as long while reads or writes are answered; what takes longer counts whatever else is.",
        seconds, "nvme_io_timeout_s",
    ),
    Key(
        "local_disk_allow_network", _D, Theme.NVME, "flag", False,
        "Whether local_disk may be on NFS, SMB, Ceph, AFS, Lustre, GPFS, 9p, BeeGFS, OCFS2 or GFS2. Neither locks nor syncs are "
        "sure to hold there. FUSE is not looked into: sshfs, JuiceFS and GlusterFS are network file systems too.",
        flag, "allow_network_file_system",
    ),
    Key(
        "data_parallel_engines", _D, Theme.NVME, "whole number", None,
        "Engines on this node that share max_local_disk_size. Needed only where vLLM does not say it itself.",
        whole(1, 4096), "data_parallel_engines", shown_default="vLLM's",
    ),
)

GDS = (
    Key(
        "use_gds", _D, Theme.GDS, "auto, on, off, or flag", True,
        "Whether workers read NVMe by GPUDirect Storage, past host memory (docs/gds.md). auto, or LMCache's true: where a probe at "
        "start finds it real and faster. on: an error at start where it is not real. Of LMCacheNativeConnector, not with "
        "use_layerwise. on must be in quotes in YAML, where it means true.",
        use_gds, "use_gds", shown_default="auto",
    ),
    Key(
        "gds_path", _D, Theme.GDS, "path, list, or text with commas", None,
        "Must be what local_disk is, or left out: GPUDirect Storage is another way to read the one store, not a tier of its own.",
        directories, shown_default="local_disk",
    ),
    Key(
        "gds_buffer_size", _D, Theme.GDS, "whole number, MiB", None,
        "Device memory that records are read into, per rank; it bounds those in flight.",
        mebibytes, "gds_buffer_bytes", "MiB", shown_default="256",
    ),
)

CHUNKS = (
    Key(
        "chunk_size", _D, Theme.CHUNKS, "whole number, tokens", 256,
        "Tokens of a chunk: what is stored and found as one. For the offloading connector a multiple of the engine's block.",
        whole(1, 1 << 20), "chunk_tokens", shown_default={Profile.LMCACHE: "256", Profile.OFFLOADING: "the engine's block"},
    ),
    Key(
        "cache_policy", _D, Theme.CHUNKS, "text", "LRU",
        "Which chunk host memory gives up first: LRU, S3FIFO, LFU, FIFO or MRU, in any case. Another name stops the start.",
        text, "cache_policy",
    ),
    Key(
        "pre_caching_hash_algorithm", _D, Theme.CHUNKS, "name of LMCache or vLLM", "builtin",
        "Every known name is accepted and none changes anything: keys are a SHA-256 chain, the same in all processes. "
        "PYTHONHASHSEED is not needed.",
        one_of(*HASH_ALGORITHMS),
    ),
    Key(
        "model_fingerprint", _D, Theme.CHUNKS, "text", None,
        "Names the weights, where the files are not there to be looked at. Change it when the weights change.",
        text, "model_fingerprint", shown_default="from the files",
    ),
    Key(
        "extra_config", _D, Theme.CHUNKS, "mapping, or JSON text of one", None,
        "Further keys, marked extra_config in these tables. As in LMCache a later source replaces the whole mapping.",
        mapping,
    ),
)

LOADING = (
    Key(
        "enable_async_loading", _D, Theme.LOADING, "flag", True,
        "Whether the engine computes other requests while one is loaded. LMCache's default is false; here only an explicit "
        "false makes loads synchronous.",
        flag, "async_loading", connectors=TOKEN, elsewhere="it always loads asynchronously", shown_default="true",
    ),
    Key(
        "use_layerwise", _D, Theme.LOADING, "flag", False,
        "Load and store layer by layer, while the engine computes. Loads are then synchronous.",
        flag, "layerwise", connectors=TOKEN,
    ),
    Key(
        "min_retrieve_tokens", _D, Theme.LOADING, "whole number, tokens", 0,
        "A hit of fewer tokens is not loaded.",
        whole(0), "min_retrieve_tokens", connectors=TOKEN,
    ),
    Key(
        "hit_miss_ratio", _D, Theme.LOADING, "number, 0 to 1", None,
        "For tests: at most this part of a prompt is a hit.",
        ratio, "hit_miss_ratio", connectors=TOKEN,
    ),
    Key(
        "retrieve_locations", _D, Theme.LOADING, "list of names", None,
        "LocalCPUBackend, or LocalCPUBackend and LocalDiskBackend. Without LocalDiskBackend nothing is looked up on NVMe.",
        retrieves_nvme, "retrieve_nvme", connectors=TOKEN, shown_default="both",
    ),
    Key(
        "blocking_timeout_secs", _D, Theme.LOADING, "number, s", 10,
        "How long a synchronous load may take; afterwards its tokens are computed.",
        seconds, "load_timeout_s", connectors=TOKEN, elsewhere="no load blocks the engine there",
    ),
    Key(
        "promotion_deadline", _D, Theme.LOADING, "number, s", 10.0,
        "How long a request waits for NVMe before the chunk counts as a miss.",
        seconds, "promotion_deadline_s",
    ),
    Key(
        "lookup_timeout_ms", _D, Theme.LOADING, "number, ms", 3000,
        "LMCache's name for promotion_deadline. When absent, the default is ours (10 s).",
        milliseconds, "promotion_deadline_s", "ms", secondary=True, shown_default="",
    ),
    Key(
        "promotion_budget", _D, Theme.LOADING, "number, GiB", None,
        "How much one request may bring from NVMe into host memory.",
        size, "promotion_budget_bytes", "GiB", shown_default="half of host memory",
    ),
    Key(
        "request_ttl", _D, Theme.LOADING, "number, s", 30.0,
        "Hits of a request that is not scheduled for so long are unpinned.",
        seconds, "request_ttl_s",
    ),
    Key(
        "pin_timeout_sec", _D, Theme.LOADING, "number, s", 300,
        "LMCache's name for request_ttl. When absent, the default is ours (30 s).",
        seconds, "request_ttl_s", secondary=True, shown_default="",
    ),
    Key(
        "load_failure_policy", _D, Theme.LOADING, "recompute or fail", "recompute",
        "What a failed load is for the request: its tokens are computed, or it ends with an error.",
        one_of(*LOAD_FAILURE_POLICIES), "load_failure_policy",
    ),
    Key(
        "copy_threads", _D, Theme.LOADING, "whole number", 1,
        "Threads of each worker that copy, where there is no GPU.",
        whole(1, 64), "copy_threads",
    ),
)

SAVING = (
    Key(
        "save_decode_cache", _D, Theme.SAVING, "flag", False,
        "Whether generated tokens are stored too. For the offloading connector see offload_prompt_only.",
        flag, "save_decode", connectors=TOKEN,
    ),
    Key(
        "save_unfull_chunk", _D, Theme.SAVING, "flag", False,
        "Whether the last tokens of a prompt, fewer than a chunk, are stored.",
        flag, "save_partial_chunk", connectors=TOKEN,
    ),
    Key(
        "discard_partial_chunks", _D, Theme.SAVING, "flag", False,
        "true overrules save_unfull_chunk.",
        flag, connectors=TOKEN, elsewhere="it stores whole chunks only", place=Place.EXTRA,
    ),
    Key(
        "priority_limit", _D, Theme.SAVING, "whole number", None,
        "Requests whose priority value is larger are not stored.",
        whole(), "priority_limit", connectors=TOKEN,
    ),
    Key(
        "store_location", _D, Theme.SAVING, "name", None,
        "LocalCPUBackend without local_disk, LocalDiskBackend with it: what is stored goes to host memory first and, where "
        "there is local_disk, to NVMe too.",
        text,
    ),
    Key(
        "force_skip_save", _D, Theme.SAVING, "flag", False,
        "Load only, store nothing. In LMCache an environment variable where any text, also false, counts as true.",
        flag, "skip_save", connectors=TOKEN,
    ),
)

PROCESS = (
    Key(
        "lmcache_instance_id", _D, Theme.PROCESS, "text", None,
        "A name for this instance, for logs and events.",
        text, "instance_id",
    ),
    Key(
        "enable_kv_events", _D, Theme.PROCESS, "flag", False,
        "Tell vLLM's event publisher which chunks came into or left which tier (docs/metrics.md).",
        flag, "kv_events", connectors=TOKEN,
    ),
    Key(
        "log_requests", _D, Theme.PROCESS, "flag", False,
        "A log line for each request: prompt tokens, and how many of them were a hit in which tier. false: at DEBUG only.",
        flag, "log_requests",
    ),
    Key(
        "py_enable_gc", _D, Theme.PROCESS, "flag", True,
        "false turns Python's garbage collector off in the engine's processes.",
        flag, "python_gc", connectors=TOKEN,
    ),
    Key(
        "native", _D, Theme.PROCESS, "flag", None,
        "Which connector names are ours. true: LMCacheConnectorV1, LMCacheMPConnector (also when LMCache is installed) and "
        "--kv-offloading-size. false: none. Not set: LMCache's names, unless LMCache is installed.",
        place=Place.ENVIRONMENT,
    ),
    Key(
        "config_file", _D, Theme.PROCESS, "path", None,
        "A file of these keys: JSON when its name ends in .json, else YAML.",
        place=Place.ENVIRONMENT,
    ),
    Key(
        "log_level", _D, Theme.PROCESS, "DEBUG, INFO, WARNING, ...", "INFO",
        "Level of our log.",
        place=Place.ENVIRONMENT,
    ),
    Key(
        "native_compat_metrics", _D, Theme.PROCESS, "flag", False,
        "vLLM's /metrics has LMCache's own names (lmcache:...) too, as far as they can be filled: docs/metrics.md.",
        place=Place.ENVIRONMENT,
    ),
    Key(
        "native_ignore_unsupported", _D, Theme.PROCESS, "flag", False,
        "Unsupported keys become one warning instead of an error. Wrong values stay errors.",
        flag, place=Place.ENVIRONMENT,
    ),
)

REQUEST = (
    Key(
        "lmcache.skip_save", _D, Theme.REQUEST, "flag", False,
        "This request is not stored.",
        place=Place.REQUEST,
    ),
    Key(
        "lmcache.tag.*", _D, Theme.REQUEST, "text or number", None,
        "Part of the key: a request hits only chunks of requests with the same tags. The engine's own prefix cache knows no tags.",
        place=Place.REQUEST,
    ),
    Key(
        "lmcache.priority", _D, Theme.REQUEST, "low, normal or high", "normal",
        "Of the chunks that the request stores, and of its promotions. low: they leave host memory before others, until another "
        "request uses them, and are written to NVMe only once they were used or stored again. high: they are written to NVMe also "
        "while writes are dear, within the day's limit. Promotions wait behind those of a higher priority.",
        place=Place.REQUEST,
    ),
    Key(
        "lmcache.report", _D, Theme.REQUEST, "flag", False,
        "The response's kv_transfer_params say how many prompt tokens were a hit in which tier.",
        place=Place.REQUEST,
    ),
)

VLLM = (
    Key(
        "block_size", _D, Theme.VLLM, "whole number, tokens", None,
        "Tokens of a chunk, as chunk_size.",
        connectors=BLOCK, instead="use chunk_size", place=Place.EXTRA,
    ),
    Key(
        "blocks_per_chunk", _D, Theme.VLLM, "whole number", None,
        "Engine blocks of a chunk.",
        connectors=BLOCK, instead="use chunk_size", place=Place.EXTRA,
    ),
    Key(
        "offload_prompt_only", _D, Theme.VLLM, "flag", True,
        "false stores generated tokens too.",
        connectors=BLOCK, instead="use save_decode_cache", place=Place.EXTRA,
    ),
    Key(
        "self_describing_kv_events", _D, Theme.VLLM, "flag", False,
        "vLLM's events carry tokens and parent.",
        connectors=BLOCK, instead="use enable_kv_events", place=Place.EXTRA,
    ),
    Key(
        "spec_name", _D, Theme.VLLM, "name", None,
        "Filled in by the offloading connector.",
        connectors=BLOCK, elsewhere="it has no spec", place=Place.EXTRA,
    ),
    Key(
        "spec_module_path", _D, Theme.VLLM, "module", None,
        "Not needed.",
        connectors=BLOCK, elsewhere="it has no spec", place=Place.EXTRA,
    ),
)
# fmt: on

ROWS = HOST + NVME + GDS + CHUNKS + LOADING + SAVING + PROCESS + REQUEST + VLLM
