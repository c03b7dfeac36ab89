"""How one worker's paged KV memory lies: tokens by strides that a probe proved, or pages that only the same engine understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lmcache_native import PagedKvLayout, PlaneStrides, SlotLayout
from lmcache_native.errors import InvalidArgument, LmcacheNativeError, Unsupported
from lmcache_native.integration.vllm import compat, layout, support
from lmcache_native.integration.vllm.probe import KEY_VALUE, LATENT, NotStrided, Probe, Strides, strides_of

T = TypeVar("T")


@dataclass(frozen=True)
class TokenPages:
    """One rank's paged KV memory of one KV cache group. Holds the tensors, so that the memory lives as long as this."""

    layers: int
    planes: int
    token_bytes: int  # of one plane of one layer; opaque: bytes of an engine block's page
    block_tokens: int  # per engine (manager) block
    num_blocks: int  # engine (manager) blocks
    opaque: bool
    element: str  # as torch names it; opaque: ""
    heads: int  # of this rank; opaque: 0
    head_dim: int  # opaque: 0
    device_type: str
    device_index: int
    reason: str  # why opaque, else ""
    tensors: tuple[Any, ...]  # one per layer
    blocks_per_block: int = 1  # kernel blocks per engine block; opaque: 1
    block_stride: int = 0  # bytes; opaque only
    strides: tuple[tuple[Strides, ...], ...] = ()  # [layer][plane]; opaque: empty

    def paged_layout(self) -> PagedKvLayout:
        """The native descriptor, of kernel blocks; opaque: of engine blocks' pages."""
        bases = [int(tensor.data_ptr()) for tensor in self.tensors]
        if self.opaque:
            return PagedKvLayout.opaque(bases, self.num_blocks, self.token_bytes, self.block_stride)
        return PagedKvLayout.strided(
            layers=[
                (base, [PlaneStrides(**plane._asdict()) for plane in planes])
                for base, planes in zip(bases, self.strides, strict=True)
            ],
            num_blocks=self.num_blocks * self.blocks_per_block,
            block_tokens=self.kernel_block_tokens,
            heads=self.heads,
            head_dim=self.head_dim,
            element_bytes=self.tensors[0].element_size(),
        )

    def slot_layout(self, chunk_tokens: int) -> SlotLayout:
        """REQUIRES, opaque: whole blocks; a block then plays the part of a token."""
        units = chunk_tokens
        if self.opaque:
            if chunk_tokens % self.block_tokens != 0:
                right = max(1, chunk_tokens // self.block_tokens) * self.block_tokens
                raise InvalidArgument(
                    f"chunk_tokens={chunk_tokens}: must be a multiple of the engine's block size, {self.block_tokens} tokens, for "
                    f"example {right}: KV pages are opaque ({self.reason})"
                )
            units //= self.block_tokens
        return SlotLayout.from_sizes(layers=self.layers, planes=self.planes, token_bytes=self.token_bytes, chunk_tokens=units)

    def block_ids(self, blocks: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Engine block ids as those of paged_layout(), blocks_per_block consecutive ones for each."""
        ids = np.asarray(blocks, dtype=np.int64).reshape(-1, 1) * self.blocks_per_block
        return (ids + np.arange(self.blocks_per_block, dtype=np.int64)).reshape(-1)

    @property
    def kernel_block_tokens(self) -> int:
        """Tokens per block of paged_layout(). Opaque: 1, and that one is a whole engine block."""
        return 1 if self.opaque else self.block_tokens // self.blocks_per_block


def describe(vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any]) -> TokenPages:
    """The one full-attention group's memory, in the order of the group's layers; layers that share one cache count once.

    Strided when the probe proves it for every layer, else opaque with a reason. The caches are bit-identical afterwards. Call it
    while nobody else uses the caches, on the thread (and, with CUDA, the current stream) that runs the model.
    Unsupported: several groups, layers that are not all on this worker's device, or opaque pages that differ in size or stride, or
    are scattered.
    """
    group = support.offloaded_group(kv_cache_config)
    num_blocks = int(kv_cache_config.num_blocks)
    caches = _distinct(group.layer_names, kv_caches)
    layout.check_devices(caches)
    for name, cache in caches.items():
        if cache.shape[0] % num_blocks != 0:
            raise InvalidArgument(f"KV cache of {name}: {cache.shape[0]} blocks, must be a multiple of the engine's {num_blocks}")
    try:
        return _strided(vllm_config, group, num_blocks, caches)
    except NotStrided as why:
        return _opaque(group, num_blocks, caches, str(why))


def _distinct(names: Sequence[str], kv_caches: Mapping[str, Any]) -> dict[str, Any]:
    """The caches that are memory of their own: the first name of each."""
    found: dict[Any, str] = {}
    for name in names:
        cache = kv_caches[name]
        found.setdefault((cache.data_ptr(), cache.shape, cache.stride(), cache.dtype), name)
    return {name: kv_caches[name] for name in found.values()}


def _strided(vllm_config: Any, group: Any, num_blocks: int, caches: Mapping[str, Any]) -> TokenPages:
    specs = compat.layer_specs(group)
    for name in caches:
        _check_spec(name, specs[name])
    heads, head_dim = _same("(KV heads, head dim)", {n: (int(specs[n].num_kv_heads), int(specs[n].head_size)) for n in caches})
    _same("element type", {name: str(cache.dtype) for name, cache in caches.items()})
    planes = _same("planes", {name: LATENT if isinstance(specs[name], compat.MLAAttentionSpec) else KEY_VALUE for name in caches})
    blocks_per_block = _same("kernel blocks", {name: int(cache.shape[0]) for name, cache in caches.items()}) // num_blocks
    block_tokens = int(group.kv_cache_spec.block_size)
    if block_tokens % blocks_per_block != 0:
        raise NotStrided(f"{block_tokens} tokens do not divide into {blocks_per_block} kernel blocks")
    writes = compat.cache_writes(vllm_config, list(caches))
    tensors = tuple(caches.values())
    probe = Probe(tensors[0], planes, block_tokens // blocks_per_block, heads, head_dim, vllm_config.model_config.dtype)
    strides = []
    for name, cache in caches.items():
        if name not in writes:
            raise NotStrided(f"{name}: the engine has no cache write for it that can be called alone")
        try:
            strides.append(strides_of(probe.places(writes[name], cache), probe.blocks, planes))
        except NotStrided as why:
            raise NotStrided(f"{name}: {why}") from why
    device = tensors[0].device
    pages = TokenPages(
        layers=len(tensors),
        planes=len(planes),
        token_bytes=heads * head_dim * tensors[0].element_size(),
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        opaque=False,
        element=str(tensors[0].dtype).removeprefix("torch."),
        heads=heads,
        head_dim=head_dim,
        device_type=str(device.type),
        device_index=device.index or 0,
        reason="",
        tensors=tensors,
        blocks_per_block=blocks_per_block,
        strides=tuple(strides),
    )
    try:
        pages.paged_layout()
    except LmcacheNativeError as error:
        raise NotStrided(f"strides that cannot be copied by: {error}") from error
    return pages


def _check_spec(name: str, spec: Any) -> None:
    if int(spec.kv_quant_mode) != 0:
        raise NotStrided(f"{name}: quantized cache ({spec.kv_quant_mode.name}), its bytes mean nothing without their scales")
    if isinstance(spec, compat.MLAAttentionSpec):
        if spec.tokens_per_state != 1 or spec.state_content_bytes is not None:
            raise NotStrided(f"{name}: MLA states that are not one latent per token")
    elif spec.head_size_v != spec.head_size:
        raise NotStrided(f"{name}: K has {spec.head_size} elements per head, V has {spec.head_size_v}")


def _same(what: str, by_layer: Mapping[str, T]) -> T:
    """The value all layers share."""
    values = list(dict.fromkeys(by_layer.values()))
    if len(values) != 1:
        raise NotStrided(f"layers differ in {what}: {', '.join(map(str, values))}")
    return values[0]


def _opaque(group: Any, num_blocks: int, caches: Mapping[str, Any], reason: str) -> TokenPages:
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, cache in caches.items():
        blocks = compat.group_kernel_blocks(cache, num_blocks)
        page = blocks[0]
        if layout.elements_reached(page) != page.numel():
            raise Unsupported(
                f"KV cache of {name}: a block's page lies scattered (shape {tuple(page.shape)}, strides {tuple(page.stride())}): "
                f"not yet supported, because pages are opaque ({reason}); VLLM_KV_CACHE_LAYOUT=LBHNC keeps them whole"
            )
        item = cache.element_size()
        shapes.setdefault((page.numel() * item, blocks.stride(0) * item), []).append(name)
    if len(shapes) != 1:
        layers = "; ".join(f"{shape}: {', '.join(names)}" for shape, names in sorted(shapes.items()))
        differences = f"KV cache layers with different (page bytes, block stride): {layers}"
        raise Unsupported(f"{differences}: not yet supported, because pages are opaque ({reason})")
    (page_bytes, block_stride), tensors = next(iter(shapes)), tuple(caches.values())
    device = tensors[0].device
    return TokenPages(
        layers=len(tensors),
        planes=1,
        token_bytes=page_bytes,
        block_tokens=int(group.kv_cache_spec.block_size),
        num_blocks=num_blocks,
        opaque=True,
        element="",
        heads=0,
        head_dim=0,
        device_type=str(device.type),
        device_index=device.index or 0,
        reason=reason,
        tensors=tensors,
        block_stride=block_stride,
    )


def layout_id(vllm_config: Any, pages: TokenPages, backends: list[str]) -> str:
    """Equal ids: chunks mean the same bytes. Names nothing of the engine when pages are strided."""
    if pages.opaque:
        return f"{layout.layout_id(vllm_config, pages.device_type, backends)};block_tokens={pages.block_tokens}"
    return f"kv:element={pages.element};heads={pages.heads};head_dim={pages.head_dim};planes={pages.planes};layers={pages.layers}"
