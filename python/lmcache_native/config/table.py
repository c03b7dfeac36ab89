"""The table of all keys: what each is called, takes and means, and how far it is honoured. Parsing, command and reference use it.

The rows are in rows_done.py (what has an effect) and rows_other.py (what is only known).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lmcache_native.config.values import Parser, Profile, parse_flag

FEATURES_PAGE = "docs/lmcache-features.md"

BOTH = frozenset(Profile)
TOKEN = frozenset({Profile.LMCACHE})
BLOCK = frozenset({Profile.OFFLOADING})


class Kind(enum.Enum):
    DONE = "done"
    ACCEPTED = "accepted"  # has no effect here, and that is right
    UNSUPPORTED = "unsupported"  # an error when it asks for something


class Place(enum.Enum):
    """Where a key is written."""

    ANYWHERE = "file, environment, kv_connector_extra_config"
    EXTRA = "kv_connector_extra_config"
    ENVIRONMENT = "environment"
    SUB = "extra_config"
    REQUEST = "kv_transfer_params of a request"


class Theme(enum.Enum):
    HOST = "Host memory"
    NVME = "NVMe"
    CHUNKS = "Chunks and keys"
    LOADING = "Loading"
    SAVING = "Saving"
    PROCESS = "Process"
    REQUEST = "Per request"
    VLLM = "vLLM's own keys"
    GDS = "GPUDirect Storage"
    REMOTE = "Remote stores and plugins"
    SHARING = "Sharing between engines: controller, P2P, MP server"
    DISAGGREGATED = "Disaggregated prefill and NIXL"
    BLENDING = "Blending"
    OBSERVING = "HTTP server, statistics, telemetry"
    OTHER = "Other models and settings of other versions"


@dataclass(frozen=True, slots=True)
class Key:
    """One row. `default`: LMCache's, as a value of its type; a value equal to it asks for nothing."""

    name: str  # a trailing * stands for any rest
    kind: Kind
    theme: Theme
    takes: str  # type, with the unit where there is one
    default: object
    meaning: str
    parse: Parser | None = None
    field: str | None = None  # of NativeConfig
    unit: str = ""  # how the field is shown: GiB, ms
    secondary: bool = False  # another key is the field's own name; it wins where both are given in one place
    connectors: frozenset[Profile] = BOTH  # that honour it
    elsewhere: str = ""  # why the other connector may ignore it; empty: it refuses it
    instead: str = ""  # of an unsupported key: what to do
    see: str = ""  # of an unsupported key: its heading's anchor in FEATURES_PAGE
    needs: tuple[str, ...] = ()  # has a meaning only where one of these is asked for
    place: Place = Place.ANYWHERE
    shown_default: str | Mapping[Profile, str] = ""  # in words, where `default` says it badly or differs from ours

    @property
    def is_prefix(self) -> bool:
        return self.name.endswith("*")

    def default_for(self, profile: Profile) -> str:
        """The default in words, or nothing."""
        return self.shown_default if isinstance(self.shown_default, str) else self.shown_default[profile]

    def honoured_by(self, profile: Profile) -> bool:
        return self.kind is Kind.DONE and profile in self.connectors


# LMCache's older names -> today's. Values mean the same.
ALIASES = {
    "enable_xpyd": "enable_pd",
    "nixl_role": "pd_role",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "controller_url": "controller_pull_url",
    "lmcache_worker_port": "lmcache_worker_ports",
    "plugin_locations": "runtime_plugin_locations",
    "external_backends": "storage_plugins",
}


class Table:
    """Lookup by place and name."""

    def __init__(self, rows: tuple[Key, ...]) -> None:
        self._exact: dict[tuple[Place, str], Key] = {}
        self._prefixes: list[Key] = []
        for row in rows:
            if row.is_prefix:
                self._prefixes.append(row)
            elif (row.place, row.name) in self._exact:
                raise ValueError(f"key {row.name!r} twice in the table")
            else:
                self._exact[row.place, row.name] = row
        self.rows = rows

    def __iter__(self) -> Iterator[Key]:
        return iter(self.rows)

    def find(self, name: str, *places: Place) -> Key | None:
        name = ALIASES.get(name, name) if Place.ANYWHERE in places else name
        for place in places:
            found = self._exact.get((place, name))
            if found is not None:
                return found
        for row in self._prefixes:
            if row.place in places and name.startswith(row.name[:-1]):
                return row
        return None

    def names(self, *places: Place) -> list[str]:
        return sorted(name for place, name in self._exact if place in places)


def is_default(value: object, default: object) -> bool:
    """Whether a value is absent, or `default` in another spelling."""
    if value is None or value == default:
        return True
    if isinstance(value, str):
        word = value.strip()
        if word.lower() in ("", "none", "null") or word == str(default).strip():
            return True
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            return _number(word) == default
    return isinstance(default, bool) and parse_flag(value) == default


def asks_for_nothing(value: object, default: object) -> bool:
    """Whether a value is `default`, empty, zero or says no."""
    if is_default(value, default):
        return True
    if isinstance(value, (list, tuple, Mapping)):
        return len(value) == 0
    return value == 0 or parse_flag(value) is False


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
