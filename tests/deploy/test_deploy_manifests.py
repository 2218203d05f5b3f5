"""What is shipped fits together: names, labels, ports, probes, permissions and the configuration."""

from __future__ import annotations

from pathlib import Path

from deploy_manifests import Manifests, size_bytes

from instance_manager import __version__, kubernetes_names
from instance_manager.http import probes
from instance_manager.kubernetes_names import CLUSTER_LABEL, ROLE_LABEL
from instance_manager.postgres.configuration import check_parameters
from instance_manager.status import Probes
from instance_manager.supervisor.__main__ import KUBERNETES_TERMINATION_LOG

LONGEST_CLONE_S = 5 * 24 * 3600
"""20 TB at 50 MB/s."""


def test_every_object_carries_the_labels_and_lies_in_one_namespace(manifests: Manifests) -> None:
    expected = {
        "app.kubernetes.io/name": "instance-manager",
        "app.kubernetes.io/instance": manifests.name,
        CLUSTER_LABEL: manifests.name,
    }
    own = [each for each in manifests.objects if each["kind"] != "Namespace"]
    claims = manifests.stateful_set["spec"]["volumeClaimTemplates"]
    for each in [*own, *claims]:
        assert each["metadata"]["labels"] == expected, each["metadata"]["name"]
    assert manifests.pod_labels == expected
    assert len({each["metadata"].get("namespace") for each in own}) == 1


def test_every_selector_finds_the_pods(manifests: Manifests) -> None:
    plain = [
        manifests.stateful_set["spec"]["selector"]["matchLabels"],
        manifests.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        manifests.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in manifests.pod["topologySpreadConstraints"]),
    ]
    anti_affinity = manifests.pod["affinity"]["podAntiAffinity"]
    terms = anti_affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or [
        each["podAffinityTerm"] for each in anti_affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    ]
    plain += [term["labelSelector"]["matchLabels"] for term in terms]
    for selector in plain:
        assert selector == {CLUSTER_LABEL: manifests.name}
        assert selector.items() <= manifests.pod_labels.items()


def test_services_lead_to_the_roles_that_the_instances_set(manifests: Manifests) -> None:
    name = manifests.name
    selectors = {each["metadata"]["name"]: each["spec"]["selector"] for each in manifests.of_kind("Service")}
    cluster = {CLUSTER_LABEL: name}
    assert selectors == {
        name: cluster,
        f"{name}-rw": {**cluster, ROLE_LABEL: "primary"},
        f"{name}-ro": {**cluster, ROLE_LABEL: "replica"},
        f"{name}-r": cluster,
    }
    assert ROLE_LABEL not in manifests.pod_labels, "a pod has no role before it says so itself"


def test_the_headless_service_names_every_pod_also_one_that_is_not_ready(manifests: Manifests) -> None:
    headless = manifests.one("Service", manifests.name)["spec"]
    assert headless["clusterIP"] == "None"
    assert headless["publishNotReadyAddresses"] is True
    assert manifests.stateful_set["spec"]["serviceName"] == manifests.name
    for service in manifests.of_kind("Service"):
        if service["metadata"]["name"] != manifests.name:
            assert "publishNotReadyAddresses" not in service["spec"]


def test_ports_are_those_that_the_instances_listen_on(manifests: Manifests, tmp_path: Path) -> None:
    ports = {each["name"]: each["containerPort"] for each in manifests.container["ports"]}
    control = manifests.configuration(tmp_path).control
    among_members = {
        "postgres": kubernetes_names.POSTGRES_PORT,
        "http": kubernetes_names.HTTP_PORT,
        "peers": kubernetes_names.PEER_PORT,
    }
    assert ports == among_members | ({"control": control.address[1]} if control is not None else {})
    for service in manifests.of_kind("Service"):
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    policy = manifests.one("NetworkPolicy")["spec"]
    for rule in policy["ingress"]:
        assert {each["port"] for each in rule["ports"]} <= ports.keys()
    to_own_pods = policy["egress"][0]
    assert {each["port"] for each in to_own_pods["ports"]} == set(among_members.values())


