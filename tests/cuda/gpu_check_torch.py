"""The CUDA copier against torch's own indexing, bit for bit, for each layout that engines have.

    gpu_check_torch.py --library FILE      libcopier_c.so: on the GPU. libcopier_c_on_cpu.so: on the fake runtime, torch on the CPU.

Exit code 0: all bytes as torch has them. 1: not. 77: no GPU here, or no torch.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
except ImportError:
    sys.stdout.write("gpu_check_torch: no torch in this Python: NOTHING PROVEN\n")
    raise SystemExit(77) from None

LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_DIM = 3, 40, 16, 4, 64


class Layout(NamedTuple):
    """`shape` is torch's, over all layers when `joined`. `view` brings one layer of it to [plane, block, token, head, dim]."""

    name: str
    shape: tuple[int, ...]
    view: Callable[[Any], Any]
    planes: int
    heads: int
    head_dim: int
    dtype: Any
    joined: bool = False  # one tensor whose dimension 1 is the layer


def layouts() -> list[Layout]:
    b, t, h, d = BLOCKS, BLOCK_TOKENS, HEADS, HEAD_DIM
    half, byte = torch.float16, torch.uint8
    return [
        Layout("[plane][block][token][head][dim]", (2, b, t, h, d), lambda x: x, 2, h, d, half),
        Layout("[block][plane][token][head][dim]", (b, 2, t, h, d), lambda x: x.transpose(0, 1), 2, h, d, half),
        Layout("[block][plane][head][token][dim]", (b, 2, h, t, d), lambda x: x.permute(1, 0, 3, 2, 4), 2, h, d, half),
        Layout("[block][token][head][plane dim]", (b, t, h, 2 * d),
               lambda x: x.unflatten(3, (2, d)).permute(3, 0, 1, 2, 4), 2, h, d, half),
        Layout("[block][head][dim][token]", (b, h, d, t), lambda x: x.permute(0, 3, 1, 2).unsqueeze(0), 1, h, d, half),
        Layout("MLA [block][token][dim]", (b, t, 576), lambda x: x.unsqueeze(2).unsqueeze(0), 1, 1, 576, half),
        Layout("MLA bytes [block][token][656]", (b, t, 656), lambda x: x.unsqueeze(2).unsqueeze(0), 1, 1, 656, byte),
        Layout("fp8 [block][plane][token][head][dim]", (b, 2, t, h, d), lambda x: x.transpose(0, 1), 2, h, d, byte),
        Layout("all layers in a block [block][layer][plane][token][head][dim]", (b, LAYERS, 2, t, h, d),
               lambda x: x.transpose(0, 1), 2, h, d, half, True),
    ]  # fmt: skip


class Library:
    """copier_c.cpp, and where its device memory comes from."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name in ("lmcn_c_make", "lmcn_c_fake_allocate"):
            if hasattr(self.c, name):
                getattr(self.c, name).restype = ctypes.c_void_p
        for name in ("lmcn_c_rank_bytes", "lmcn_c_layer_offset", "lmcn_c_image_bytes"):
            getattr(self.c, name).restype = ctypes.c_int64
        self.fake = hasattr(self.c, "lmcn_c_fake_allocate")
        self.message = ctypes.create_string_buffer(4096)

    def said(self) -> str:
        return self.message.value.decode()

    def devices(self) -> int:
        return int(self.c.lmcn_c_devices(self.message, ctypes.c_size_t(len(self.message))))

    def paths(self) -> list[str]:
        """What LMCN_COPY_PATH may be."""
        self.c.lmcn_c_paths(self.message, ctypes.c_size_t(len(self.message)))
        return [*self.said().split(","), "auto"]

    @contextmanager
    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Iterator[Any]:
        """A tensor of zeros in the device's memory."""
        if not self.fake:
            yield torch.zeros(shape, dtype=dtype, device="cuda:0")
            return
        elements = 1
        for length in shape:
            elements *= length
        size = elements * dtype.itemsize
        address = self.c.lmcn_c_fake_allocate(ctypes.c_uint64(size))
        try:
            tensor = torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=dtype).view(shape)
            tensor.zero_()
            yield tensor
        finally:
            self.c.lmcn_c_fake_release(ctypes.c_void_p(address))


