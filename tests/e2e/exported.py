"""What a running server's /metrics has, against the dashboard, the alerts and docs/metrics.md: no name or label in one that is not
in the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[2] / "docs"
OURS = "lmcache_native_"
LMCACHE = "lmcache:"

_METRIC = re.compile(r"\b((?:lmcache_native_|vllm:)\w+)(\{[^}]*\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_BY = re.compile(r"\bby \(([^)]*)\)")


class Exported:
    """One scrape. Sample name -> the label names of each of its samples."""

    def __init__(self, text: str) -> None:
        self.labels: dict[str, set[str]] = {}
        self.families: dict[str, str] = {}  # name in the document -> type
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue  # prometheus_client's, of each counter and histogram
            name = family.name + "_total" if family.type == "counter" else family.name
            self.families[name] = family.type
            for sample in family.samples:
                self.labels.setdefault(sample.name, set()).update(sample.labels)
                self.values[sample.name, frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """The sum over the samples with these labels. KeyError: there is none."""
        found = [value for (sample, has), value in self.values.items() if sample == name and labels.items() <= dict(has).items()]
        if not found:
            raise KeyError(f"{name}{labels}")
        return sum(found)


def scrape(server: Any) -> Exported:
    return Exported(server._request("GET", "/metrics").decode())


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "grafana" / "lmcache-native.json").read_text())
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL)."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']!r}", target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]
    for line in (DOCS / "grafana" / "alerts.yml").read_text().splitlines():
        if line.strip().startswith("expr:"):
            yield "alert", line.split(":", 1)[1]


def problems(exported: Exported) -> list[str]:
    """What the dashboard and the alerts name and the server does not have, and what only one of server and document has."""
    found = []
    shown = set()
    for where, expression in expressions():
        grouped = {label.strip() for group in _BY.findall(expression) for label in group.split(",")}
        for name, selector in _METRIC.findall(expression):
            shown.add(re.sub(r"_(bucket|sum|count)$", "", name))
            if name not in exported.labels:
                found.append(f"{where}: {name} is not exported")
                continue
            for label in {*_LABEL.findall(selector), *grouped} - exported.labels[name]:
                found.append(f"{where}: {name} has no label {label}")
    documented = set(re.findall(r"^\| `(lmcache_native_\w+)", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    has = {name for name in exported.families if name.startswith(OURS)}
    found += [f"{name} is exported and not in docs/metrics.md" for name in sorted(has - documented)]
    found += [f"{name} is in docs/metrics.md and not exported" for name in sorted(documented - has)]
    found += [f"{name} is in no panel" for name in sorted(has - shown)]
    return found


def lmcache_names(exported: Exported) -> tuple[set[str], set[str]]:
    """LMCache's names (as exported, and as docs/metrics.md lists those that are filled)."""
    has = {name for name in exported.families if name.startswith(LMCACHE)}
    return has, set(re.findall(r"^\| `(lmcache:\w+)", (DOCS / "metrics.md").read_text(), re.MULTILINE))