def test_applications_reach_postgres_only_and_only_with_a_label(manifests: Manifests, tmp_path: Path) -> None:
    reachable: dict[str, set[str]] = {}
    for rule in manifests.one("NetworkPolicy")["spec"]["ingress"]:
        assert rule["from"], "everybody"
        for peer in rule["from"]:
            (selector,) = peer.values()
            (label,) = selector["matchLabels"]
            reachable.setdefault(label, set()).update(port["port"] for port in rule["ports"])
    assert reachable == {
        CLUSTER_LABEL: {"postgres", "http", "peers"},
        "instance-manager.dev/client": {"postgres"},
        "instance-manager.dev/monitoring": {"http"},
        **({"instance-manager.dev/control": {"control"}} if manifests.configuration(tmp_path).control else {}),
    }


def test_the_role_grants_what_the_instances_ask_for_and_no_more(manifests: Manifests) -> None:
    name = manifests.name
    pods = tuple(f"{name}-{ordinal}" for ordinal in range(9))
    granted = {
        (verb, group, resource, tuple(rule.get("resourceNames", ())))
        for rule in manifests.one("Role")["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    lease = ("coordination.k8s.io", "leases")
    assert granted == {
        ("create", *lease, ()),
        *((verb, *lease, (name,)) for verb in ("get", "update", "watch")),
        *((verb, "", "pods", ()) for verb in ("get", "list", "watch")),
        ("patch", "", "pods", pods),
        ("create", "", "events", ()),
    }
    assert manifests.stateful_set["spec"]["replicas"] <= len(pods)
    assert not list(manifests.of_kind("ClusterRole"))


def test_the_role_is_bound_to_the_account_of_the_pods(manifests: Manifests) -> None:
    binding = manifests.one("RoleBinding")
    assert binding["roleRef"]["name"] == manifests.one("Role")["metadata"]["name"]
    account = manifests.one("ServiceAccount")["metadata"]
    (subject,) = binding["subjects"]
    assert (subject["kind"], subject["name"]) == ("ServiceAccount", account["name"])
    assert subject.get("namespace") == account.get("namespace")
    assert manifests.pod["serviceAccountName"] == account["name"]


def test_the_token_lies_where_the_agent_looks_and_is_bound_to_the_pod(manifests: Manifests) -> None:
    assert manifests.mounts["token"] == str(kubernetes_names.SERVICE_ACCOUNT)
    sources = manifests.volume("token")["projected"]["sources"]
    assert {"token", "ca.crt", "namespace"} == {
        source.get("serviceAccountToken", {}).get("path") or next(iter(source.values()))["items"][0]["path"]
        for source in sources
    }
    assert manifests.pod["automountServiceAccountToken"] is False
    assert manifests.one("ServiceAccount")["automountServiceAccountToken"] is False


def test_every_pod_can_read_the_configuration(manifests: Manifests, tmp_path: Path) -> None:
    replicas = manifests.stateful_set["spec"]["replicas"]
    for ordinal in range(replicas):
        configuration = manifests.configuration(tmp_path, ordinal)
        assert configuration.cluster.name == manifests.name
        assert configuration.instances == replicas == len(configuration.members)
        assert configuration.listen_host == "10.1.2.3"
        assert configuration.me.host.startswith(f"{manifests.name}-{ordinal}.{manifests.name}.somewhere.svc")
    assert check_parameters(configuration.postgres.parameters) == ()


def test_the_configuration_names_the_places_that_are_mounted(manifests: Manifests, tmp_path: Path) -> None:
    configuration = manifests.configuration(tmp_path)
    directory = Path(manifests.mounts["data"])
    # Not the volume's root, which belongs to root and may hold lost+found.
    assert configuration.instance.directory.parent == directory
    (key,) = manifests.one("ConfigMap")["data"]
    assert manifests.container["command"] == [
        "instance-manager",
        "run",
        "--config",
        f"{manifests.mounts['configuration']}/{key}",
    ]
    for name in configuration.secrets.files:
        assert getattr(configuration.secrets, name) == Path(manifests.mounts["secrets"]) / name


def test_a_change_of_the_configuration_reaches_running_pods(manifests: Manifests) -> None:
    """Its name has no hash, and it is mounted as a folder."""
    assert manifests.one("ConfigMap")["metadata"]["name"] == manifests.name
    assert manifests.volume("configuration")["configMap"] == {"name": manifests.name}
    assert all("subPath" not in mount for mount in manifests.container["volumeMounts"])


def test_the_manager_ends_by_itself_before_the_kubelet_kills(manifests: Manifests, tmp_path: Path) -> None:
    timeout_s = manifests.configuration(tmp_path).instance.shutdown_timeout_s
    assert manifests.pod["terminationGracePeriodSeconds"] >= timeout_s + 10


def test_the_instance_knows_its_pod(manifests: Manifests) -> None:
    found = {each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in manifests.container["env"]}
    assert found == {
        "POD_NAME": "metadata.name",
        "POD_UID": "metadata.uid",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_IP": "status.podIP",
        "NODE_NAME": "spec.nodeName",
    }
    assert manifests.container["name"] == kubernetes_names.CONTAINER


def test_its_death_can_be_proven(manifests: Manifests) -> None:
    assert manifests.container["terminationMessagePath"] == KUBERNETES_TERMINATION_LOG
    assert manifests.container["terminationMessagePolicy"] == "File"
    assert manifests.pod["shareProcessNamespace"] is False


def test_probes_ask_what_there_is_and_each_its_own(manifests: Manifests) -> None:
    container = manifests.container
    paths = {kind: container[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/startupz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert set(paths.values()) <= probes.ROUTES.keys()
    for kind in paths:
        assert container[kind]["httpGet"]["port"] == "http"


def test_no_probe_kills_a_clone_a_recovery_or_a_fenced_instance(manifests: Manifests) -> None:
    startup, liveness = manifests.container["startupProbe"], manifests.container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= LONGEST_CLONE_S
    # The supervisor replaces a silent agent within 3 s, and waits 8 s at most before it starts the next.
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30
    snapshot = Probes(
        taken_s=0.0,
        role="fenced",
        alive=True,
        started=False,
        ready=False,
        accepts_writes=False,
        accepts_reads=False,
        lag_bytes=None,
        replay_lag_bytes=None,
        timeline=None,
    )
    assert probes.ROUTES[liveness["httpGet"]["path"]](snapshot, {}, 0.0).ok


def test_readiness_follows_a_failover_within_a_few_seconds(manifests: Manifests) -> None:
    readiness = manifests.container["readinessProbe"]
    assert readiness["periodSeconds"] == manifests.container["startupProbe"]["periodSeconds"] == 1
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= 5


def test_volumes_outlive_pods_and_pods_start_together(manifests: Manifests) -> None:
    spec = manifests.stateful_set["spec"]
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["updateStrategy"] == {"type": "OnDelete"}
    assert [each["metadata"]["name"] for each in spec["volumeClaimTemplates"]] == ["data"]
    assert manifests.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_memory_is_enough_for_what_postgres_is_told_to_take(manifests: Manifests, tmp_path: Path) -> None:
    resources = manifests.container["resources"]
    limit = size_bytes(resources["limits"]["memory"])
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert "cpu" not in resources["limits"]
    buffers = size_bytes(str(manifests.configuration(tmp_path).postgres.parameters["shared_buffers"]))
    assert 128 * 1024 * 1024 + 2 * buffers <= limit
    shared = size_bytes(manifests.volume("shm")["emptyDir"]["sizeLimit"])
    assert buffers + shared < limit


def test_the_image_is_of_this_version(manifests: Manifests) -> None:
    repository, _, tag = manifests.container["image"].rpartition(":")
    assert repository.endswith("/instance-manager")
    assert tag.startswith(f"{__version__}-pg")
