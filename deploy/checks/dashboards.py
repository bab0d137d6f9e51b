"""The Grafana dashboard: laid out soundly, explained, and asking Prometheus what it understands."""

import collections
import pathlib
import re
import tempfile

import yaml

from programs import load, problems

DASHBOARD = "grafana/dashboards/rheostat.json"
# What Grafana puts in before it asks.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$__interval": "15s"}


def panels(dashboard: dict):
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def dashboard_is_sound():
    dashboard = load(DASHBOARD)
    every = list(panels(dashboard))
    for identity, count in collections.Counter(panel["id"] for panel in every).items():
        if count > 1:
            yield f"{count} panels have the id {identity}"
    yield from overlaps(every)
    for panel in (p for p in every if p["type"] != "row"):
        title = panel["title"]
        if not panel.get("description"):
            yield f"{title}: no description"
        if "unit" not in panel["fieldConfig"]["defaults"]:
            yield f"{title}: no unit"
        if not panel.get("targets") or panel["datasource"]["uid"] != "${datasource}":
            yield f"{title}: asks nothing, or not the data source that the user chose"
    yield from queries_parse(every)


def overlaps(every: list[dict]):
    taken = {}
    for panel in every:
        at = panel["gridPos"]
        if at["x"] + at["w"] > 24:
            yield f"{panel['title']}: wider than the grid"
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            other = taken.setdefault(cell, panel["title"])
            if other != panel["title"]:
                yield f"{panel['title']} lies over {other}"
                break


def queries_parse(every: list[dict]):
    """As recording rules, so that promtool reads each query."""
    rules = []
    for panel in every:
        for target in panel.get("targets", []):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            if "$" in re.sub(r'"[^"]*"', "", query):
                yield f"{panel['title']}: a variable outside of quotes in {target['expr']}"
            rules.append({"record": f"panel_{panel['id']}_{target['refId']}", "expr": query})
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "queries.yaml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
        yield from problems("promtool", "check", "rules", "--lint=none", str(path))
