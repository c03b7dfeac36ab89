"""LMCacheNativeConnector: what LMCache's users reach as LMCacheConnectorV1 or with `--kv-offloading-backend lmcache`.

Works on tokens: chunks may be smaller or larger than the engine's block. vLLM makes one connector in the scheduler's process and
one in each worker.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lmcache_native.config import GIB, NativeConfig, Profile, check_machine, resolve
from lmcache_native.integration.vllm import compat, gds, layout, namespace, pages, spec, support
from lmcache_native.integration.vllm.opening import StoreOpening
from lmcache_native.integration.vllm.replicated import is_replicated
from lmcache_native.integration.vllm.token_scheduler import TokenScheduler
from lmcache_native.integration.vllm.token_worker import TokenWorker
from lmcache_native.integration.vllm.transfer import TokenConnectorMetadata, TokenWorkerMetadata
from lmcache_native.logging import get_logger

logger = get_logger(__name__)


class LMCacheNativeConnector(compat.KVConnectorBase_V1, compat.SupportsHMA):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        scheduler = role == compat.KVConnectorRole.SCHEDULER
        transfer = vllm_config.kv_transfer_config
        if scheduler:
            compat.warn_if_untested()
        self._config = loads_that_are_safe(configuration(vllm_config, warn=scheduler), vllm_config, warn=scheduler)
        support.check_role(transfer.kv_role)
        support.check_parallelism(vllm_config.parallel_config)
        self._group = support.offloaded_group(kv_cache_config)
        self._replicated = is_replicated(vllm_config, kv_cache_config)
        # vLLM's default, "fail", would turn a cache's failed load into a failed request. Its own field cannot be told apart from
        # its default, so the choice is ours: load_failure_policy. Read by the scheduler right after this.
        transfer.kv_load_failure_policy = self._config.load_failure_policy
        if not self._config.python_gc:
            gc.disable()
        self._worker: TokenWorker | None = None
        self._scheduler: TokenScheduler | None = None
        self._opening: StoreOpening | None = None
        if scheduler:
            check_machine(self._config)
            self._opening = StoreOpening(vllm_config, self._config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: a store that is dropped is a miss later

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """vLLM asks in the front end. Inside a whole graph wait_for_layer_load would run at capture only, never at replay; between
        the pieces it runs each time. Everything else of a load is ordered by the stream, before the graph is launched."""
        return resolve(extra_config, os.environ, profile=Profile.LMCACHE).layerwise

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()

    # ---- worker -------------------------------------------------------------------------------------------------------

    @property
    def worker(self) -> TokenWorker:
        assert self._worker is not None, "register_kv_caches comes first"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        found = pages.describe(self._vllm_config, self._kv_cache_config, kv_caches)
        self._backends = compat.attention_backends(self._vllm_config, list(kv_caches))
        tokens = chunk_tokens(self._config, found)
        loader = gds.record_loader(
            self._config,
            self._vllm_config,
            found.paged_layout(),
            found.slot_layout(tokens),
            device_type=found.device_type,
            device=found.device_index,
            owner=found.tensors,
            replicated=self._replicated,
        )
        self._worker = TokenWorker(
            found,
            self._group.layer_names,
            chunk_tokens=tokens,
            engine_id=self._vllm_config.kv_transfer_config.engine_id,
            rank=self._vllm_config.parallel_config.rank,
            ranks=self._vllm_config.parallel_config.world_size,
            copy_threads=self._config.copy_threads,
            load_timeout_s=self._config.load_timeout_s,
            layerwise=self._config.layerwise,
            loader=loader,
            replicated=self._replicated,
        )

    def get_handshake_metadata(self) -> layout.WorkerLayout:
        found = self.worker.pages
        return layout.WorkerLayout(
            rank=self._vllm_config.parallel_config.rank,
            layers=found.layers,
            page_bytes=found.planes * found.token_bytes,
            rank_bytes=self.worker.slot_layout.rank_bytes,
            layout_id=pages.layout_id(self._vllm_config, found, self._backends),
            machine=layout.machine_id(),
            chunk_tokens=self.worker.chunk_tokens,
            opaque=found.opaque,
            reads_nvme=self.worker.reads_nvme,
            replicated=self._replicated,
        )

    def handle_preemptions(self, kv_connector_metadata: TokenConnectorMetadata) -> None:
        """vLLM calls it at the start of every step."""
        self.worker.begin_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.worker.start_loads(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Stores follow the whole forward pass, asynchronously."""

    def wait_for_save(self) -> None:
        self.worker.end_step(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self.worker.take_received() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Called right after get_finished: in the same step in which a failed load's request is reported as received."""
        return self.worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> TokenWorkerMetadata | None:
        return self._worker.take_report() if self._worker is not None else None

    # ---- scheduler ----------------------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> TokenScheduler:
        assert self._scheduler is not None, "set_xfer_handshake_metadata comes first"
        return self._scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """All workers have registered their KV caches: opens the store, before the first request."""
        assert self._opening is not None
        world = self._vllm_config.parallel_config.world_size
        agreed = layout.agreed_layout(metadata, world, replicated=self._replicated)
        chunk_bytes = agreed.rank_bytes * agreed.parts(world)
        block_tokens = self._group.kv_cache_spec.block_size
        scheme = namespace.token_scheme(agreed.chunk_tokens, block_tokens if agreed.opaque else None)
        description = namespace.describe(self._vllm_config, self._config, agreed, (self._group,), scheme)
        namespaces = namespace.Namespaces(description)
        readers = sorted(rank for rank, worker in metadata.items() if worker.reads_nvme)
        if 0 < len(readers) < world:
            logger.warning("only ranks %s of %d can read NVMe themselves: loads go through host memory", readers, world)
        self._scheduler = TokenScheduler(
            self._config,
            self._opening.open(agreed.rank_bytes, replicated=agreed.replicated),
            namespaces,
            chunk_tokens=agreed.chunk_tokens,
            chunk_bytes=chunk_bytes,
            block_tokens=block_tokens,
            partial_chunks=not agreed.opaque,
            direct_loads=len(readers) == world,
            forget_blocks=self._forget_blocks,
        )
        pages_text = f"blocks of {block_tokens} tokens " + ("as opaque pages" if agreed.opaque else "addressed by token")
        self._opening.log_start(
            self._scheduler.store,
            f"as {self._vllm_config.kv_transfer_config.kv_connector}",
            f"chunk {agreed.chunk_tokens} tokens, {chunk_bytes} bytes{layout.copies_text(agreed, world)}, {pages_text}",
        )
        logger.info("namespace %s", namespaces.plain().hex())
        logger.debug("namespace is of:\n%s", namespace.canonical_text(description))

    def _forget_blocks(self) -> None:
        self._kv_cache_manager.evict_blocks(set(range(1, self._kv_cache_config.num_blocks)))  # 0 is vLLM's null block

    def on_new_request(self, request: Any) -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self.scheduler.match(request, num_computed_tokens)
        return tokens, bool(tokens) and self._config.async_loading

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        (block_ids,) = blocks.get_block_ids()
        self.scheduler.allocated(request, block_ids, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        return self.scheduler.sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> TokenConnectorMetadata:
        return self.scheduler.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, TokenWorkerMetadata):
            self.scheduler.update(meta)

    def has_pending_push_work(self) -> bool:
        return self.scheduler.busy

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler.request_finished(request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def take_events(self) -> Iterable[Any]:
        return self.scheduler.take_events()

    def reset_cache(self) -> bool:
        self.scheduler.reset()
        return True

    def get_kv_connector_stats(self) -> Any:
        return self._scheduler.stats() if self._scheduler is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return compat.OffloadingConnectorStats() if data is None else compat.OffloadingConnectorStats(data=data)

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """In the front end, whose configuration no connector has touched. vLLM takes the metrics' definitions from a spec."""
        vllm_config.kv_transfer_config.kv_connector_extra_config["spec_name"] = spec.NAME
        return compat.OffloadPromMetrics(vllm_config, *args, **kwargs)


def configuration(vllm_config: Any, *, warn: bool = False) -> NativeConfig:
    """--kv-offloading-size wins over max_local_cpu_size; vLLM drops it with `--kv-offloading-backend lmcache`, we do not."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    size = vllm_config.cache_config.kv_offloading_size
    if size is not None:
        extra = extra | {"cpu_bytes_to_use": size * GIB}
    return resolve(extra, os.environ, profile=Profile.LMCACHE, warn=warn)


def loads_that_are_safe(config: NativeConfig, vllm_config: Any, *, warn: bool) -> NativeConfig:
    """With asynchronous scheduling vLLM plans a step before it knows that a load of the one before failed, lets other requests
    compute on its blocks, and does not compute them again. So loads are asynchronous there, which is safe."""
    if config.async_loading or not vllm_config.scheduler_config.async_scheduling:
        return config
    if warn:
        logger.warning(
            "%s: not with vLLM's asynchronous scheduling, where a failed load could end in wrong text; loads are asynchronous "
            "(--no-async-scheduling allows it)",
            "use_layerwise" if config.layerwise else "enable_async_loading=false",
        )
    return replace(config, async_loading=True, layerwise=False)


def chunk_tokens(config: NativeConfig, found: pages.TokenPages) -> int:
    """chunk_size; rounded up to whole blocks, with one log line, where pages are opaque."""
    asked = config.chunk_tokens
    assert asked is not None
    if not found.opaque:
        return asked
    rounded = -(-asked // found.block_tokens) * found.block_tokens
    logger.warning(
        "this engine's KV pages are not addressed token by token (%s): copied as whole blocks, chunk_size %d%s",
        found.reason,
        rounded,
        "" if rounded == asked else f" instead of {asked}",
    )
    return rounded
