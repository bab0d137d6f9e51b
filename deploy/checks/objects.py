"""Every Kubernetes object: valid by the cluster's schemas, and referring to what is there."""

import functools
import tomllib

import jsonschema
import kubernetes_validate

from charts import EVERYTHING, PRODUCTION, built, rendered
from programs import documents, load

# The oldest version that the chart allows, and the newest that is known.
VERSIONS = ("1.30", kubernetes_validate.latest_version())


@functools.cache
def sources() -> dict[str, list[dict]]:
    """What would be applied together, by where it comes from."""
    folders = {f"kubernetes/{folder}": built(folder) for folder in ("base", "production", "gateway")}
    return folders | {
        "chart (default)": rendered(),
        "chart (production)": rendered(tuple(PRODUCTION)),
        "chart (everything)": rendered(tuple(EVERYTHING)),
    }


def objects_are_valid():
    custom = load("checks/custom-resources.yaml")
    for source, items in sources().items():
        for item in items:
            name = f"{source}: {item['kind']} {item['metadata']['name']}"
            schema = custom.get(f"{item['apiVersion']}/{item['kind']}")
            if schema:
                yield from (f"{name}: {error.json_path}: {error.message}" for error in schema_errors(item, schema))
                continue
            for version in VERSIONS:
                try:
                    kubernetes_validate.validate(item, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    yield f"{name} (Kubernetes {version}): {error.json_path}: {error.message}"
                except kubernetes_validate.SchemaNotFoundError as error:
                    yield f"{name}: {error.message}"


def schema_errors(item, schema: dict):
    whole = {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {},
            "kind": {},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": schema,
        },
    }
    return jsonschema.Draft202012Validator(whole).iter_errors(item)


def of_kind(items: list[dict], kind: str) -> list[dict]:
    return [item for item in items if item["kind"] == kind]


def names(items: list[dict], kind: str) -> set[str]:
    return {item["metadata"]["name"] for item in of_kind(items, kind)}


def pod_spec(deployment: dict) -> dict:
    return deployment["spec"]["template"]["spec"]


def selector_of(item: dict) -> dict:
    spec = item["spec"]
    if item["kind"] == "Service":
        return spec["selector"]
    return spec.get("podSelector", spec.get("selector"))["matchLabels"]


def references_lead_somewhere():
    for source, items in sources().items():
        yield from (f"{source}: {problem}" for problem in broken_references(items))


def broken_references(items: list[dict]):
    deployments = of_kind(items, "Deployment")
    pods = [deployment["spec"]["template"]["metadata"]["labels"] for deployment in deployments]
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "InferencePool"):
        for item in of_kind(items, kind):
            wanted = selector_of(item)
            if not any(wanted.items() <= labels.items() for labels in pods):
                yield f"{kind} {item['metadata']['name']} selects {wanted}, which no pod has"
    for index, deployment in enumerate(deployments):
        selected = [i for i, labels in enumerate(pods) if selector_of(deployment).items() <= labels.items()]
        if selected != [index]:
            yield f"the selector of Deployment {deployment['metadata']['name']} matches another's pods"
        yield from broken_pod(deployment, items)
    for autoscaler in of_kind(items, "HorizontalPodAutoscaler"):
        target = autoscaler["spec"]["scaleTargetRef"]["name"]
        owner = next((d for d in deployments if d["metadata"]["name"] == target), None)
        if owner is None or "replicas" in owner["spec"]:
            yield f"HorizontalPodAutoscaler {target}: its Deployment is missing or fixes the number of replicas"
    for route in of_kind(items, "HTTPRoute"):
        for backend in (ref for rule in route["spec"]["rules"] for ref in rule["backendRefs"]):
            if backend["name"] not in names(items, backend["kind"]):
                yield f"HTTPRoute {route['metadata']['name']}: no {backend['kind']} {backend['name']}"


def broken_pod(deployment: dict, items: list[dict]):
    name, spec = deployment["metadata"]["name"], pod_spec(deployment)
    if spec["serviceAccountName"] not in names(items, "ServiceAccount"):
        yield f"Deployment {name}: no ServiceAccount {spec['serviceAccountName']}"
    for volume in spec["volumes"]:
        config = volume.get("configMap", {}).get("name")
        if config and config not in names(items, "ConfigMap"):
            yield f"Deployment {name}: no ConfigMap {config}"
    for container in spec["containers"]:
        security = container["securityContext"]
        confined = security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        if not (confined and spec["securityContext"]["runAsNonRoot"] and security["capabilities"]["drop"] == ["ALL"]):
            yield f"Deployment {name}: container {container['name']} is not confined"
        missing = {mount["name"] for mount in container["volumeMounts"]} - {v["name"] for v in spec["volumes"]}
        if missing:
            yield f"Deployment {name}: no volumes {missing}"


def drain_fits_grace():
    """No pod may be killed while its requests may still run."""
    for source, items in sources().items():
        configs = {item["metadata"]["name"]: item.get("data", {}) for item in of_kind(items, "ConfigMap")}
        for deployment in of_kind(items, "Deployment"):
            spec = pod_spec(deployment)
            config = next((v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v), None)
            text = configs.get(config, {}).get("rheostat.toml")
            if text is None:
                continue
            drain = tomllib.loads(text)["server"]["drain_seconds"]
            pause = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
            if spec["terminationGracePeriodSeconds"] < drain + pause + 5:
                yield f"{source}: {deployment['metadata']['name']} is killed before {drain} s of draining are over"


def endpoint_picker_is_wired():
    """Every plugin that is referred to is defined, and every one that is defined is used."""
    items = built("gateway")
    (text,) = [i["data"]["endpoint-picker-config.yaml"] for i in of_kind(items, "ConfigMap") if
               "endpoint-picker-config.yaml" in i["data"]]
    (config,) = documents(text)
    schema = load("checks/custom-resources.yaml")["llm-d.ai/v1alpha1/EndpointPickerConfig"]
    yield from (error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(config))
    defined = {plugin.get("name", plugin["type"]) for plugin in config["plugins"]}
    used = {"single-profile-handler"}
    for profile in config["schedulingProfiles"]:
        used |= {plugin["pluginRef"] for plugin in profile["plugins"]}
    for source in config["dataLayer"]["sources"]:
        used |= {source["pluginRef"]} | {extractor["pluginRef"] for extractor in source["extractors"]}
    if defined != used:
        yield f"plugins defined and used differ: {sorted(defined ^ used)}"
    # Affinity by profile needs pods that carry the label that the scorer compares.
    (scorer,) = [p["parameters"] for p in config["plugins"] if p["type"] == "header-label-affinity-scorer"]
    (pool,) = of_kind(items, "InferencePool")
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in of_kind(items, "Deployment")]
    pods = [label for label in labels if selector_of(pool).items() <= label.items()]
    profiles = sorted(label.get(scorer["labelKey"], "") for label in pods)
    if profiles != ["dense", "eco"]:
        yield f"the pool's pods have the profiles {profiles}"
