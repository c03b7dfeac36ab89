"""docs/grafana as Grafana and Prometheus will read it. The names in it are checked against a running server by tests/e2e."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[2] / "docs" / "grafana"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "lmcache-native.json").read_text())
    return found


def test_what_an_import_needs(dashboard: dict[str, Any]) -> None:
    assert dashboard["id"] is None, "an import gives it one"
    assert dashboard["uid"]
    assert dashboard["title"] == "lmcache-native"
    assert dashboard["schemaVersion"] >= 36
    assert {row["id"] for row in dashboard["__requires"] if row["type"] == "panel"} == {
        panel["type"] for panel in dashboard["panels"] if panel["type"] != "row"
    }


def test_panels_have_their_place(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in panels]
    assert all(x >= 0 and w > 0 and h > 0 and x + w <= 24 for x, _y, w, h in places)
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(places, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay, "two panels overlap"


def test_panels_ask_something(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "model", "engine"}
    built_in = {"__rate_interval", "__range"}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ids)) == len(ids) > 0
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert target["legendFormat"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | built_in
            assert target["expr"].count('engine=~"$engine"') == target["expr"].count("{"), "a selector without the variables"


def test_alerts_are_whole() -> None:
    yaml = pytest.importorskip("yaml")
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for rule in group["rules"]:
        assert rule["expr"]
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
