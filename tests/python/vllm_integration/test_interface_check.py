"""What we rely on is what vLLM has; and a vLLM that has something else is refused with everything that differs."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import lmcache_native.integration.vllm as integration
from lmcache_native import cli
from lmcache_native.errors import Unsupported
from lmcache_native.integration.vllm import (
    compat,
    connector,
    interface_check,
    layout,
    manager,
    shapes,
    slots,
    spec,
    token_connector,
    transfer,
    worker,
)

MODULES = (connector, layout, manager, slots, spec, token_connector, transfer, worker)
CLASSES = [
    (ours, base)
    for module in MODULES
    for ours in vars(module).values()
    if inspect.isclass(ours) and ours.__module__ == module.__name__
    for base in ours.__mro__
    if base.__module__.startswith("vllm.")
]
# dataclass() makes them, from fields; or they are about the class itself.
GENERATED = {"__abstractmethods__", "__annotations__", "__doc__", "__eq__", "__hash__", "__match_args__", "__module__", "__repr__"}


@pytest.fixture(autouse=True)
def looked_anew() -> Iterator[None]:
    interface_check._bad.cache_clear()
    yield
    interface_check._bad.cache_clear()


def test_this_vllm_has_all_of_it() -> None:
    assert [finding for finding in interface_check.check() if finding.state != interface_check.OK] == []
    for name in shapes.CONNECTORS:
        interface_check.require(name)


def test_every_shape_has_a_place() -> None:
    assert set(shapes.SHAPES) == {*shapes.SHAPES} & {*compat.INTERFACES, *shapes.HANDED}
    assert not set(compat.INTERFACES) & set(shapes.HANDED)
    assert set(shapes.HANDED) <= set(shapes.SHAPES)


@pytest.mark.parametrize(("ours", "base"), CLASSES, ids=lambda kind: kind.__name__)
def test_every_method_of_vllm_that_ours_replaces_is_listed(ours: type, base: type) -> None:
    """Then a release in which one of them has other parameters is noticed."""
    name = next((name for name, (_, attribute) in compat.INTERFACES.items() if attribute == base.__name__), None)
    assert name is not None
    listed = {text.partition("(")[0] or "__init__" for text in shapes.SHAPES[name].overrides + shapes.SHAPES[name].later}
    fields = {field for text in shapes.SHAPES.values() for field in text.fields.split()}
    generated = GENERATED | ({"__init__"} if dataclasses.is_dataclass(ours) else set())
    before = ours.__mro__[: ours.__mro__.index(base)]
    mine = {method for kind in before if kind.__module__.startswith("lmcache_native") for method in vars(kind)}
    nearer = {method for kind in before if kind.__module__.startswith("vllm.") for method in vars(kind)}  # listed there
    replaced = {method for method in vars(base) if not method.startswith(("_abc_", "__dataclass"))} & mine - nearer
    assert replaced - generated - fields <= listed, f"add to {name} in shapes.py"


def find(name: str) -> interface_check.Finding:
    (found,) = [finding for finding in interface_check.check() if finding.name == name]
    return found


def planted(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    module, attribute = compat.INTERFACES.get(name) or shapes.HANDED[name]
    monkeypatch.setattr(importlib.import_module(module), attribute, value)


class Renamed:
    def get_num_new_matched_tokens(self, request: Any, computed: int) -> Any: ...


class WithMore:
    def __init__(self, documentation: str, labelnames: Any, unit: str) -> None: ...


@dataclasses.dataclass
class Fields:
    """Fields without a default are no attributes of the class."""

    kv_cache_groups: list[Any]


class Assigned:
    def __init__(self) -> None:
        self.prompt_embeds = None


def test_other_parameters_of_what_we_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    base = compat.KVConnectorBase_V1
    monkeypatch.setattr(base, "get_num_new_matched_tokens", Renamed.get_num_new_matched_tokens)
    found = find("KVConnectorBase_V1")
    assert found.state == interface_check.DIFFERS
    assert found.differences == ("get_num_new_matched_tokens(request, computed) where (request, num_computed_tokens) was expected",)


def test_another_parameter_of_what_we_call(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "OffloadingCounterMetadata", WithMore)
    (difference,) = find("OffloadingCounterMetadata").differences
    assert difference == "(documentation, labelnames, unit) where (documentation, labelnames) was expected"


def test_members_and_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "LookupResult", enum.Enum("LookupResult", "MISS HIT RETRY"))
    assert find("LookupResult").differences == ("no member HIT_PENDING",)
    planted(monkeypatch, "KVCacheConfig", Fields)
    assert find("KVCacheConfig").differences == ("no num_blocks",)
    planted(monkeypatch, "Request", Assigned)
    assert "no prompt_embeds" not in find("Request").differences
    assert "no num_tokens" in find("Request").differences


def test_one_of_two_spellings_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "KVConnectorBlockState", type("Older", (), {"__annotations__": {"block_ids": dict}}))
    assert find("KVConnectorBlockState").state == interface_check.OK
    planted(monkeypatch, "KVConnectorBlockState", type("Other", (), {}))
    assert find("KVConnectorBlockState").differences == ("no get_block_ids or block_ids",)


def test_what_later_releases_ask_for_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(compat.KVConnectorBase_V1, "get_external_cache_hit_sources")
    monkeypatch.delattr(compat.OffloadingManager, "get_load_source")
    assert find("KVConnectorBase_V1").state == interface_check.OK
    assert find("OffloadingManager").state == interface_check.OK
    monkeypatch.setitem(sys.modules, "vllm.v1.metrics.cache_hit_source", None)
    assert find("CacheHitSource").state == interface_check.NOT_NEEDED
    monkeypatch.delitem(vars(compat), "CacheHitSource", raising=False)
    own = compat.CacheHitSource
    del vars(compat)["CacheHitSource"]  # or it would stay
    assert [member.name for member in own] == ["EXTERNAL_UNSPECIFIED", "HOST", "DISK"]


def test_what_a_method_of_later_releases_looks_like_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.OffloadingManager, "get_load_source", lambda self, key: None)
    assert find("OffloadingManager").differences == ("get_load_source(key) where (key, req_context) was expected",)


def test_block_tables_of_a_step_before_and_since_030() -> None:
    older = SimpleNamespace(block_ids={"a": ([1, 2],)})
    newer = SimpleNamespace(get_block_ids=lambda name: {"a": ([1, 2],)}[name])
    assert compat.scheduled_blocks(older, "a") == compat.scheduled_blocks(newer, "a") == ([1, 2],)


def test_one_error_lists_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "LookupResult", enum.Enum("LookupResult", "MISS HIT RETRY"))
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_offload.factory", None)
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.1")
    with pytest.raises(Unsupported) as caught:
        _ = integration.NativeOffloadingConnector
    message = str(caught.value)
    assert message.startswith("vLLM 0.99.1 cannot be used with NativeOffloadingConnector: ")
    assert "vllm.v1.kv_offload.base.LookupResult: no member HIT_PENDING" in message
    assert "vllm.v1.kv_offload.factory.OffloadingSpecFactory: missing" in message
    assert f"tested with vLLM {compat.tested_text()}" in message
    with pytest.raises(Unsupported, match="NativeOffloadingConnector"):
        _ = integration.NativeOffloadingSpec


def test_only_the_connector_that_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "LookupResult", enum.Enum("LookupResult", "MISS HIT RETRY"))
    assert integration.LMCacheNativeConnector is token_connector.LMCacheNativeConnector
    with pytest.raises(Unsupported):
        _ = integration.NativeOffloadingConnector


def test_a_module_that_breaks_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def import_module(name: str, *rest: Any) -> Any:
        if name == "vllm.lora.request":
            raise RuntimeError("no operator of that name")
        return original(name, *rest)

    monkeypatch.setattr(interface_check.importlib, "import_module", import_module)
    assert find("LoRARequest").differences == ("RuntimeError: no operator of that name",)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vllm-check"]) == 0
    text = capsys.readouterr().out
    assert f"vLLM {compat.vllm_version()}: tested" in text
    assert "LMCacheNativeConnector    can be used" in text
    planted(monkeypatch, "LookupResult", enum.Enum("LookupResult", "MISS HIT RETRY"))
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.1")
    assert cli.main(["vllm-check"]) == 1
    text = capsys.readouterr().out
    assert "vLLM 0.99.1: not tested" in text
    assert "differs     vllm.v1.kv_offload.base.LookupResult no member HIT_PENDING" in text
    assert "NativeOffloadingConnector cannot be used:" in text
    assert cli.main(["vllm-check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["connectors"]["LMCacheNativeConnector"] == {"usable": True, "missing": []}
    assert found["connectors"]["NativeOffloadingConnector"]["missing"] == [
        "vllm.v1.kv_offload.base.LookupResult: no member HIT_PENDING"
    ]
