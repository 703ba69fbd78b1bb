"""Who reaches whom when the network policies hold: their rules evaluated, pod by pod."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.deploy.manifests import BACKENDS, GUARDS, Object, of_kind, pod_templates, selects


@dataclass(frozen=True)
class Pod:
    namespace: str
    labels: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)


STRANGER = Pod("shop")
MONITORING = Pod("monitoring")
GATEWAY = Pod("envoy-gateway-system")
CLIENT = Pod("shop", {"llama-guard/client": "true"})
HUB_LIKE = Pod("internet")  # a pod that no policy names
OTHER_PORTS = (22, 80, 8000, 11434)


def reaches(policies: list[Object], source: Pod, target: Pod, port: int) -> bool:
    """Whether the source's egress and the target's ingress both let it."""
    into = [p for p in policies if _holds_for(p, target, "Ingress")]
    out = [p for p in policies if _holds_for(p, source, "Egress")]
    return _let(into, "ingress", "from", source, target, port) and _let(
        out, "egress", "to", target, target, port
    )


def _holds_for(policy: Object, pod: Pod, way: str) -> bool:
    return (
        policy["metadata"]["namespace"] == pod.namespace
        and way in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], pod.labels)
    )


def _let(policies: list[Object], rules: str, peers: str, peer: Pod, target: Pod, port: int) -> bool:
    """A pod that no policy selects is open; else some rule must name both peer and port."""
    return not policies or any(
        any(_is(one, peer, policy) for one in rule[peers])
        and any(_port(one, target) == port for one in rule["ports"])
        for policy in policies
        for rule in policy["spec"].get(rules, ())
    )


def _is(described: Object, pod: Pod, policy: Object) -> bool:
    if "ipBlock" in described:
        return False  # of pods' addresses, which the policies except
    home = {"kubernetes.io/metadata.name": pod.namespace}
    if "namespaceSelector" in described:
        there = selects(described["namespaceSelector"], home)
    else:
        there = pod.namespace == policy["metadata"]["namespace"]
    return there and selects(described.get("podSelector", {}), pod.labels)


def _port(described: Object, target: Pod) -> int | None:
    named = described["port"]
    return named if isinstance(named, int) else target.ports.get(named)


def pod(scenario: str, namespace: str) -> Pod:
    (template,) = pod_templates(scenario)
    ports = {
        port["name"]: port["containerPort"]
        for kind in ("initContainers", "containers")
        for container in template["spec"].get(kind, ())
        for port in container.get("ports", ())
    }
    return Pod(namespace, template["metadata"]["labels"], ports)


def policies(*scenarios: str) -> list[Object]:
    return [one for scenario in scenarios for one in of_kind(scenario, "NetworkPolicy")]


@pytest.mark.parametrize("scenario", BACKENDS)
def test_a_backend_is_reached_through_its_sidecar_alone(scenario: str) -> None:
    held = policies("scenarios/starter", f"scenarios/{scenario}")
    guard = pod("scenarios/starter", "llama-guard")
    backend = pod(f"scenarios/{scenario}", "llm")
    neighbour = Pod("llm")
    for source in (STRANGER, CLIENT, neighbour):
        assert reaches(held, source, backend, 8080) is (source is not neighbour)
        assert not reaches(held, source, backend, 9091)
    assert reaches(held, MONITORING, backend, 9091)
    for source in (STRANGER, CLIENT, neighbour, MONITORING, GATEWAY, guard, backend):
        assert not any(reaches(held, source, backend, port) for port in OTHER_PORTS)


@pytest.mark.parametrize("scenario", BACKENDS)
def test_a_backend_calls_the_guard_and_nobody_else(scenario: str) -> None:
    held = policies("scenarios/starter", f"scenarios/{scenario}")
    guard = pod("scenarios/starter", "llama-guard")
    backend = pod(f"scenarios/{scenario}", "llm")
    names = Pod("kube-system", {"k8s-app": "kube-dns"})
    assert reaches(held, backend, guard, 50051)
    assert reaches(held, backend, names, 53)
    for port in (*OTHER_PORTS, 443, 50051):
        assert not reaches(held, backend, HUB_LIKE, port)
    assert not reaches(held, backend, guard, 9090)


@pytest.mark.parametrize("scenario", GUARDS)
def test_a_guard_is_called_by_clients_and_scraped_by_monitoring_alone(scenario: str) -> None:
    held = policies(f"scenarios/{scenario}")
    guard = pod(f"scenarios/{scenario}", "llama-guard")
    assert reaches(held, CLIENT, guard, 50051)
    assert reaches(held, MONITORING, guard, 9090)
    assert reaches(held, GATEWAY, guard, 50051) is (scenario == "cpu")  # which has a gateway
    for source, port in ((STRANGER, 50051), (STRANGER, 9090), (CLIENT, 9090), (MONITORING, 50051)):
        assert not reaches(held, source, guard, port)


@pytest.mark.parametrize("scenario", GUARDS)
def test_a_guard_calls_nobody(scenario: str) -> None:
    held = policies(f"scenarios/{scenario}")
    guard = pod(f"scenarios/{scenario}", "llama-guard")
    for target in (
        STRANGER,
        CLIENT,
        MONITORING,
        HUB_LIKE,
        Pod("kube-system", {"k8s-app": "kube-dns"}),
    ):
        assert not any(reaches(held, guard, target, port) for port in (53, 443, *OTHER_PORTS))


@pytest.mark.parametrize("job", ["models/llama-guard-3-1b", "models/llama-guard-3-11b-vision"])
def test_a_pull_reaches_the_internet_and_no_pod(job: str) -> None:
    (policy,) = (p for p in policies(job) if p["metadata"]["name"] != "default-deny")
    (block,) = (
        peer["ipBlock"]
        for rule in policy["spec"]["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
    )
    assert {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= set(
        block["except"]
    )
    puller = pod(job, "llama-guard")
    guard = pod("scenarios/starter", "llama-guard")
    held = policies(job, "scenarios/starter")
    assert not reaches(held, puller, guard, 50051)
    assert not reaches(held, STRANGER, puller, 443)


def test_the_evaluation_itself_opens_pods_that_no_policy_selects() -> None:
    guard = pod("scenarios/starter", "llama-guard")
    assert reaches([], STRANGER, guard, 50051)
    deny = [p for p in policies("scenarios/starter") if p["metadata"]["name"] == "default-deny"]
    assert not reaches(deny, CLIENT, guard, 50051)
