"""What token_world.Engine is made of: paged memory, prompts and answers, a copier that takes its time."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from vllm.v1.request import Request

from lmcache_native.errors import DeadlineExceeded
from lmcache_native.integration.vllm.pages import TokenPages
from lmcache_native.integration.vllm.probe import Strides

BLOCK = 16
LAYERS, PLANES, HEADS, DIM = 2, 2, 2, 8
TOKEN_BYTES = HEADS * DIM * 2


def pages(blocks: int) -> TokenPages:
    tensors = tuple(torch.zeros(blocks, PLANES, BLOCK, HEADS, DIM, dtype=torch.int16) for _ in range(LAYERS))
    planes = tuple(
        Strides(offset=plane * BLOCK * TOKEN_BYTES, block=PLANES * BLOCK * TOKEN_BYTES, token=TOKEN_BYTES, head=DIM * 2, dim=2)
        for plane in range(PLANES)
    )
    return TokenPages(
        layers=LAYERS,
        planes=PLANES,
        token_bytes=TOKEN_BYTES,
        block_tokens=BLOCK,
        num_blocks=blocks,
        opaque=False,
        element="bfloat16",
        heads=HEADS,
        head_dim=DIM,
        device_type="cpu",
        device_index=0,
        reason="",
        tensors=tensors,
        strides=(planes,) * LAYERS,
    )


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(500) for _ in range(length)]


class HeldCopier:
    """A PagedCopier whose jobs (`only`: those of this direction) are under way until let go, until someone waits for them (and then
    those alone) or, given a generator, as chance has it."""

    def __init__(self, copier: Any, only: str | None = None, generator: random.Random | None = None) -> None:
        self._copier = copier
        self._only = only
        self._generator = generator
        self.held: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.cancelled: list[int] = []
        self.late = False  # who waits for a job waits in vain, until it is cancelled

    def submit(self, job_id: int, direction: str, *args: Any, **kwargs: Any) -> None:
        if self._only in (None, direction):
            self.held[job_id] = ((job_id, direction, *args), kwargs)
        else:
            self._copier.submit(job_id, direction, *args, **kwargs)

    def let_go(self, ids: Iterable[int] | None = None) -> None:
        for job_id in list(self.held if ids is None else ids):
            args, kwargs = self.held.pop(job_id, ((), {}))
            if args:
                self._copier.submit(*args, **kwargs)

    def end(self) -> None:
        """Lets all go, and holds nothing from now on."""
        self._only = "nothing"
        self.let_go()

    def wait(self, ids: Any, timeout_s: float) -> None:
        if self.late and self.held.keys() & set(ids):
            raise DeadlineExceeded("held")
        self.let_go(ids)
        self._copier.wait(ids, timeout_s)

    def cancel(self, ids: Any) -> None:
        self.cancelled.extend(ids)
        self.let_go(ids)
        self._copier.cancel(ids)

    def poll(self) -> Any:
        if self._generator is not None:
            self.let_go([job_id for job_id in self.held if self._generator.random() < 0.2])
        return self._copier.poll()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copier, name)


def sampled(position: int) -> int:
    return 1000 + position % 7


def adapter(request: Request) -> int:
    return 0 if request.lora_request is None else int(request.lora_request.lora_int_id)
