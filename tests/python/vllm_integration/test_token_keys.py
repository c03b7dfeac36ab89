"""Keys made from tokens: whatever decides the KV is in them, and nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, StreamingUpdate

from lmcache_native import ChunkHasher
from lmcache_native.errors import InvalidArgument
from lmcache_native.integration.vllm.namespace import Namespaces, canonical_text, token_scheme
from lmcache_native.integration.vllm.token_keys import RequestSettings, TokenKeys, request_settings

CHUNK = 8
NAMESPACE = bytes(range(32))
TOKENS = [3 * index + 1 for index in range(37)]


def feature(identifier: str, offset: int, length: int, modality: str = "image") -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, modality, identifier, PlaceholderRange(offset=offset, length=length))


def request(tokens: list[int] | None = TOKENS, max_tokens: int = 50, **fields: Any) -> Request:
    prompt = None if tokens is None else list(tokens)
    return Request(fields.pop("request_id", "r"), prompt, SamplingParams(max_tokens=max_tokens), None, **fields)


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
        (request(prompt_embeds=torch.ones(37, 4), prompt_is_token_ids=[True] * 37), 0),
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


def embedded(embeds: torch.Tensor) -> Request:
    return request(None, prompt_embeds=embeds)


def test_embeddings_by_content_type_and_place() -> None:
    embeds = torch.arange(148, dtype=torch.float32).reshape(37, 4)
    base = keys(embedded(embeds))
    changed = embeds.clone()
    changed[17, 2] += 1
    assert len(base) == 5
    assert differing(base, keys(embedded(changed))) == [2, 3, 4]
    changed = embeds.clone()
    changed[36, 3] += 1  # in the tail
    assert differing(base, keys(embedded(changed))) == [4]
    assert differing(base, keys(embedded(embeds.to(torch.bfloat16)))) == [0, 1, 2, 3, 4]
    assert differing(base, keys(request([0] * 37))) == [0, 1, 2, 3, 4]  # what vLLM has as their token ids
    assert base == keys(embedded(embeds.clone()))


def test_tokens_among_embeddings() -> None:
    """Mixed prompts: the ids at the embeddings' places are placeholders, which vLLM takes as zeros."""
    embeds = torch.arange(148, dtype=torch.float32).reshape(37, 4)
    mask = [index < 20 for index in range(37)]
    base = keys(request(prompt_embeds=embeds, prompt_is_token_ids=mask))
    changed = embeds.clone()
    changed[30, 0] += 1
    assert differing(base, keys(request(prompt_embeds=changed, prompt_is_token_ids=mask))) == [3, 4]
    other_token = [*TOKENS[:10], 99, *TOKENS[11:]]
    assert differing(base, keys(request(other_token, prompt_embeds=embeds, prompt_is_token_ids=mask))) == [1, 2, 3, 4]


def test_generated_tokens_after_embeddings() -> None:
    embeds = torch.arange(80, dtype=torch.float32).reshape(20, 4)
    made = []
    for last in (5, 6):
        asked = embedded(embeds)
        asked.append_output_token_ids([1, 2, 3, last])
        made.append(keys(asked))
    assert differing(*made) == [2]


def test_nothing_else_changes_keys() -> None:
    assert keys() == keys(request(priority=7, request_id="other", arrival_time=1.0, session_id="s", resumable=True, max_tokens=3))
    assert keys() == keys(request(mm_features=[]))
    assert keys() == keys(request(trace_headers={"a": "b"}, client_index=3))
    item = [feature("cat", 10, 4)]
    assert keys(request(mm_features=item)) == keys(
        request(mm_features=[feature("cat", 10, 4, "video")])
    )  # its hash says what it is
    same_but_generated = request(TOKENS[:20])
    same_but_generated.append_output_token_ids(TOKENS[20:])
    assert keys() == keys(same_but_generated)


@pytest.mark.parametrize("extra", [{}, {"cache_salt": "s"}, {"mm_features": [feature("cat", 5, 9)]}], ids=["plain", "salt", "item"])
def test_growing_a_token_at_a_time_gives_the_same_keys(extra: dict[str, Any]) -> None:
    growing = request(TOKENS[:5], **extra)
    made = TokenKeys(NAMESPACE, CHUNK, growing, ())
    for token in TOKENS[5:]:
        growing.append_output_token_ids(token)
        made.whole(growing.num_tokens)
    assert list(made.whole(37)) == keys(request(**extra))[:4]
    assert made.tail(37) == keys(request(**extra))[4]
    assert list(made.whole(20)) == keys(request(**extra))[:2]
    assert made.tail(20) == keys(request(TOKENS[:20], **extra))[2]


def test_no_tail_at_a_chunks_end() -> None:
    made = TokenKeys(NAMESPACE, CHUNK, request(), ())
    assert made.tail(32) is None
    assert made.tail(3) == keys(request(TOKENS[:3]))[0]
    assert len(made.whole(7)) == 0


def go_on(session: Request, tokens: list[int]) -> None:
    """As vLLM does when the next input of a streaming session comes."""
    scheduler = SimpleNamespace(hash_block_size=16, num_waiting_for_streaming_input=1, log_stats=False)
    update = StreamingUpdate(
        mm_features=None, prompt_token_ids=tokens, max_tokens=4, arrival_time=0.0, sampling_params=session.sampling_params
    )
    Scheduler._update_request_as_session(scheduler, session, update)


