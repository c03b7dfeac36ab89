"""What a worker tells the scheduler about its KV memory, and the check that all ranks say the same.

Pages are opaque: exact for one engine version, attention backend and cache layout, which the layout id names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_native import PagedKvLayout, SlotLayout, cuda_status
from lmcache_native.errors import InvalidArgument, Unavailable, Unsupported
from lmcache_native.integration.vllm import compat


@dataclass(frozen=True)
class WorkerLayout(compat.KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Travels in the handshake; must pickle."""

    rank: int
    layers: int
    page_bytes: int  # of one layer's page; where pages are addressed by token, of one token
    rank_bytes: int
    layout_id: str
    machine: str
    chunk_tokens: int = 0  # 0: the scheduler knows
    opaque: bool = True
    reads_nvme: bool = False  # takes loads with records


@dataclass(frozen=True, slots=True)
class PagedMemory:
    """One rank's paged KV memory: `layers` tensors of equal pages, seen as bytes."""

    bases: tuple[int, ...]
    num_blocks: int
    page_bytes: int
    block_stride: int
    device_type: str
    device_index: int

    @classmethod
    def of(cls, kv_caches: Any) -> PagedMemory:
        """REQUIRES: one KV cache group. Unsupported when its layers differ in page size, stride or device."""
        if len(kv_caches.group_data_refs) != 1:
            raise Unsupported(f"{len(kv_caches.group_data_refs)} KV cache groups: not yet supported, only models with one")
        used: dict[int, int] = {}
        for ref in kv_caches.group_data_refs[0]:
            used[ref.tensor_idx] = max(used.get(ref.tensor_idx, 0), int(ref.page_size_bytes))
        tensors = [kv_caches.tensors[index].tensor for index in sorted(used)]
        shapes = {
            (int(tensor.shape[0]), used[index], int(tensor.stride(0)) * tensor.element_size(), str(tensor.device))
            for index, tensor in zip(sorted(used), tensors, strict=True)
        }
        if len(shapes) != 1:
            raise Unsupported(
                "KV cache layers with different (blocks, page bytes, block stride, device): not yet supported: "
                + ", ".join(map(str, sorted(shapes)))
            )
        ((num_blocks, page_bytes, block_stride, _),) = shapes
        device = tensors[0].device
        return cls(
            bases=tuple(int(tensor.data_ptr()) for tensor in tensors),
            num_blocks=num_blocks,
            page_bytes=page_bytes,
            block_stride=block_stride,
            device_type=str(device.type),
            device_index=device.index or 0,
        )

    def paged_layout(self) -> PagedKvLayout:
        return PagedKvLayout.opaque(list(self.bases), self.num_blocks, self.page_bytes, self.block_stride)

    def check_holds(self, caches: Mapping[str, Any]) -> None:
        """Unsupported, naming the layer, unless each block of these caches lies whole inside one page. vLLM cuts pages out of the
        memory by the layer's page size and block stride alone, which is not where the layer's data is when heads or padding lie
        between blocks."""
        for name, cache in caches.items():
            blocks = compat.group_kernel_blocks(cache, self.num_blocks)
            item = cache.element_size()
            reach, begin, stride = item * elements_reached(blocks[0]), int(cache.data_ptr()), int(blocks.stride(0)) * item
            inside = any(base <= begin and begin + reach <= base + self.page_bytes for base in self.bases)
            if not inside or (self.num_blocks > 1 and stride != self.block_stride):
                raise Unsupported(
                    f"KV cache of {name}: a block spans {reach} bytes and the next begins {stride} bytes on, which is not within "
                    f"the pages that vLLM gives a connector ({self.page_bytes} bytes every {self.block_stride}): use "
                    "VLLM_KV_CACHE_LAYOUT=LBHNC"
                )


def elements_reached(view: Any) -> int:
    """From the first element of a tensor to its last, both included."""
    return 1 + sum((int(size) - 1) * int(stride) for size, stride in zip(view.shape, view.stride(), strict=True))


