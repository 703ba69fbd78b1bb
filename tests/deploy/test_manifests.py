"""Every Kubernetes scenario: valid by Kubernetes' own schemas, and consistent with the code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import kubernetes_validate
import pytest
import yaml

from guard_middleware import settings as middleware
from guard_middleware.sidecar import Places
from guard_service import __version__, config, server
from guard_service.config import Settings
from guard_service.interceptors import SERVICE
from guard_service.metrics import Metrics, Probes, application
from tests.deploy.manifests import (
    BACKENDS,
    GATEWAYS,
    GUARDS,
    KUBERNETES,
    ROOT,
    SCENARIOS,
    Object,
    containers,
    environment,
    named,
    of_kind,
    pod_templates,
    rendered,
    selects,
)

OLDEST = "1.30"  # the first with all that is used switched on
CUSTOM = {  # see test_custom_resources
    *("ServiceMonitor", "PrometheusRule", "Gateway", "GRPCRoute", "HTTPRoute"),
    "EnvoyExtensionPolicy",
}
ENCRYPTED = ("mtls-guard", "auth-guard")
OURS = ("guard-service", "guard-sidecar", "guard-vision")


def pods(scenario: str) -> list[Object]:
    return [template["spec"] for template in pod_templates(scenario)]


def guard_pod(scenario: str) -> Object:
    spec: Object = named(scenario, "Deployment", "guard")["spec"]["template"]["spec"]
    return spec


def guard(scenario: str) -> Object:
    (container,) = guard_pod(scenario)["containers"]
    assert isinstance(container, dict)
    return container


def backend_pod(scenario: str) -> Object:
    spec: Object = named(scenario, "Deployment", "backend")["spec"]["template"]["spec"]
    return spec


def sidecar(scenario: str) -> Object:
    (container,) = backend_pod(scenario)["initContainers"]
    assert isinstance(container, dict)
    return container


def flags(container: Object) -> dict[str, str]:
    """--like-this=that to like_this: that."""
    pairs = (argument.removeprefix("--").partition("=") for argument in container.get("args", ()))
    return {name.replace("-", "_"): value for name, _, value in pairs}


def probes(container: Object) -> Iterator[Object]:
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        if kind in container:
            yield container[kind]


def test_every_scenario_is_tested_and_told_of() -> None:
    folders = [*KUBERNETES.glob("scenarios/*"), *KUBERNETES.glob("models/llama-*")]
    assert {str(folder.relative_to(KUBERNETES)) for folder in folders} == set(SCENARIOS)
    readme = (ROOT / "deploy" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*GUARDS, *BACKENDS, *GATEWAYS))


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_object_is_valid_and_has_no_unknown_field(scenario: str, version: str) -> None:
    checked = [one for one in rendered(scenario) if one["kind"] not in CUSTOM]
    assert checked
    for one in checked:
        kubernetes_validate.validate(one, version, strict=True)


def test_the_schemas_find_what_is_wrong() -> None:
    deployment = yaml.safe_load(yaml.safe_dump(named("scenarios/starter", "Deployment", "guard")))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(deployment, OLDEST, strict=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_names_are_unique_and_everything_is_in_one_namespace(scenario: str) -> None:
    keys = [(one["kind"], one["metadata"]["name"]) for one in rendered(scenario)]
    assert len(keys) == len(set(keys))
    (namespace,) = (one["metadata"]["name"] for one in of_kind(scenario, "Namespace"))
    for one in rendered(scenario):
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == namespace


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pods_meet_the_restricted_standard_that_their_namespace_enforces(scenario: str) -> None:
    (namespace,) = of_kind(scenario, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(scenario):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        allowed = {"name", "emptyDir", "persistentVolumeClaim", "secret"}
        assert all(set(volume) <= allowed for volume in pod.get("volumes", ()))
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in port for port in container.get("ports", ()))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_our_containers_have_a_read_only_root_and_bounds(scenario: str) -> None:
    for pod in pods(scenario):
        for container in containers(pod):
            assert "memory" in container["resources"]["limits"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            if container["image"].startswith(OURS):
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
            names = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= names


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_images_are_pinned_and_ours_are_of_this_version(scenario: str) -> None:
    for pod in pods(scenario):
        for container in containers(pod):
            name, _, tag = container["image"].rpartition(":")
            assert name and tag not in ("", "latest"), container["image"]
            if name in OURS:
                assert tag == __version__
            else:
                assert "/" in name, "a registry is named"


@pytest.mark.parametrize("scenario", GUARDS)
def test_the_guards_environment_is_settings_that_it_takes(scenario: str) -> None:
    given = environment(guard(f"scenarios/{scenario}"))
    cores = guard(f"scenarios/{scenario}")["resources"]["limits"]["cpu"]
    assert given["GUARD_THREADS"] is None and cores.isdecimal()
    problems: tuple[str, ...] = ()
    try:
        loaded = config.load({}, {**given, "GUARD_THREADS": cores})
        assert not loaded.settings.host.startswith("127.")
    except config.ConfigError as error:
        problems = error.problems
    assert all("is not a file" in problem for problem in problems), problems  # the certificates
    assert bool(problems) is (scenario in ENCRYPTED)
    assert ("GUARD_AUTH" in given) is (scenario == "auth-guard")


@pytest.mark.parametrize("scenario", BACKENDS)
def test_the_sidecars_flags_and_environment_are_settings_that_it_takes(scenario: str) -> None:
    container = sidecar(f"scenarios/{scenario}")
    places = {one.name for one in fields(Places)}
    given = flags(container)
    assert given.keys() <= places | middleware.FIELDS.keys() | {"log_level"}
    assert given.keys() >= {"upstream", "listen", "admin", "drain_s"}
    found = middleware.from_environment(environment(container))
    assert found.guard.endswith(f"guard-pods.llama-guard.svc.cluster.local:{Settings().port}")
    assert found.guard_tls == ("on" if scenario == "mtls-vllm" else "off")


@pytest.mark.parametrize("scenario", GUARDS)
def test_the_guards_probes_ask_what_it_answers(scenario: str) -> None:
    container = guard(f"scenarios/{scenario}")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": Settings().port, "metrics": Settings().metrics_port}
    assert len(list(probes(container))) == 3
    for probe in probes(container):
        if "grpc" in probe:
            assert probe["grpc"] == {"port": ports["grpc"]}  # the empty service name
            assert scenario not in ENCRYPTED, "kubelet's gRPC probe speaks no TLS"
        else:
            assert probe["httpGet"]["port"] == "metrics"
            assert http_status(probe["httpGet"]["path"]) == "200 OK"


def http_status(path: str) -> str:
    said: list[str] = []
    app = application(Metrics(), Probes(live=lambda: True, ready=lambda: True))

    def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
        said.append(status)

    list(app({"PATH_INFO": path}, start))
    return said[0]


@pytest.mark.parametrize("scenario", BACKENDS)
def test_the_sidecar_is_native_and_its_ports_are_those_of_its_flags(scenario: str) -> None:
    container = sidecar(f"scenarios/{scenario}")
    assert container["restartPolicy"] == "Always"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    given = flags(container)
    assert given["listen"] == f"0.0.0.0:{ports['http']}"
    assert given["admin"] == f"0.0.0.0:{ports['metrics']}"
    assert len(list(probes(container))) == 3
    for probe in probes(container):
        assert probe["httpGet"]["port"] == "metrics"
    assert container["startupProbe"]["httpGet"]["path"] == "/livez", "else it waits for itself"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize("scenario", BACKENDS)
def test_the_backend_listens_on_loopback_where_the_sidecar_looks_for_it(scenario: str) -> None:
    (container,) = backend_pod(f"scenarios/{scenario}")["containers"]
    upstream = flags(sidecar(f"scenarios/{scenario}"))["upstream"].removeprefix("http://")
    given = flags(container)
    host = given.get("host") or given.get("hostname")
    listens = f"{host}:{given['port']}" if host else environment(container)["OLLAMA_HOST"]
    assert listens == upstream == "127.0.0.1:8000"
    assert "ports" not in container


@pytest.mark.parametrize("scenario", GUARDS)
def test_a_guard_has_time_to_drain(scenario: str) -> None:
    pod = guard_pod(f"scenarios/{scenario}")
    needed = (
        guard(f"scenarios/{scenario}")["lifecycle"]["preStop"]["sleep"]["seconds"]
        + Settings().drain_timeout_s
        + server.LAME_DUCK_S
        + server.FLUSH_S
        + server.JOIN_S
    )
    assert "GUARD_DRAIN_TIMEOUT_S" not in environment(guard(f"scenarios/{scenario}"))
    assert pod["terminationGracePeriodSeconds"] > needed


@pytest.mark.parametrize("scenario", BACKENDS)
def test_a_backend_and_then_its_sidecar_have_time_to_drain(scenario: str) -> None:
    pod = backend_pod(f"scenarios/{scenario}")
    (container,) = pod["containers"]
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = float(flags(sidecar(f"scenarios/{scenario}"))["drain_s"])
    assert drain_s == Places("http://x").drain_s
    assert pod["terminationGracePeriodSeconds"] > waits + drain_s


@pytest.mark.parametrize("scenario", (*GUARDS, *BACKENDS, *GATEWAYS))
def test_whatever_selects_pods_selects_the_pods_of_its_scenario(scenario: str) -> None:
    scenario = f"scenarios/{scenario}"
    (template,) = pod_templates(scenario)
    labels = template["metadata"]["labels"]
    ports = {
        port["name"] for c in containers(template["spec"]) for port in c.get("ports", ())
    }  # fmt: skip
    for service in of_kind(scenario, "Service"):
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for kind in ("Deployment", "PodDisruptionBudget"):
        (one,) = of_kind(scenario, kind)
        assert selects(one["spec"]["selector"], labels)
    for spread in template["spec"].get("topologySpreadConstraints", ()):
        assert selects(spread["labelSelector"], labels)
    for monitor in of_kind(scenario, "ServiceMonitor"):
        found = [
            service
            for service in of_kind(scenario, "Service")
            if selects(monitor["spec"]["selector"], service["metadata"].get("labels", {}))
        ]
        assert len(found) == 1, "each pod is scraped once"
        assert {e["port"] for e in monitor["spec"]["endpoints"]} <= {
            port["name"] for port in found[0]["spec"]["ports"]
        }


@pytest.mark.parametrize("scenario", ["cpu", "gpu"])
def test_the_autoscaler_scales_the_guard_on_a_metric_that_the_adapter_makes(scenario: str) -> None:
    (scaler,) = of_kind(f"scenarios/{scenario}", "HorizontalPodAutoscaler")
    (deployment,) = of_kind(f"scenarios/{scenario}", "Deployment")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "else each apply undoes the scaling"
    (metric,) = scaler["spec"]["metrics"]
    rules = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yaml").read_text())["rules"]
    assert metric["pods"]["metric"]["name"] in {rule["name"]["as"] for rule in rules}


@pytest.mark.parametrize("scenario", ["cpu", "gpu"])
def test_the_model_is_where_a_job_puts_it(scenario: str) -> None:
    job = {"cpu": "models/llama-guard-3-1b", "gpu": "models/llama-guard-3-11b-vision"}[scenario]
    wanted = environment(guard(f"scenarios/{scenario}"))["GUARD_MODEL"]
    (pod,) = pods(job)
    said = " ".join(
        word for c in pod["containers"] for word in (*c.get("command", ()), *c.get("args", ()))
    )
    assert said.endswith(wanted)
    (claim,) = of_kind(job, "PersistentVolumeClaim")
    claims = [
        v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] == "models"
    ]
    served = [v for v in guard_pod(f"scenarios/{scenario}")["volumes"] if v["name"] == "models"]
    assert served[0]["persistentVolumeClaim"]["claimName"] == claims[0]
    assert claims == [claim["metadata"]["name"]]


def test_the_route_leads_to_the_guards_service_and_names_what_it_serves() -> None:
    (route,) = of_kind("scenarios/cpu", "GRPCRoute")
    (rule,) = route["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    ports = named("scenarios/cpu", "Service", backend["name"])["spec"]["ports"]
    (port,) = (port for port in ports if port["port"] == backend["port"])
    assert port["appProtocol"] == "kubernetes.io/h2c"
    names = [match["method"]["service"] for match in rule["matches"]]
    assert names == [SERVICE, "grpc.health.v1.Health"]


def test_a_guard_with_tls_is_not_announced_as_one_without() -> None:
    plain, encrypted = (
        named(f"scenarios/{scenario}", "Service", "guard")["spec"]["ports"][0]
        for scenario in ("starter", "mtls-guard")
    )
    assert plain["appProtocol"] == "kubernetes.io/h2c"
    assert encrypted["port"] == plain["port"] and "appProtocol" not in encrypted


def test_clients_are_told_of_a_service_that_resolves_to_pods() -> None:
    assert named("scenarios/starter", "Service", "guard-pods")["spec"]["clusterIP"] == "None"


def test_a_guard_with_tenants_mounts_the_file_that_it_is_told_of() -> None:
    scenario = "scenarios/auth-guard"
    file = environment(guard(scenario))["GUARD_AUTH"]
    (mount,) = (one for one in guard(scenario)["volumeMounts"] if one["name"] == "auth")
    (volume,) = (one for one in guard_pod(scenario)["volumes"] if one["name"] == "auth")
    assert file == f"{mount['mountPath']}/auth.yaml" and mount["readOnly"]
    assert volume["secret"]["secretName"] == "guard-auth"
