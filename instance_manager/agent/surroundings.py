"""What is around an instance, as its configuration says: one machine, or Kubernetes. Only what is used is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from instance_manager.agent.publishing import Unpublished
from instance_manager.config import Configuration
from instance_manager.config_sections import KubernetesCoordinationSection
from instance_manager.ports import Coordination, Publication


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    coordination: Coordination
    publication: Publication = field(default_factory=Unpublished)
    address: Callable[[str], str | None] = lambda _: None
    """Where a member is now; None: by its configured host."""


def surroundings_of(configuration: Configuration) -> Surroundings:
    """Nothing is connected yet. To be used, and `coordination` closed, in one event loop."""
    section = configuration.coordination
    if section.kubernetes is not None:
        return _kubernetes(configuration, section.kubernetes)
    assert section.local is not None  # noqa: S101 - one of both is there: the configuration was checked
    from instance_manager.coordination.local import LocalCoordination

    return Surroundings(coordination=LocalCoordination(section.local.directory, section.local.locks_directory))


def _kubernetes(configuration: Configuration, section: KubernetesCoordinationSection) -> Surroundings:
    from instance_manager.coordination.kubernetes import KubernetesCoordination
    from instance_manager.coordination.kubernetes_access import KubeconfigAccess, ServiceAccountAccess
    from instance_manager.coordination.kubernetes_api import ApiServer
    from instance_manager.coordination.kubernetes_pods import Pods
    from instance_manager.coordination.kubernetes_publication import KubernetesPublication

    access = (
        KubeconfigAccess(section.kubeconfig) if section.kubeconfig is not None else ServiceAccountAccess(os.environ)
    )
    api = ApiServer(access)
    pod_name, pod_uid = configuration.instance.name, os.environ.get("POD_UID", "")
    pods = Pods(api, namespace=section.namespace, cluster=configuration.cluster.name)
    return Surroundings(
        coordination=KubernetesCoordination(
            api, namespace=section.namespace, lease=section.lease, pod_name=pod_name, pod_uid=pod_uid
        ),
        publication=KubernetesPublication(
            api,
            pods,
            pod_name=pod_name,
            pod_uid=pod_uid,
            shutdown_timeout_s=configuration.instance.shutdown_timeout_s,
        ),
        address=pods.address,
    )