def check_devices(caches: Mapping[str, Any]) -> None:
    """Unsupported, naming the layer, unless all lie on the CPU, or all on the CUDA device on which this thread runs the model and
    that this build of lmcache-native can reach."""
    (first, cache), *_ = caches.items()
    for name, other in caches.items():
        if other.device != cache.device:
            raise Unsupported(
                f"KV cache of {name} is on {other.device}, that of {first} on {cache.device}: a worker copies to and from one "
                "device, all of its layers must be on it"
            )
    device = cache.device
    if device.type == "cpu":
        return
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        backend = "ROCm" if device.type == "cuda" else device.type
        raise Unsupported(
            f"KV cache of {first} is on {device} ({backend}): not yet supported, must be on a CUDA device or on the CPU"
        )
    status = cuda_status()
    if not status["built"] or not status["devices"]:
        raise Unsupported(
            f"KV cache of {first} is on {device}, which this lmcache-native cannot copy from: {status['message']}; "
            "`lmcache-native doctor` says more"
        )
    current = torch.cuda.current_device()
    if device.index != current:
        raise Unsupported(
            f"KV cache of {first} is on {device}, but this worker runs the model on cuda:{current}: must be on that device"
        )


# A block of these sizes is never split for a kernel by a backend that takes any layout.
_UNSPLIT_BLOCK_TOKENS = (16, 32, 64)


def block_outermost(vllm_config: Any) -> str | None:
    """For opaque pages on CUDA: the name of vLLM's cache layout in which a block's pages of all layers are one piece, so that a
    block is one copy instead of one for each layer. None where vLLM might not start with it.

    vLLM asks once, in the engine core, where the backends are not known. VLLM_KV_CACHE_LAYOUT is stronger, and what a backend does
    not take is dropped with a warning; but blocks that a kernel wants in smaller pieces fail the start, hence the sizes."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if not compat.current_platform.is_cuda() or model.is_hybrid or model.use_mla or cache.kv_cache_dtype_skip_layers:
        return None
    if cache.user_specified_block_size and cache.block_size not in _UNSPLIT_BLOCK_TOKENS:
        return None
    attention = vllm_config.attention_config
    named = [*attention.backend_per_kind.values(), *([attention.backend] if attention.backend else [])]
    taken = [backend.get_class().supported_kv_cache_layouts() for backend in named]
    return "BLHNC" if all(kinds is None or any(kind.name == "BLHNC" for kind in kinds) for kinds in taken) else None


def slot_layout(layers: int, page_bytes: int, blocks_per_chunk: int) -> SlotLayout:
    """Opaque pages: one plane, and a page plays the part of a token."""
    return SlotLayout.from_sizes(layers=layers, planes=1, token_bytes=page_bytes, chunk_tokens=blocks_per_chunk)


def layout_id(vllm_config: Any, device_type: str, backends: list[str]) -> str:
    """Names everything that decides how vLLM packs a page. Equal ids: a page may be copied back byte by byte."""
    cache = vllm_config.cache_config
    parts = {
        "engine": "vllm-" + compat.vllm_version(),
        "runner": "v2" if vllm_config.use_v2_model_runner else "v1",
        "backend": "+".join(backends),
        "cache_layout": cache.kv_cache_layout,
        "cache_dtype": cache.cache_dtype,
        "model_dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "device": device_type,
    }
    return "opaque:" + ";".join(f"{name}={value}" for name, value in parts.items())


def machine_id() -> str:
    """Differs between machines, and between restarts of one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def agreed_layout(layouts: Mapping[int, Any], world_size: int) -> WorkerLayout:
    """The layout all ranks share. Typed errors: a rank missing, on another machine, or of another mind."""
    missing = sorted(set(range(world_size)) - set(layouts))
    if missing:
        raise Unavailable(f"no KV layout from rank(s) {missing} of {world_size}: their connector did not register its KV caches")
    strangers = sorted(rank for rank, layout in layouts.items() if not isinstance(layout, WorkerLayout))
    if strangers:
        raise InvalidArgument(f"rank(s) {strangers} run another KV connector: {type(layouts[strangers[0]]).__name__}")
    here = machine_id()
    elsewhere = sorted(rank for rank, layout in layouts.items() if layout.machine != here)
    if elsewhere:
        raise Unsupported(f"rank(s) {elsewhere} are on another machine than the scheduler: not yet supported")
    first: WorkerLayout = layouts[0]
    for rank, layout in sorted(layouts.items()):
        for name in ("layers", "page_bytes", "rank_bytes", "layout_id", "chunk_tokens", "opaque"):
            ours, theirs = getattr(first, name), getattr(layout, name)
            if ours != theirs:
                raise InvalidArgument(f"ranks disagree on {name}: rank 0 has {ours!r}, rank {rank} has {theirs!r}")
    return first
