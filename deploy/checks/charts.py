"""The chart: it renders, refuses what it cannot use, and says the same as the plain manifests."""

import functools
import itertools
import re

from programs import documents, output, problems, run

CHART = "helm/rheostat"
PRODUCTION = ["autoscaling.enabled=true", "monitoring.podMonitor.enabled=true"]
EVERYTHING = PRODUCTION + [
    "monitoring.prometheusRule.enabled=true",
    "monitoring.dashboard.enabled=true",
    "models.existingClaim=models",
    "configSecret=rheostat-config",
    "drainSeconds=90",
    "priorityClassName=high",
    "image.tag=1.2.3",
    "nodeSelector.disk=ssd",
    "extraArgs[0]=--log=debug",
    "env[0].name=RHEOSTAT_LOG",
    "env[0].value=debug",
]
# Values that would otherwise render into something that fails only in the cluster, or worse, does not fail.
BAD = [
    "replicaCount=two",
    "replicas=3",
    "image.pullPolicy=Sometimes",
    "drainSeconds=-1",
    "preStopSeconds=0",
    "service.httpPort=80800",
    "autoscaling.minReplicas=0",
    "autoscaling.sequencesWaiting=many",
    "resources.limits.memory=lots",
    "config=not toml",
    "profile=a b",
    "monitoring.podMonitor.interval=often",
]


def template(values: list[str], release: str = "rheostat") -> list[str]:
    return ["helm", "template", release, CHART] + list(itertools.chain(*(("--set", v) for v in values)))


@functools.cache
def rendered(values: tuple[str, ...] = ()) -> list[dict]:
    return documents(output(*template(list(values))))


@functools.cache
def built(folder: str) -> list[dict]:
    return documents(output("kubectl", "kustomize", f"kubernetes/{folder}"))


def chart_lints():
    yield from problems("helm", "lint", "--strict", "--quiet", CHART)
    yield from problems(*template(EVERYTHING, "a-release-with-a-long-name"))


def chart_refuses_bad_values():
    for value in BAD:
        if run(*template([value])).returncode == 0:
            yield f"helm accepts {value}"


def essence(item: dict) -> dict:
    """An object without what says only by which tool it was made."""
    if isinstance(item, dict):
        ours = {key: essence(value) for key, value in item.items()}
        for key in ("app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart", "checksum/config"):
            ours.pop(key, None)
        # Defaults that the chart spells out.
        if ours.get("imagePullPolicy") == "IfNotPresent":
            ours.pop("imagePullPolicy")
        return {key: value for key, value in ours.items() if not (key == "annotations" and not value)}
    if isinstance(item, list):
        return [essence(value) for value in item]
    if isinstance(item, str):
        # kustomize appends a hash to the name of a generated ConfigMap.
        return re.sub(r"-config-[a-z0-9]{10}$", "-config", item).strip()
    return item


def by_name(items: list[dict]) -> dict[str, dict]:
    return {f"{item['kind']} {essence(item['metadata']['name'])}": essence(item) for item in items}


def chart_and_manifests_agree():
    for folder, values in (("base", ()), ("production", tuple(PRODUCTION))):
        ours, theirs = by_name(built(folder)), by_name(rendered(values))
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs:
                yield f"{folder}: only {'the chart' if name in theirs else 'kubernetes/' + folder} has {name}"
            else:
                yield from (f"{folder}: {name}: {where}" for where in differences(ours[name], theirs[name]))


def differences(ours, theirs, path: str = ""):
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from differences(ours.get(key), theirs.get(key), f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (left, right) in enumerate(zip(ours, theirs)):
            yield from differences(left, right, f"{path}[{index}]")
    elif ours != theirs:
        yield f"{path}: the manifests say {ours!r}, the chart {theirs!r}"