class Copier:
    def __init__(self, library: Library, layers: list[Any], chunk_tokens: int, arena: mmap.mmap) -> None:
        """`layers`: each [plane, block, token, head, dim], of one dtype."""
        self.library = library
        element = layers[0].element_size()
        planes, blocks, tokens, heads, dim = layers[0].shape
        numbers = [len(layers), planes, blocks, tokens, heads, dim, element, chunk_tokens]
        for layer in layers:
            plane, *rest = (step * element for step in layer.stride())
            numbers.append(layer.data_ptr())
            for p in range(planes):
                numbers += [p * plane, *rest]
        self._arena = (ctypes.c_ubyte * len(arena)).from_buffer(arena)
        made = library.c.lmcn_c_make(
            (ctypes.c_int64 * len(numbers))(*numbers),
            self._arena,
            ctypes.c_uint64(len(arena)),
            0,
            library.message,
            ctypes.c_size_t(len(library.message)),
        )
        if not made:
            raise SystemExit(f"gpu_check_torch: FAILED: make: {library.said()}")
        self.handle = ctypes.c_void_p(made)
        self.rank_bytes = int(library.c.lmcn_c_rank_bytes(self.handle))

    def layer_offset(self, layer: int) -> int:
        return int(self.library.c.lmcn_c_layer_offset(self.handle, ctypes.c_int64(layer)))

    def begin_slot(self, generation: int) -> None:
        self.library.c.lmcn_c_begin_slot(self._arena, ctypes.c_uint64(self.rank_bytes), ctypes.c_uint32(generation))

    def copy(self, scatter: bool, generation: int, tokens: int, token_in_block: int, blocks: list[int]) -> None:
        stream = 0 if self.library.fake else torch.cuda.current_stream().cuda_stream
        failed = self.library.c.lmcn_c_copy(
            self.handle,
            int(scatter),
            ctypes.c_uint64(0),
            ctypes.c_uint32(generation),
            ctypes.c_uint32(tokens),
            ctypes.c_uint32(token_in_block),
            (ctypes.c_int64 * len(blocks))(*blocks),
            ctypes.c_uint64(len(blocks)),
            ctypes.c_uint64(stream),
            self.library.message,
            ctypes.c_size_t(len(self.library.message)),
        )
        if failed:
            raise SystemExit(f"gpu_check_torch: FAILED: copy: {self.library.said()}")

    def close(self) -> str:
        name = ctypes.create_string_buffer(64)
        self.library.c.lmcn_c_name(self.handle, name, ctypes.c_size_t(len(name)))
        self.library.c.lmcn_c_free(self.handle)
        del self._arena  # the arena can be closed now
        return name.value.decode()


def tokens_of(layer: Any, blocks: Any, token_in_block: int, tokens: int) -> Any:
    """What torch says these tokens are: [plane, token, head, dim], by index_select and a slice."""
    chosen = torch.index_select(layer, 1, blocks).flatten(1, 2)
    return chosen[:, token_in_block : token_in_block + tokens]


