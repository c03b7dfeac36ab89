"""What a worker tells the scheduler about its KV memory, and the check that all ranks say the same.

Pages are opaque: exact for one engine version, attention backend and cache layout, which the layout id names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_native import PagedKvLayout, PlaneStrides, SlotLayout, cuda_status
from lmcache_native.errors import InvalidArgument, Unavailable, Unsupported
from lmcache_native.integration.vllm import compat


@dataclass(frozen=True)
class GroupLayout:
    """One KV cache group of one rank."""

    pages: str  # "LAYERSxBYTES" of its pages, in the group's order; "+" between runs of equal ones
    rank_bytes: int  # one rank's part of a chunk


@dataclass(frozen=True)
class WorkerLayout(compat.KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Travels in the handshake; must pickle. Of several KV cache groups: `layers` and `page_bytes` of the first, `rank_bytes` of
    the largest."""

    rank: int
    layers: int
    page_bytes: int  # of one layer's page; where pages are addressed by token, of one token
    rank_bytes: int
    layout_id: str
    machine: str
    chunk_tokens: int = 0  # 0: the scheduler knows
    opaque: bool = True
    reads_nvme: bool = False  # takes loads with records
    groups: tuple[GroupLayout, ...] = ()  # empty: the one group that is said above
    replicated: bool = False  # all ranks share one part of a slot

    def parts(self, world_size: int) -> int:
        """Of a chunk, each of rank_bytes."""
        return 1 if self.replicated else world_size


MAX_PIECES = 1 << 16


@dataclass(frozen=True, slots=True)
class Page:
    """One layer's, or of all layers of a block when these are one piece of memory: block b lies at base + b * block_stride."""

    base: int
    bytes: int
    block_stride: int


@dataclass(frozen=True, slots=True)
class PagedMemory:
    """One KV cache group's paged memory of one rank, seen as bytes. The copier knows layers of equal pages, so pages that differ
    are cut into pieces of one size, each of which is a layer to it."""

    pages: tuple[Page, ...]
    num_blocks: int
    device_type: str
    device_index: int

    @classmethod
    def of_groups(cls, kv_caches: Any) -> tuple[PagedMemory, ...]:
        """In vLLM's order of groups. Groups share memory: a block is of one group at a time."""
        return tuple(cls._of(kv_caches, refs) for refs in kv_caches.group_data_refs)

    @classmethod
    def _of(cls, kv_caches: Any, refs: Any) -> PagedMemory:
        used: dict[int, int] = {}
        for ref in refs:
            used[ref.tensor_idx] = max(used.get(ref.tensor_idx, 0), int(ref.page_size_bytes))
        tensors = {index: kv_caches.tensors[index].tensor for index in sorted(used)}
        places = {(int(tensor.shape[0]), str(tensor.device)) for tensor in tensors.values()}
        if len(places) != 1:
            raise Unsupported(
                "KV cache layers with different (blocks, device): not yet supported: " + ", ".join(map(str, sorted(places)))
            )
        first = next(iter(tensors.values()))
        memory = cls(
            pages=tuple(
                Page(int(tensor.data_ptr()), used[index], int(tensor.stride(0)) * tensor.element_size())
                for index, tensor in tensors.items()
            ),
            num_blocks=int(first.shape[0]),
            device_type=str(first.device.type),
            device_index=first.device.index or 0,
        )
        if memory.pieces > MAX_PIECES:
            raise Unsupported(
                f"KV cache layers with pages of {memory.pages_text()} bytes: not yet supported, they have only "
                f"{memory.piece_bytes} bytes in common"
            )
        return memory

    @property
    def piece_bytes(self) -> int:
        return math.gcd(*(page.bytes for page in self.pages))

    @property
    def pieces(self) -> int:
        """Of one block."""
        return sum(page.bytes for page in self.pages) // self.piece_bytes

    def pages_text(self) -> str:
        """As in GroupLayout."""
        return "+".join(f"{len(list(run))}x{size}" for size, run in itertools.groupby(page.bytes for page in self.pages))

    def paged_layout(self) -> PagedKvLayout:
        piece = self.piece_bytes
        strides = {page.block_stride for page in self.pages}
        bases = [(page.base + offset, page.block_stride) for page in self.pages for offset in range(0, page.bytes, piece)]
        if len(strides) == 1:
            return PagedKvLayout.opaque([base for base, _ in bases], self.num_blocks, piece, strides.pop())
        return PagedKvLayout.strided(
            layers=[(base, [PlaneStrides(block=stride, token=piece, head=piece, dim=1)]) for base, stride in bases],
            num_blocks=self.num_blocks,
            block_tokens=1,
            heads=1,
            head_dim=piece,
            element_bytes=1,
        )

    def slot_layout(self, blocks_per_chunk: int) -> SlotLayout:
        """One plane, and a block's page plays the part of a token."""
        return SlotLayout.from_sizes(layers=self.pieces, planes=1, token_bytes=self.piece_bytes, chunk_tokens=blocks_per_chunk)

    def check_holds(self, caches: Mapping[str, Any]) -> None:
        """Unsupported, naming the layer, unless each block of these caches lies whole inside one page. vLLM cuts pages out of the
        memory by the layer's page size and block stride alone, which is not where the layer's data is when heads or padding lie
        between blocks."""
        for name, cache in caches.items():
            blocks = compat.group_kernel_blocks(cache, self.num_blocks)
            item = cache.element_size()
            reach, begin, stride = item * elements_reached(blocks[0]), int(cache.data_ptr()), int(blocks.stride(0)) * item
            if not any(
                page.base <= begin
                and begin + reach <= page.base + page.bytes
                and (self.num_blocks == 1 or stride == page.block_stride)
                for page in self.pages
            ):
                given = ", ".join(dict.fromkeys(f"{page.bytes} bytes every {page.block_stride}" for page in self.pages))
                raise Unsupported(
                    f"KV cache of {name}: a block spans {reach} bytes and the next begins {stride} bytes on, which is not within "
                    f"the pages that vLLM gives a connector ({given}): use VLLM_KV_CACHE_LAYOUT=LBHNC"
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


def copies_text(agreed: WorkerLayout, world_size: int) -> str:
    """For the line of the start."""
    return f" (one copy for {world_size} ranks)" if agreed.replicated else ""


def agreed_layout(layouts: Mapping[int, Any], world_size: int, *, replicated: bool = False) -> WorkerLayout:
    """The layout all ranks share. Typed errors: a rank missing, on another machine, or of another mind. `replicated`: the
    scheduler's."""
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
        for name in ("layers", "page_bytes", "rank_bytes", "layout_id", "chunk_tokens", "opaque", "groups", "replicated"):
            ours, theirs = getattr(first, name), getattr(layout, name)
            if ours != theirs:
                raise InvalidArgument(f"ranks disagree on {name}: rank 0 has {ours!r}, rank {rank} has {theirs!r}")
    if first.replicated != replicated:
        raise InvalidArgument(f"replicated: the workers have {first.replicated}, the scheduler has {replicated}: must be the same")
    return first
