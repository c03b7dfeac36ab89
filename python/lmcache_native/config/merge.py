"""From the values of all sources to one NativeConfig, or to one error that lists everything wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lmcache_native.config import machine
from lmcache_native.config.sources import TABLE, Collected, Item, collect, expand
from lmcache_native.config.table import FEATURES_PAGE, Key, Kind, Place, Theme, asks_for_nothing, is_default
from lmcache_native.config.values import GIB, HOST_LOCATION, NVME_LOCATION, NativeConfig, Profile
from lmcache_native.errors import InvalidArgument, LmcacheNativeError, Unsupported
from lmcache_native.logging import get_logger

logger = get_logger(__name__)

IGNORE_UNSUPPORTED = "native_ignore_unsupported"
MIN_HOST_BYTES = 4 << 20
CONNECTORS = {Profile.LMCACHE: "LMCacheNativeConnector", Profile.OFFLOADING: "NativeOffloadingConnector"}

_FIELD_DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(NativeConfig) if f.default is not dataclasses.MISSING
}
_PROFILE_DEFAULTS: dict[Profile, dict[str, Any]] = {
    Profile.OFFLOADING: {},
    Profile.LMCACHE: {"host_bytes": 5 * GIB, "chunk_tokens": 256},
}


class Explained(NamedTuple):
    """One line of what is in force. `value`: as a user would write it. `kind`: done, accepted or unsupported."""

    key: str
    value: str
    source: str
    kind: str


def resolve(
    extra_config: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    profile: Profile = Profile.OFFLOADING,
    warn: bool = False,
) -> NativeConfig:
    """The configuration, checked without touching the machine (reserve_local_cpu_size alone reads its available memory).

    Raises Unsupported when all that is wrong is not done yet, else InvalidArgument; the message names every such field, its
    value, its source and what is right. `warn`: log what is ignored or unknown. Every process of an engine resolves; one warns.
    """
    found = evaluate(extra_config, environ, profile)
    for message in found.warnings if warn else ():
        logger.warning("%s", message)
    if warn and found.accepted:
        logger.info("without effect, and not needed here: %s", ", ".join(sorted(found.accepted)))
    return found.config


def explain(extra_config: Mapping[str, Any], environ: Mapping[str, str], profile: Profile) -> list[Explained]:
    """What is in force and where it comes from: each key with an effect, and each other key that is given. Errors as resolve()."""
    return evaluate(extra_config, environ, profile).explained


@dataclass(slots=True)
class Evaluation:
    config: NativeConfig
    explained: list[Explained]
    warnings: list[str]
    accepted: list[str]  # names, as written, of what is given and has no effect


def evaluate(extra_config: Mapping[str, Any], environ: Mapping[str, str], profile: Profile) -> Evaluation:
    """resolve() and explain() in one, logging nothing."""
    merging = _Merging(profile, collect(extra_config, environ))
    merging.parse()
    merging.judge_the_rest()
    merging.combine()
    return merging.finish()


@dataclass(slots=True)
class _Merging:
    profile: Profile
    found: Collected
    values: dict[str, Any] = field(default_factory=dict)  # row -> parsed value of its strongest item
    items: dict[str, Item] = field(default_factory=dict)  # row (a prefix: as written) -> its strongest item
    fields: dict[str, tuple[Item, Any]] = field(default_factory=dict)  # field -> what decides it
    config: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)  # field -> why it is not what decides it
    failures: list[tuple[str, Item, LmcacheNativeError]] = field(default_factory=list)  # row, wrong value, what is wrong
    failed: set[str] = field(default_factory=set)  # rows with a wrong value that nothing overrides
    unsupported: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    ignore_unsupported: bool = False

    # ---- values -------------------------------------------------------------------------------------------------------------

    def parse(self) -> None:
        for item in self.found.items:
            self._take(item)
        parent = self.items.get("extra_config")
        if parent is not None and "extra_config" in self.values:
            before = len(self.found.items)
            expand(parent, self.values["extra_config"], self.found)
            for item in self.found.items[before:]:
                self._take(item)
        self._judge_failures()
        flag = self.items.get(IGNORE_UNSUPPORTED)
        self.ignore_unsupported = flag is not None and self.values.get(IGNORE_UNSUPPORTED) is True

    def _take(self, item: Item) -> None:
        key = item.key
        row = item.given.name if key.is_prefix else key.name
        self.items[row] = item
        if key.parse is None:
            return
        try:
            value = key.parse(item.given)
        except (InvalidArgument, Unsupported) as error:
            self.failures.append((row, item, error))
            return
        self.values[row] = value
        if key.field is None or not key.honoured_by(self.profile):
            return
        decided = self.fields.get(key.field)
        if decided is None or item.strength >= decided[0].strength:
            self.fields[key.field] = (item, value)

    def _judge_failures(self) -> None:
        """A wrong value is an error, unless a later source gives the same thing: then nobody uses it."""
        for row, item, error in self.failures:
            by = self._overriding(row, item)
            if by is not None:
                self.found.warnings.append(f"{error}; not used, {by.given.name} ({by.given.source}) wins over it")
                continue
            (self.unsupported if isinstance(error, Unsupported) else self.found.errors).append(str(error))
            self.failed.add(row)

    def _overriding(self, row: str, item: Item) -> Item | None:
        strongest = self.items[row]
        if strongest.rank > item.rank:
            return strongest
        decided = self.fields.get(item.key.field) if item.key.field is not None else None
        return decided[0] if decided is not None and decided[0].rank > item.rank else None

    def judge_the_rest(self) -> None:
        """What is given and has no effect: right, refused, or worth a word."""
        for row, item in self.items.items():
            key = item.key
            if key.honoured_by(self.profile) or row in self.failed:
                continue
            if key.kind is Kind.DONE:
                self._judge_other_connectors(row, item)
            elif asks_for_nothing(item.given.value, key.default):
                continue
            elif key.theme is Theme.VLLM:
                self.ignored.append(item.given.name)
            elif key.kind is Kind.ACCEPTED or (key.needs and not self._asked(key.needs)):
                self.accepted.append(item.given.name)
            elif not key.needs:
                self._refuse(item, _left_out(key), key.instead, self._parts_of(row), see=key.see)

    def _judge_other_connectors(self, row: str, item: Item) -> None:
        key = item.key
        if self._neutral(row, item):
            return
        if key.elsewhere:
            self.accepted.append(item.given.name)
            return
        (honouring,) = key.connectors
        what = f"only {CONNECTORS[honouring]} honours it"
        self._refuse(item, f"left out with {CONNECTORS[self.profile]}", f"{key.instead}; {what}" if key.instead else what, [])

    def _neutral(self, row: str, item: Item) -> bool:
        """Whether a key of the other connector asks for what this one does anyway."""
        if item.key.parse is None:
            return is_default(item.given.value, item.key.default)
        if item.key.field is None:
            return bool(self.values[row] == item.key.default)
        return bool(self.values[row] == _FIELD_DEFAULTS[item.key.field])

    def _refuse(self, item: Item, right: str, instead: str, parts: list[str], *, see: str = "") -> None:
        also = f" (with it: {', '.join(sorted(parts))})" if parts else ""
        self.unsupported.append(item.given.must_be(f"{right}: {instead}{also}{_pointer(see)}"))

    def _asked(self, rows: Iterable[str]) -> bool:
        return any(
            row in self.items and not asks_for_nothing(self.items[row].given.value, self.items[row].key.default) for row in rows
        )

    def _parts_of(self, row: str) -> list[str]:
        return [
            item.given.name
            for item in self.items.values()
            if item.key.kind is Kind.UNSUPPORTED
            and row in item.key.needs
            and not asks_for_nothing(item.given.value, item.key.default)
        ]

    # ---- what belongs together ----------------------------------------------------------------------------------------------

    def combine(self) -> None:
        self.config = dict(_PROFILE_DEFAULTS[self.profile])
        self.config.update({name: value for name, (_, value) in self.fields.items()})
        self._host()
        self._nvme()
        self._locations()
        self._gds()
        self._loading()
        self._numa()

    def _error(self, text: str) -> None:
        self.found.errors.append(text)

    def _host(self) -> None:
        if "host_bytes" not in self.config:
            if not {"max_local_cpu_size", "cpu_bytes_to_use"} & self.failed:
                self._error(
                    "host memory size missing: give --kv-offloading-size GIB (or max_local_cpu_size in "
                    "kv_connector_extra_config, or LMCACHE_MAX_LOCAL_CPU_SIZE)"
                )
            return
        reserve = self.values.get("reserve_local_cpu_size", 0)
        if not reserve or "reserve_local_cpu_size" in self.failed:
            return
        available = machine.available_memory_bytes()
        host = min(self.config["host_bytes"], available - reserve)
        if host < MIN_HOST_BYTES:
            largest = max(0, available - MIN_HOST_BYTES)
            self._error(
                self.items["reserve_local_cpu_size"].given.must_be(
                    f"at most {largest / GIB:.3f}: {available / GIB:.3f} GiB are available, and host memory needs 4 MiB"
                )
            )
        elif host < self.config["host_bytes"]:
            self.config["host_bytes"] = host
            self.derived["host_bytes"] = "reserve_local_cpu_size"

    def _nvme(self) -> None:
        directories = self.config.get("directories")
        limit = self.config.get("nvme_bytes")
        if {"local_disk", "max_local_disk_size", "local_disk_sizes"} & self.failed:
            return
        if self.config.get("directory_bytes"):
            if directories:
                limit = self._sizes_of_directories(directories, limit)
            elif "local_disk" in self.found.nulls:
                del self.config["directory_bytes"]
                self.accepted.append(self.items["local_disk_sizes"].given.name)
            else:
                self._error(self.items["local_disk_sizes"].given.must_be("left out without local_disk"))
        if directories and limit is None:
            given = self.items["local_disk"].given
            self._error(
                given.must_be(
                    "left out without max_local_disk_size, or its limit in GiB given, for example LMCACHE_MAX_LOCAL_DISK_SIZE=100"
                )
            )
        elif directories and limit == 0:
            self._error(self.items["max_local_disk_size"].given.must_be("a number of GiB greater than 0, for example 100"))
        elif limit and not directories and "local_disk" in self.found.nulls:
            self.config["nvme_bytes"] = 0
            self.derived["nvme_bytes"] = "local_disk: null"
            self.accepted.append(self.items["max_local_disk_size"].given.name)
        elif limit and not directories:
            self._error(
                self.items["max_local_disk_size"].given.must_be(
                    "left out without local_disk, or its directory given, for example LMCACHE_LOCAL_DISK=/mnt/nvme/kv"
                )
            )
        if self.values.get("local_cpu") is False and not directories:
            self._error(
                self.items["local_cpu"].given.must_be(
                    "true, or given with local_disk and max_local_disk_size: without both nothing could be kept"
                )
            )

    def _sizes_of_directories(self, directories: tuple[Path, ...], limit: int | None) -> int:
        """local_disk_sizes against the other keys; what they are in all."""
        sizes = self.config["directory_bytes"]
        given = self.items["local_disk_sizes"].given
        if len(sizes) != len(directories):
            self._error(given.must_be(f"{len(directories)} sizes, one for each directory of local_disk"))
        elif self.config.get("striped") is False:
            self._error(given.must_be("left out with local_disk_path_sharding=by_engine: each engine uses one directory there"))
        elif limit and limit != sum(sizes):
            total = self.items["max_local_disk_size"].given
            self._error(given.must_be(f"{limit / GIB:g} in all, as {total.name} ({total.source}) says, or that left out"))
        else:
            self.config["nvme_bytes"] = sum(sizes)
            self.derived["nvme_bytes"] = "local_disk_sizes"
        return sum(sizes)

    def _locations(self) -> None:
        store = self.values.get("store_location")
        if store is None or {"store_location", "local_disk"} & self.failed:
            return
        configured = NVME_LOCATION if self.config.get("directories") else HOST_LOCATION
        if store != configured:
            why = {
                HOST_LOCATION: "with local_disk, what is stored goes to NVMe too",
                NVME_LOCATION: "there is no local_disk",
            }.get(store, "there is no such location")
            self.unsupported.append(self.items["store_location"].given.must_be(f"{configured}, or left out: {why}"))
            self.failed.add("store_location")

    def _gds(self) -> None:
        path = self.values.get("gds_path")
        if path is not None and "local_disk" not in self.failed:
            if path != self.config.get("directories"):
                what = "what local_disk is, or left out: there is one store, use local_disk and max_local_disk_size"
                self._refuse_row("gds_path", what)
            else:
                for row in [row for row in self.items if "gds_path" in self.items[row].key.needs]:
                    if not asks_for_nothing(self.items[row].given.value, self.items[row].key.default):
                        self._refuse_row(row, _left_out(self.items[row].key))
        if self.values.get("use_gds") == "on":
            if self.profile is Profile.OFFLOADING:
                self._refuse_row("use_gds", f"auto or off: only {CONNECTORS[Profile.LMCACHE]} honours it")
            elif not self.config.get("directories") and not {"local_disk", "max_local_disk_size", "local_disk_sizes"} & self.failed:
                self._error(self.items["use_gds"].given.must_be("auto or off without local_disk"))
            elif self.config.get("layerwise"):
                self._refuse_row("use_gds", "auto or off with use_layerwise: records are read whole")
            elif self.config.get("retrieve_nvme") is False:
                self._error(self.items["use_gds"].given.must_be("auto or off where retrieve_locations leaves NVMe out"))
        if {"gds_path", "use_gds"} & self.failed:
            self.config.pop("gds_buffer_bytes", None)
            self.config.pop("use_gds", None)

    def _refuse_row(self, row: str, right: str) -> None:
        parts = self._parts_of(row)
        also = f" (with it: {', '.join(sorted(parts))})" if parts else ""
        self.unsupported.append(self.items[row].given.must_be(right + also + _pointer(self.items[row].key.see)))
        self.failed.add(row)

    def _loading(self) -> None:
        if self.profile is Profile.OFFLOADING:
            return
        if self.config.get("layerwise"):
            given = self.fields.get("async_loading")
            if given is None:
                self.config["async_loading"] = False
                self.derived["async_loading"] = "use_layerwise"
            elif given[1] is True:
                layerwise = self.fields["layerwise"][0].given
                self._error(
                    given[0].given.must_be(
                        f"left out or false with {layerwise.name}={layerwise.value!r} ({layerwise.source}), "
                        "which loads synchronously"
                    )
                )
        if self.values.get("discard_partial_chunks") and self.config.get("save_partial_chunk"):
            self.config["save_partial_chunk"] = False
            self.derived["save_partial_chunk"] = "discard_partial_chunks"

    def _numa(self) -> None:
        mode = self.values.get("numa_mode")
        nodes = self.config.pop("numa_nodes", None)
        if mode == "auto":
            self.config["numa_auto"] = True
        elif mode == "manual":
            if nodes is not None:
                self.config["numa_nodes"] = nodes
            elif "gpu_to_numa_mapping" not in self.failed:
                self._error(
                    self.items["numa_mode"].given.must_be(
                        'given with gpu_to_numa_mapping in extra_config, for example {"gpu_to_numa_mapping": {"0": 0}}'
                    )
                )
        if nodes is not None and mode != "manual":
            self.accepted.append(self.fields.pop("numa_nodes")[0].given.name)

    # ---- the end ------------------------------------------------------------------------------------------------------------

    def finish(self) -> Evaluation:
        hint = f"LMCACHE_{IGNORE_UNSUPPORTED.upper()}=1 starts without what is unsupported"
        warnings = list(self.found.warnings)
        if self.ignored:
            warnings.append("ignored, no meaning here: " + ", ".join(sorted(self.ignored)))
        refused = self.unsupported
        if refused and self.ignore_unsupported:
            warnings.append("unsupported and ignored: " + "; ".join(refused))
            refused = []
        problems = self.found.errors + refused
        if problems:
            kind: type[LmcacheNativeError] = InvalidArgument if self.found.errors else Unsupported
            raise kind("\n".join([_listed(problems), *self.found.warnings, *([hint] if refused else [])]))
        config = NativeConfig(**self.config)
        return Evaluation(config, self._explained(config), warnings, self.accepted)

    def _explained(self, config: NativeConfig) -> list[Explained]:
        lines = []
        written = {name for name, item in self.items.items() if item.key.is_prefix}
        for key in TABLE:
            if key.is_prefix:
                for name in sorted(n for n in written if self.items[n].key is key):
                    lines.append(self._given_line(name, self.items[name]))
                continue
            item = self.items.get(key.name)
            shown = item is not None or key.place is not Place.SUB
            refused = key.name in self.failed
            if shown and key.field is not None and not key.secondary and not refused and key.honoured_by(self.profile):
                lines.append(self._field_line(key, config))
            elif item is not None and key.name != "extra_config" and key.name != "cpu_bytes_to_use":
                lines.append(self._given_line(key.name, item))
        return lines

    def _field_line(self, key: Key, config: NativeConfig) -> Explained:
        assert key.field is not None
        decided = self.fields.get(key.field)
        source = "default"
        if decided is not None:
            item = decided[0]
            source = item.given.source
            if item.key.name == "cpu_bytes_to_use":
                source = "--kv-offloading-size"
            elif item.key.secondary:
                source = f"{item.key.name}, {source}"
        if key.field in self.derived:
            source = f"{self.derived[key.field]} ({source})"
        value = getattr(config, key.field)
        plain = _FIELD_DEFAULTS.get(key.field)
        word = key.default_for(self.profile)
        shown = word if decided is None and value == plain and word else _shown(value, key.unit)
        return Explained(key.name, shown, source, Kind.DONE.value)

    def _given_line(self, name: str, item: Item) -> Explained:
        key = item.key
        kind = key.kind
        if key.name in self.failed:
            kind = Kind.UNSUPPORTED
        elif kind is Kind.DONE and not key.honoured_by(self.profile):
            kind = Kind.ACCEPTED if key.elsewhere or self._neutral(key.name, item) else Kind.UNSUPPORTED
        elif kind is Kind.UNSUPPORTED and (
            asks_for_nothing(item.given.value, key.default) or (key.needs and not self._asked(key.needs))
        ):
            kind = Kind.ACCEPTED
        return Explained(name, _shown(item.given.value, ""), item.given.source, kind.value)


def _left_out(key: Key) -> str:
    if key.default is None or key.default is False or key.default == 0:
        return "left out, it is not supported"
    return f"left out or {key.default}, others are not supported"


def _pointer(see: str) -> str:
    return f"; see {FEATURES_PAGE}#{see}" if see else ""


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:" + "".join(f"\n- {text}" for text in problems)


_SCALES: dict[str, Callable[[float], float]] = {"GiB": lambda n: n / GIB, "MiB": lambda n: n / (1 << 20), "ms": lambda n: n * 1000}


def _shown(value: object, unit: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return str(value)
    if isinstance(value, (int, float)):
        return f"{_SCALES[unit](value) if unit in _SCALES else value:.10g}"
    if isinstance(value, (list, tuple)):
        return ",".join(_shown(part, unit) for part in value) or "none"
    return str(value)