def check(library: Library, layout: Layout, seed: int) -> str:
    """One layout, one random choice of blocks and tokens: gather, then scatter into other memory. Returns the copier's name."""
    choose = random.Random(seed)
    chunk_tokens = choose.choice([BLOCK_TOKENS, 3 * BLOCK_TOKENS, 5 * BLOCK_TOKENS + 7])
    token_in_block = choose.randrange(BLOCK_TOKENS)
    tokens = choose.randint(1, chunk_tokens)
    count = (token_in_block + tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    blocks, others = (choose.sample(range(BLOCKS), count) for _ in range(2))
    tensors = 1 if layout.joined else LAYERS
    generator = torch.Generator().manual_seed(seed)
    image = int(
        library.c.lmcn_c_image_bytes(
            ctypes.c_uint64(LAYERS * layout.planes * chunk_tokens * layout.heads * layout.head_dim * 8 + (LAYERS << 12))
        )
    )
    arena = mmap.mmap(-1, image)
    where = f"{layout.name}, seed {seed}"
    with memory_of(library, layout, 2 * tensors) as memory:
        from_memory, to_memory = memory[:tensors], memory[tensors:]
        for tensor in from_memory:
            size = tensor.numel() * tensor.element_size()
            data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            tensor.view(torch.uint8).view(-1).copy_(data)
        sources, targets = ([as_bytes(v, layout) for v in views(m, layout)] for m in (from_memory, to_memory))
        index = torch.tensor(blocks, device=sources[0].device)
        copier = Copier(library, sources, chunk_tokens, arena)
        copier.begin_slot(1)
        copier.copy(False, 1, tokens, token_in_block, blocks)
        name = copier.close()
        rank = torch.frombuffer(arena, dtype=torch.uint8)[4096:]
        row = layout.heads * sources[0].shape[4] * sources[0].element_size()
        copier = Copier(library, targets, chunk_tokens, arena)
        for number, layer in enumerate(sources):
            expected = tokens_of(layer, index, token_in_block, tokens).cpu().contiguous().view(torch.uint8)
            part = rank[copier.layer_offset(number) :][: layout.planes * chunk_tokens * row].view(layout.planes, chunk_tokens, row)
            if not torch.equal(part[:, :tokens].reshape(-1), expected.reshape(-1)):
                raise SystemExit(f"gpu_check_torch: FAILED: {where}: layer {number} in the slot is not what torch has")
        copier.copy(True, 1, tokens, token_in_block, others)
        copier.close()
        other_index = torch.tensor(others, device=index.device)
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            expected_layer = torch.zeros_like(target)
            flat = expected_layer.index_select(1, other_index).flatten(1, 2)
            flat[:, token_in_block : token_in_block + tokens] = tokens_of(source, index, token_in_block, tokens)
            expected_layer[:, other_index] = flat.unflatten(1, (count, BLOCK_TOKENS))
            if not torch.equal(target, expected_layer):
                raise SystemExit(f"gpu_check_torch: FAILED: {where}: layer {number} of the pages is not what torch has")
        del rank, part, sources, targets, copier
    return name


@contextmanager
def memory_of(library: Library, layout: Layout, count: int) -> Iterator[list[Any]]:
    with ExitStack() as stack:
        yield [stack.enter_context(library.zeros(layout.shape, layout.dtype)) for _ in range(count)]


def views(tensors: list[Any], layout: Layout) -> list[Any]:
    """Per layer [plane, block, token, head, dim]."""
    if layout.joined:
        return [layout.view(tensors[0][:, layer]) for layer in range(LAYERS)]
    return [layout.view(tensor) for tensor in tensors]


def as_bytes(view: Any, layout: Layout) -> Any:
    """The same elements as integers: no comparison of floating-point numbers, where NaN differs from itself."""
    return view if layout.dtype == torch.uint8 else view.view(torch.int16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    library = Library(arguments.library)
    if not library.fake and library.devices() < 1:
        sys.stdout.write(f"gpu_check_torch: NO GPU HERE, NOTHING PROVEN: {library.devices()} {library.said()}\n")
        return 77
    paths = library.paths()
    for layout in layouts():
        names = set()
        for seed in range(arguments.rounds):
            os.environ["LMCN_COPY_PATH"] = paths[seed % len(paths)]
            names.add(check(library, layout, seed))
        sys.stdout.write(
            f"torch {torch.__version__} {layout.name}: {arguments.rounds} copies each way, equal ({', '.join(sorted(names))})\n"
        )
    told = "passed on the fake runtime; says nothing about a GPU" if library.fake else "proven"
    sys.stdout.write(f"gpu_check_torch: {told}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