def test_streaming_session_that_goes_on_from_a_changed_token() -> None:
    session = request(TOKENS[:20], resumable=True)
    made = TokenKeys(NAMESPACE, CHUNK, session, ())
    session.append_output_token_ids([7, 7, 7, 8])
    before = list(made.whole(24))
    assert len(before) == 3
    session.num_computed_tokens = 23  # the last token's KV was not computed: vLLM drops it
    go_on(session, TOKENS[23:])
    assert list(session.all_token_ids) == [*TOKENS[:20], 7, 7, 7, *TOKENS[23:]]
    found = list(made.whole(37))
    assert found == keys(request(list(session.all_token_ids)))[:4]
    assert differing(before, found) == [2]


def test_keys_do_not_depend_on_the_process() -> None:
    program = (
        "from lmcache_native.integration.vllm.token_keys import TokenKeys\n"
        "from lmcache_native.integration.vllm.namespace import Namespaces\n"
        "from types import SimpleNamespace as N\n"
        "item = N(identifier='cat', mm_position=N(offset=3, length=9))\n"
        f"r = N(all_token_ids={TOKENS}, num_prompt_tokens={len(TOKENS)}, cache_salt='s', mm_features=[item], prompt_embeds=None)\n"
        f"keys = TokenKeys(Namespaces({{'b': '1', 'a': '2'}}).plain(), {CHUNK}, r, (('a', 'b'),))\n"
        f"print(keys.whole({len(TOKENS)}).tobytes().hex(), keys.tail({len(TOKENS)}).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout
        for seed in ("0", "1", "random")
    }
    asked = request(cache_salt="s", mm_features=[feature("cat", 3, 9)])
    here = keys(asked, namespace=Namespaces({"a": "2", "b": "1"}).plain(), tags=(("a", "b"),))
    assert found == {b"".join(here[:4]).hex() + " " + here[4].hex() + "\n"}


# ---- a request's own settings -------------------------------------------------------------------------------------------


def test_settings() -> None:
    assert request_settings(None) == RequestSettings()
    assert request_settings({}) == RequestSettings()
    found = request_settings({"lmcache.skip_save": "true", "lmcache.tag.b": 2, "lmcache.tag.a": "x", "do_remote_prefill": True})
    assert found == RequestSettings(True, (("a", "x"), ("b", "2")))


@pytest.mark.parametrize("value", ["perhaps", "", None, 2, [], 0.5])
def test_wrong_settings(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"lmcache\.skip_save=.* \(kv_transfer_params\): must be true or false"):
        request_settings({"lmcache.skip_save": value})


# ---- namespaces ---------------------------------------------------------------------------------------------------------


def test_epoch_changes_every_namespace_for_good() -> None:
    namespaces = Namespaces({"model": "m"})
    other = Namespaces({"model": "m"})
    assert namespaces.plain() == other.plain()
    before = namespaces.plain()
    namespaces.raise_epoch()
    other.raise_epoch()
    assert len({before, namespaces.plain(), other.plain()}) == 3


def weights(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def test_adapters_weights_are_in_the_namespace(tmp_path: Path) -> None:
    def of(namespaces: Namespaces, name: str, number: int, path: Path) -> bytes | None:
        found = namespaces.of(LoRARequest(name, number, str(path)))
        return None if found is None else found.id

    first, second = weights(tmp_path / "first", b"\0" * 8 + b"one"), weights(tmp_path / "second", b"\0" * 8 + b"two")
    here, elsewhere = Namespaces({"model": "m"}), Namespaces({"model": "m"})
    plain, adapted = here.plain(), of(here, "a", 1, first)
    assert adapted == of(elsewhere, "a", 1, first)
    assert len({plain, adapted, of(here, "b", 2, second)}) == 3
    weights(first, b"\0" * 8 + b"two")
    assert of(here, "a", 1, first) is None  # the weights that vLLM loaded, or these if it had to load them again
    assert of(elsewhere, "a", 3, first) != adapted  # loaded again
    assert of(here, "a", 3, first) == of(Namespaces({"model": "m"}), "a", 1, first) != adapted


def test_a_namespace_holds_while_the_adapters_files_are_those_of_its_arrival(tmp_path: Path) -> None:
    namespaces = Namespaces({"model": "m"})
    path = weights(tmp_path / "lora", b"\0" * 8 + b"one")
    adapter = LoRARequest("a", 1, str(path), load_inplace=True)
    early = namespaces.of(adapter)
    assert early is not None
    assert early.holds()
    weights(path, b"\0" * 8 + b"two")
    late = namespaces.of(adapter)
    assert late is not None
    assert late.holds()
    assert not early.holds()
    assert late.id != early.id
    shutil.rmtree(path)
    assert not late.holds()
    plain = namespaces.of(None)
    assert plain is not None
    assert plain.holds()


def test_scheme_names_the_chunk_and_an_opaque_block() -> None:
    schemes = [token_scheme(256, None), token_scheme(16, None), token_scheme(256, 16), token_scheme(256, 32)]
    assert len({canonical_text(scheme) for scheme in schemes}) == 4
