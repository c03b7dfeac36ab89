"""Where the engine's own cache write puts each element of a block, found by writing coded values and reading the pages back.

Nothing is taken from the cache's shape but what vLLM promises of it: dim 0 counts kernel blocks, and slot s of a slot mapping is
token s % block_tokens of kernel block s // block_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

KEY_VALUE = ("K", "V")
LATENT = ("latent",)  # MLA's only plane

# Integers 0..n-1 that the type represents exactly.
_EXACT_INTEGERS = {torch.float16: 1 << 11, torch.bfloat16: 1 << 8, torch.float32: 1 << 24}
_BITS = {2: torch.int16, 4: torch.int32}
_UNWRITTEN = -1.0

CacheWrite = Callable[[Sequence[Any], Any, Any], None]  # (planes, cache, slot_mapping)


class NotStrided(Exception):
    """Says why pages are not strides of tokens."""


class Strides(NamedTuple):
    """Bytes, relative to the cache tensor's first element. A stride over a single item is 0."""

    offset: int
    block: int
    token: int
    head: int
    dim: int


class Probe:
    """Coded keys and values (MLA: latents) for caches of one shape. The codes number the elements [block, plane, token, head, dim]
    of the probed blocks; each pass writes one digit of every code, small enough to be exact in the cache's type."""

    def __init__(self, cache: Any, planes: Sequence[str], block_tokens: int, heads: int, head_dim: int, model_dtype: Any) -> None:
        """cache: any of the caches to come. model_dtype: what the engine's layers hand to the cache write. NotStrided when codes
        would not be exact in one of the types."""
        for name, dtype in (("cache", cache.dtype), ("model", model_dtype)):
            if dtype not in _EXACT_INTEGERS:
                raise NotStrided(f"{name} type {str(dtype).removeprefix('torch.')}: only {_names(_EXACT_INTEGERS)} can be probed")
        self.blocks = probed_blocks(int(cache.shape[0]))
        self._shape = (len(self.blocks), len(planes), block_tokens, heads, head_dim)
        self._elements = math.prod(self._shape)
        self._base = min(_EXACT_INTEGERS[cache.dtype], _EXACT_INTEGERS[model_dtype])
        self._index = torch.tensor(self.blocks, dtype=torch.int64, device=cache.device)
        tokens = torch.arange(block_tokens, dtype=torch.int64, device=cache.device)
        self._slots = (self._index[:, None] * block_tokens + tokens).reshape(-1)
        codes = torch.arange(self._elements, dtype=torch.int64).reshape(self._shape)
        self._digits = []
        self._weights = []
        weight = 1
        while weight < self._elements:
            digit = (codes // weight % self._base).to(model_dtype)
            parts = (digit[:, plane].reshape(-1, heads, head_dim).to(cache.device) for plane in range(len(planes)))
            self._digits.append(tuple(parts))
            self._weights.append(weight)
            weight *= self._base

    def places(self, write: CacheWrite, cache: Any) -> Any:
        """Byte offsets from the cache's first element, int64 [block, plane, token, head, dim] on the CPU.

        The cache is afterwards as it was, also when this raises, if `write` kept to the probed blocks, the only slots it is given.
        NotStrided: `write` raised, changed values on their way, or did not put every element exactly once into those blocks' pages.
        """
        bits = cache.view(_BITS[cache.element_size()])  # copied as bits: a NaN stays the same NaN
        with torch.inference_mode():
            before = bits.index_select(0, self._index)
            try:
                codes, written = self._read_codes(write, cache)
            finally:
                bits.index_copy_(0, self._index, before)
        found = codes[written]
        if found.numel() != self._elements:
            raise NotStrided(f"the engine's cache write changed {found.numel()} places in the pages, not {self._elements}")
        if int(found.max()) >= self._elements:
            raise NotStrided("values change on their way into the cache")
        places = torch.full((self._elements,), -1, dtype=torch.int64)
        places[found] = self._offsets(cache)[written]
        lost = int((places < 0).sum())
        if lost:
            raise NotStrided(f"{lost} of {self._elements} elements are not in the pages they were written to")
        return places.reshape(self._shape)

    def _read_codes(self, write: CacheWrite, cache: Any) -> tuple[Any, Any]:
        """Per place in the probed pages: the code read there, and whether anything was written."""
        codes: Any = 0
        written: Any = None
        for digits, weight in zip(self._digits, self._weights, strict=True):
            cache.index_fill_(0, self._index, _UNWRITTEN)
            try:
                write(digits, cache, self._slots)
            except Exception as error:
                raise NotStrided(f"the engine's cache write raised {type(error).__name__}: {error}") from error
            pages = cache.index_select(0, self._index).cpu().to(torch.float32)
            now = pages != _UNWRITTEN
            digit = pages.to(torch.int64)
            wrong = now & ~((digit == pages) & (digit >= 0) & (digit < self._base))
            if bool(wrong.any()):
                raise NotStrided(f"values change on their way into the cache: {int(wrong.sum())} of {self._elements}")
            if written is not None and not torch.equal(now, written):
                raise NotStrided("the engine's cache write chooses other places at each call")
            codes, written = codes + digit * weight, now
        return codes, written

    def _offsets(self, cache: Any) -> Any:
        """Byte offset of each place in the probed pages."""
        offsets = torch.tensor(self.blocks, dtype=torch.int64) * cache.stride(0)
        for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True):
            offsets = offsets[..., None] + torch.arange(size, dtype=torch.int64) * stride
        return offsets * cache.element_size()


def probed_blocks(blocks: int) -> tuple[int, ...]:
    """Two give the block stride, the third proves it: neighbours, and the longest way."""
    return tuple(sorted({0, min(1, blocks - 1), blocks - 1}))


def strides_of(places: Any, blocks: Sequence[int], planes: Sequence[str]) -> tuple[Strides, ...]:
    """Per plane, by name, the only strides that `places` (see Probe.places) can have. NotStrided when they have others."""
    found = tuple(fit(places[:, plane], blocks) for plane in range(places.shape[1]))
    for plane, strides in enumerate(found):
        check(planes[plane], places[:, plane], blocks, strides)
    return found


def fit(places: Any, blocks: Sequence[int]) -> Strides:
    """From the first and second item of each axis. places: [block, token, head, dim] of one plane."""
    origin = int(places[0, 0, 0, 0])
    steps = [int(places.select(axis, 1)[0, 0, 0]) - origin if places.shape[axis] > 1 else 0 for axis in range(4)]
    if len(blocks) > 1:
        steps[0] //= blocks[1] - blocks[0]
    return Strides(origin - blocks[0] * steps[0], *steps)


def check(plane: str, places: Any, blocks: Sequence[int], strides: Strides) -> None:
    """NotStrided unless every element lies where `strides` say."""
    expected = strides.offset + torch.tensor(blocks, dtype=torch.int64)[:, None, None, None] * strides.block
    for axis, step in enumerate((strides.token, strides.head, strides.dim), start=1):
        steps = torch.arange(places.shape[axis], dtype=torch.int64) * step
        expected = expected + steps.reshape([-1 if other == axis else 1 for other in range(4)])
    wrong = int((expected != places).sum())
    if wrong:
        raise NotStrided(f"{plane} is not strided: {wrong} of {places.numel()} elements lie elsewhere than {strides} says")


def _names(dtypes: Any) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
