"""The control plane of these tests is a real one, with authentication, authorization and admission on."""

from __future__ import annotations

import pytest
from control_plane import ControlPlane, audited
from kube_api import ApiError, Identity, Object
from kube_processes import wait_for
from simple_pods import simple_pod


def allow(control_plane: ControlPlane, namespace: str, account: str, rules: list[Object]) -> None:
    """A Role with these rules, bound to the service account."""
    base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    control_plane.admin.create(f"{base}/roles", {"metadata": {"name": account}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account}
    binding = {"metadata": {"name": account}, "roleRef": role, "subjects": [subject]}
    control_plane.admin.create(f"{base}/rolebindings", binding)


def test_nobody_reads_without_a_token(control_plane: ControlPlane, namespace: str) -> None:
    with pytest.raises(ApiError) as refused:
        control_plane.api_as(Identity()).get(f"/api/v1/namespaces/{namespace}/pods")
    assert refused.value.code in (401, 403)


def test_a_token_does_what_its_role_allows_and_no_more(control_plane: ControlPlane, namespace: str) -> None:
    allow(control_plane, namespace, "default", [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}])
    api = control_plane.api_as(Identity(token=control_plane.token(namespace, "default")))
    pods = f"/api/v1/namespaces/{namespace}/pods"

    assert wait_for(lambda: api.get(pods), 5, "the role binding in force")["items"] == []
    with pytest.raises(ApiError) as refused:
        api.create(pods, simple_pod("pod"))
    assert refused.value.code == 403
    with pytest.raises(ApiError) as elsewhere:
        api.get("/api/v1/namespaces/default/pods")
    assert elsewhere.value.code == 403

    user = f"system:serviceaccount:{namespace}:default"
    decisions = {(found.verb, found.namespace, found.decision) for found in audited(control_plane.audit_log, user=user)}
    assert decisions == {("list", namespace, "allow"), ("create", namespace, "forbid"), ("list", "default", "forbid")}


def test_a_token_bound_to_a_pod_ends_with_it(control_plane: ControlPlane, namespace: str) -> None:
    pods = f"/api/v1/namespaces/{namespace}/pods"
    allow(control_plane, namespace, "default", [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}])
    body = simple_pod("pod")
    body["spec"]["nodeName"] = "a-node-without-a-kubelet"
    pod = control_plane.admin.create(pods, body)
    api = control_plane.api_as(Identity(token=control_plane.token(namespace, "default", pod=pod)))
    assert [found["metadata"]["name"] for found in api.list(pods)] == ["pod"]

    control_plane.admin.delete(f"{pods}/pod", grace_s=0)

    def code() -> int | None:
        try:
            api.list(pods)
        except ApiError as error:
            return error.code
        return None

    assert wait_for(code, 30, "the token refused") == 401


def test_the_restricted_policy_refuses_a_privileged_pod(control_plane: ControlPlane, namespace: str) -> None:
    pods = f"/api/v1/namespaces/{namespace}/pods"
    control_plane.admin.create(pods, simple_pod("admitted"), dryRun="All")
    with pytest.raises(ApiError) as refused:
        control_plane.admin.create(pods, simple_pod("privileged", securityContext={"privileged": True}), dryRun="All")
    assert refused.value.code == 403
    assert 'violates PodSecurity "restricted' in refused.value.message


def test_a_lease_is_written_on_one_version_only(control_plane: ControlPlane, namespace: str) -> None:
    leases = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
    api = control_plane.admin
    first = api.create(leases, {"metadata": {"name": "pg"}, "spec": {"holderIdentity": "pg-0"}})
    first["spec"]["holderIdentity"] = "pg-1"
    api.replace(f"{leases}/pg", first)
    with pytest.raises(ApiError) as refused:
        api.replace(f"{leases}/pg", first)
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")


def test_its_metrics_count_requests(control_plane: ControlPlane, namespace: str) -> None:
    text = control_plane.admin.text("/metrics")
    assert any(
        line.startswith("apiserver_request_total{") and 'resource="namespaces"' in line for line in text.splitlines()
    )


def test_it_comes_back_with_all_that_it_had(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.stop_apiserver()
    with pytest.raises(OSError, match="refused"):
        control_plane.admin.get("/api/v1/namespaces")
    control_plane.start_apiserver()
    assert control_plane.admin.find(f"/api/v1/namespaces/{namespace}") is not None
