"""Keys made from tokens: whatever decides the KV is in them, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_native import ChunkHasher
from lmcache_native.errors import InvalidArgument
from lmcache_native.integration.vllm.namespace import Namespaces
from lmcache_native.integration.vllm.token_keys import RequestSettings, TokenKeys, request_settings

CHUNK = 8
NAMESPACE = bytes(range(32))
TOKENS = [3 * index + 1 for index in range(37)]


def feature(identifier: str, offset: int, length: int) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def request(tokens: list[int] = TOKENS, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "all_token_ids": list(tokens),
        "num_prompt_tokens": len(tokens),
        "cache_salt": None,
        "mm_features": [],
        "prompt_embeds": None,
        "priority": 0,
    }
    return SimpleNamespace(**fields | changes)


def keys(changed: Any = None, *, namespace: bytes = NAMESPACE, chunk: int = CHUNK, tags: Any = ()) -> list[bytes]:
    asked = request() if changed is None else changed
    made = TokenKeys(namespace, chunk, asked, tags)
    whole = list(made.whole(len(asked.all_token_ids)))
    tail = made.tail(len(asked.all_token_ids))
    return whole if tail is None else [*whole, tail]


def test_plain_keys_are_the_hashers() -> None:
    assert keys()[:4] == list(ChunkHasher(NAMESPACE, CHUNK).hash(TOKENS))
    assert len(keys()) == 5


def differing(left: list[bytes], right: list[bytes]) -> list[int]:
    return [index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]]


@pytest.mark.parametrize(
    ("changed", "from_chunk"),
    [
        (request([*TOKENS[:20], 99, *TOKENS[21:]]), 2),
        (request([*TOKENS[:36], 99]), 4),  # the tail's last token
        (request(cache_salt="tenant"), 0),
        (request(mm_features=[feature("cat", 10, 4)]), 1),
        (request(prompt_embeds=torch.ones(30, 4)), 0),
    ],
    ids=["token", "tail token", "salt", "multimodal item", "embeddings"],
)
def test_what_decides_the_kv_changes_the_keys_from_there_on(changed: Any, from_chunk: int) -> None:
    assert differing(keys(), keys(changed)) == list(range(from_chunk, 5))


def test_namespace_chunk_and_tags_change_all_keys() -> None:
    assert differing(keys(), keys(namespace=bytes(32))) == [0, 1, 2, 3, 4]
    assert set(keys()) & set(keys(chunk=16)) == set()
    tagged = keys(tags=(("user", "a"),))
    assert differing(keys(), tagged) == [0, 1, 2, 3, 4]
    assert differing(tagged, keys(tags=(("user", "b"),))) == [0, 1, 2, 3, 4]
    assert differing(tagged, keys(tags=(("usera", ""),))) == [0, 1, 2, 3, 4]
    assert differing(keys(request(cache_salt="a")), keys(tags=(("salt", "a"),))) == [0, 1, 2, 3, 4]


def test_multimodal_items_by_content_and_place() -> None:
    """The same placeholder tokens stand for other content, or for the same content elsewhere."""
    base = keys(request(mm_features=[feature("cat", 10, 12)]))
    assert differing(base, keys(request(mm_features=[feature("dog", 10, 12)]))) == [1, 2, 3, 4]
    assert differing(base, keys(request(mm_features=[feature("cat", 11, 12)]))) == [1, 2, 3, 4]
    two = [feature("cat", 10, 12), feature("dog", 24, 3)]
    assert differing(base, keys(request(mm_features=two))) == [3, 4]


def test_embeddings_by_content_type_and_place() -> None:
    embeds = torch.arange(120, dtype=torch.float32).reshape(30, 4)
    base = keys(request(prompt_embeds=embeds))
    changed = embeds.clone()
    changed[17, 2] += 1
    assert differing(base, keys(request(prompt_embeds=changed))) == [2, 3, 4]
    assert differing(base, keys(request(prompt_embeds=embeds.to(torch.bfloat16)))) == [0, 1, 2, 3, 4]
    assert base == keys(request(prompt_embeds=embeds.clone()))


def test_nothing_else_changes_keys() -> None:
    assert keys() == keys(request(priority=7, request_id="other"))
    assert keys() == keys(request(mm_features=[]))


@pytest.mark.parametrize("extra", [{}, {"cache_salt": "s"}, {"mm_features": [feature("cat", 5, 9)]}], ids=["plain", "salt", "item"])
def test_growing_a_token_at_a_time_gives_the_same_keys(extra: dict[str, Any]) -> None:
    growing = request(TOKENS[:5], **extra)
    made = TokenKeys(NAMESPACE, CHUNK, growing, ())
    for token in TOKENS[5:]:
        growing.all_token_ids.append(token)  # generated: the prompt stays 5 tokens long
        made.whole(len(growing.all_token_ids))
    assert list(made.whole(37)) == keys(request(**extra))[:4]
    assert made.tail(37) == keys(request(**extra))[4]
    assert list(made.whole(20)) == keys(request(**extra))[:2]


def test_streaming_session_that_goes_on_from_a_changed_token() -> None:
    session = request(TOKENS[:20])
    made = TokenKeys(NAMESPACE, CHUNK, session, ())
    session.all_token_ids += [7, 7, 7, 7]
    assert len(made.whole(24)) == 3
    session.all_token_ids[23:] = TOKENS[23:]  # vLLM drops the last sampled token, appends the next input, and
    session.num_prompt_tokens = len(session.all_token_ids)  # makes it all the prompt
    assert list(made.whole(37)) == keys(request(session.all_token_ids))[:4]


def test_keys_do_not_depend_on_the_process() -> None:
    program = (
        "from lmcache_native.integration.vllm.token_keys import TokenKeys\n"
        "from types import SimpleNamespace as N\n"
        f"r = N(all_token_ids={TOKENS}, num_prompt_tokens={len(TOKENS)}, cache_salt='s', mm_features=[], prompt_embeds=None)\n"
        f"print(TokenKeys({NAMESPACE!r}, {CHUNK}, r, (('a', 'b'),)).whole({len(TOKENS)}).tobytes().hex())"
    )
    import os

    found = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(found) == 1


# ---- a request's own settings -------------------------------------------------------------------------------------------


def test_settings() -> None:
    assert request_settings(None) == RequestSettings()
    found = request_settings({"lmcache.skip_save": "true", "lmcache.tag.b": 2, "lmcache.tag.a": "x", "do_remote_prefill": True})
    assert found == RequestSettings(True, (("a", "x"), ("b", "2")))
    with pytest.raises(InvalidArgument, match=r"lmcache\.skip_save='perhaps' \(kv_transfer_params\): must be true or false"):
        request_settings({"lmcache.skip_save": "perhaps"})


# ---- namespaces ---------------------------------------------------------------------------------------------------------


def test_epoch_changes_every_namespace_for_good() -> None:
    namespaces = Namespaces({"model": "m"})
    other = Namespaces({"model": "m"})
    assert namespaces.of(None) == other.of(None)
    before = namespaces.of(None)
    namespaces.raise_epoch()
    other.raise_epoch()
    assert len({before, namespaces.of(None), other.of(None)}) == 3
