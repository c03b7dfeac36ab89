"""Chunk keys of a vLLM request's tokens, and its own settings (`kv_transfer_params`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_native import ChunkHasher, ChunkKeys, Priority
from lmcache_native.config import EXTRA_PREFIX, parse_flag
from lmcache_native.errors import InvalidArgument

TAG_PREFIX = EXTRA_PREFIX + "tag."
SKIP_SAVE = EXTRA_PREFIX + "skip_save"
PRIORITY = EXTRA_PREFIX + "priority"
REPORT = EXTRA_PREFIX + "report"

PRIORITIES = {"low": Priority.LOW, "normal": Priority.NORMAL, "high": Priority.HIGH}


@dataclass(frozen=True, slots=True)
class RequestSettings:
    skip_save: bool = False
    tags: tuple[tuple[str, str], ...] = ()  # sorted; part of the key
    priority: Priority = Priority.NORMAL
    report: bool = False  # what was hit where is in the response


def request_settings(parameters: Mapping[str, Any] | None) -> RequestSettings:
    """From a request's kv_transfer_params. Names that are not ours belong to others. InvalidArgument for a wrong value."""
    if not parameters:
        return RequestSettings()
    priority = parameters.get(PRIORITY, "normal")
    if not isinstance(priority, str) or priority.lower() not in PRIORITIES:
        raise _wrong(PRIORITY, priority, "low, normal or high")
    return RequestSettings(
        _flag(parameters, SKIP_SAVE), tuple(sorted(_tags(parameters))), PRIORITIES[priority.lower()], _flag(parameters, REPORT)
    )


def _tags(parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in parameters.items():
        if not name.startswith(TAG_PREFIX):
            continue
        if not isinstance(value, str | int | float):
            raise _wrong(name, value, "text or a number")
        yield name.removeprefix(TAG_PREFIX), str(value)


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    flag = parse_flag(parameters.get(name, False))
    if flag is None:
        raise _wrong(name, parameters[name], "true or false")
    return flag


def _wrong(name: str, value: object, right: str) -> InvalidArgument:
    return InvalidArgument(f"{name}={value!r} (kv_transfer_params): must be {right}")


def tagged(namespace: bytes, tags: tuple[tuple[str, str], ...]) -> bytes:
    """The namespace of a request with these tags, for keys that an engine made without them."""
    if not tags:
        return namespace
    return hashlib.sha256(b"tags\0" + namespace + json.dumps(tags, separators=(",", ":")).encode()).digest()


class TokenKeys:
    """The keys of one request's whole chunks, extended as it grows. One thread at a time.

    key[i] = H(key[i-1], tokens of chunk i, extra[i]). extra[i] is canonical JSON of what else decides the chunk's KV: cache salt
    and tags (first chunk only, the chain carries them on), multimodal items with their place in the chunk, and the bytes of prompt
    embeddings. A LoRA adapter is in the namespace.
    """

    def __init__(self, namespace: bytes, chunk_tokens: int, request: Any, tags: tuple[tuple[str, str], ...]) -> None:
        self._hasher = ChunkHasher(namespace, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._request = request
        self._tags = tags
        self._prompt_tokens = request.num_prompt_tokens
        self._keys = ChunkKeys.from_bytes(b"")

    def whole(self, tokens: int) -> ChunkKeys:
        """Keys of the whole chunks of the first `tokens` tokens. REQUIRES: the request has that many."""
        if self._request.num_prompt_tokens != self._prompt_tokens:  # a streaming session went on: its last token may have changed
            self._prompt_tokens = self._request.num_prompt_tokens
            self._keys = ChunkKeys.from_bytes(b"")
        chunks = tokens // self._chunk_tokens
        have = len(self._keys)
        if chunks > have:
            size = self._chunk_tokens
            grown = self._hasher.hash(
                self._request.all_token_ids[have * size : chunks * size],
                self._extras(have, chunks),
                self._keys[have - 1] if have else None,
            )
            self._keys = ChunkKeys.from_bytes(self._keys.tobytes() + grown.tobytes()) if have else grown
        return self._keys if chunks == len(self._keys) else self._keys[:chunks]

    def tail(self, tokens: int) -> bytes | None:
        """Key of what follows the whole chunks of the first `tokens` tokens. None: nothing does."""
        whole = self.whole(tokens)
        begin = len(whole) * self._chunk_tokens
        if begin == tokens:
            return None
        parent = whole[len(whole) - 1] if len(whole) else self._hasher.root
        return self._hasher.step(parent, self._request.all_token_ids[begin:tokens], self._extra(begin, tokens))

    def _extras(self, first: int, last: int) -> list[bytes] | None:
        """Of chunks [first, last). None: no chunk has any."""
        size = self._chunk_tokens
        plain = not self._request.mm_features and self._request.prompt_embeds is None
        extras = [self._extra(index * size, (index + 1) * size) for index in range(first, min(last, 1) if plain else last)]
        return extras + [b""] * (last - first - len(extras)) if any(extras) else None

    def _extra(self, begin: int, end: int) -> bytes:
        request = self._request
        found: list[list[object]] = []
        if begin == 0:
            if request.cache_salt:
                found.append(["salt", request.cache_salt])
            found.extend(["tag", name, value] for name, value in self._tags)
        for feature in request.mm_features:
            position = feature.mm_position
            if position.offset < end and begin < position.offset + position.length:
                found.append(["mm", feature.identifier, position.offset - begin])
        if request.prompt_embeds is not None and begin < len(request.prompt_embeds):
            found.append(["embeds", _digest(request.prompt_embeds[begin:end])])
        return json.dumps(found, separators=(",", ":")).encode() if found else b""


def _digest(tensor: Any) -> str:
    import torch

    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype};{tuple(content.shape)};".encode())
    digest.update(content.view(torch.uint8).numpy())
    return digest.hexdigest()
