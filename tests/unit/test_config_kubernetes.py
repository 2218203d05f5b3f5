"""The configuration of a pod: what the environment fills in, who the members are, and the mend of each mix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_config import GOOD

from instance_manager import kubernetes_names, launch
from instance_manager.config import Configuration, ConfigurationError, load_configuration

POD: dict[str, Any] = {
    "cluster": {"name": "pg", "instances": 3},
    "coordination": {"kubernetes": {}},
    "instance": {"directory": "/var/lib/postgresql/instance", "run_as": "nobody"},
    "secrets": GOOD["secrets"],
}
ENVIRONMENT = {"POD_NAME": "pg-1", "POD_UID": "u", "POD_NAMESPACE": "orders", "POD_IP": "10.0.0.7"}


def loaded(directory: Path, content: object, **environment: str) -> Configuration:
    path = directory / "instance-manager.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_configuration(path, {**ENVIRONMENT, **environment})


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    content = copy.deepcopy(POD)
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return content


def test_a_pod_is_named_and_addressed_by_its_environment(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, POD)
    assert configuration.name == "pg-1"
    assert configuration.listen_host == "10.0.0.7"
    assert [member.name for member in configuration.members] == ["pg-0", "pg-1", "pg-2"]
    assert [peer.host for peer in configuration.peers] == ["pg-0.pg.orders.svc", "pg-2.pg.orders.svc"]
    assert {(member.postgres_port, member.http_port) for member in configuration.members} == {(5432, 8008)}
    assert configuration.wanted_synchronous_standbys == 1
    assert configuration.cluster.uid == ""
    kubernetes = configuration.coordination.kubernetes
    assert kubernetes is not None
    assert (kubernetes.namespace, kubernetes.lease) == ("orders", "pg")
    assert configuration.lock_file == Path("/var/lib/postgresql/instance/supervisor.lock")


def test_what_is_given_comes_before_the_environment(tmp_path: Path) -> None:
    content = changed(
        cluster={"uid": "0123456789abcdef"},
        coordination={"kubernetes": {"namespace": "elsewhere", "lease": "other"}},
        instance={"listen_host": "10.0.0.8"},
    )
    configuration = loaded(tmp_path, content)
    kubernetes = configuration.coordination.kubernetes
    assert kubernetes is not None
    assert (kubernetes.namespace, kubernetes.lease) == ("elsewhere", "other")
    assert (configuration.cluster.uid, configuration.listen_host) == ("0123456789abcdef", "10.0.0.8")
    assert configuration.me.host == "pg-1.pg.elsewhere.svc"


def test_the_namespace_is_that_of_the_service_account_or_of_the_kubeconfig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_names, "SERVICE_ACCOUNT", tmp_path)
    with pytest.raises(ConfigurationError, match="namespace: is not known; set it, or"):
        loaded(tmp_path, POD, POD_NAMESPACE="")
    (tmp_path / "namespace").write_text("of-the-account\n")
    kubernetes = loaded(tmp_path, POD, POD_NAMESPACE="").coordination.kubernetes
    assert kubernetes is not None
    assert kubernetes.namespace == "of-the-account"
    contexts = [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "of-the-context"}}]
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump({"current-context": "here", "contexts": contexts}))
    content = changed(coordination={"kubernetes": {"kubeconfig": str(tmp_path / "kubeconfig")}})
    kubernetes = loaded(tmp_path, content, POD_NAMESPACE="").coordination.kubernetes
    assert kubernetes is not None
    assert kubernetes.namespace == "of-the-context"


@pytest.mark.parametrize(
    ("content", "environment", "told"),
    [
        (changed(coordination={"kubernetes": None}), {}, "exactly one of `local` and `kubernetes`"),
        (changed(coordination=GOOD["coordination"]), {}, "exactly one of `local` and `kubernetes`"),
        ({**POD, "members": GOOD["members"]}, {}, r"members: is for `coordination\.local`"),
        (changed(instance={"name": "pg-1"}), {}, "instance.name: is for"),
        (changed(cluster={"instances": None}), {}, "cluster.instances: is missing"),
        (changed(cluster={"instances": 0}), {}, ">= 1"),
        (changed(cluster={"instances": 100}), {}, "<= 99"),
        (changed(cluster={"name": "Orders"}), {}, "'Orders' cannot name the pods"),
        (changed(cluster={"name": "p" * 51}), {}, "50 at most"),
        (changed(cluster={"synchronous_standbys": 3}), {}, "needs at least 4 members, there are 3"),
        (POD, {"POD_NAME": ""}, r"\$POD_NAME: '' is no pod of the StatefulSet pg"),
        (POD, {"POD_NAME": "orders-1"}, "'orders-1' is no pod of the StatefulSet pg"),
        (POD, {"POD_NAME": "pg-01"}, "'pg-01' is no pod"),
        (changed(instance={"shutdown_timeout_s": 1}), {}, "shutdown_timeout_s"),
        (changed(coordination={"kubernetes": {"leese": "x"}}), {}, "unknown field `leese`"),
    ],
)
def test_each_mistake_is_told_with_the_mend(
    tmp_path: Path, content: dict[str, Any], environment: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        loaded(tmp_path, content, **environment)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("uid", "cluster.uid: is missing; make one"),
        ("name", "instance.name: is missing"),
        ("members", "members: is missing"),
    ],
)
def test_on_one_machine_nothing_is_filled_in(tmp_path: Path, place: str, told: str) -> None:
    content = copy.deepcopy(GOOD)
    del {"uid": content["cluster"], "name": content["instance"], "members": content}[place][place]
    with pytest.raises(ConfigurationError, match=told):
        loaded(tmp_path, content)
    content = copy.deepcopy(GOOD)
    content["cluster"]["instances"] = 3
    with pytest.raises(ConfigurationError, match="here `members` counts"):
        loaded(tmp_path, content)


def test_a_pod_beyond_instances_knows_itself_and_that_it_is_no_member(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, POD, POD_NAME="pg-4")
    assert [member.name for member in configuration.members] == ["pg-0", "pg-1", "pg-2", "pg-4"]
    assert not configuration.is_member
    assert (configuration.instances, configuration.wanted_synchronous_standbys) == (3, 1)
    assert loaded(tmp_path, changed(cluster={"instances": 5}), POD_NAME="pg-4").is_member


def test_whoever_the_record_may_name_is_reached_and_nobody_else(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, changed(cluster={"instances": 1}), POD_NAME="pg-0")
    beyond = configuration.member("pg-2")
    assert beyond is not None
    assert beyond.host == "pg-2.pg.orders.svc"
    assert not configuration.is_configured("pg-2")
    assert configuration.member("orders-2") is None
    assert configuration.wanted_synchronous_standbys == 0


def test_scaling_changes_no_setting_that_needs_a_restart_of_postgres(tmp_path: Path) -> None:
    rooms = {
        loaded(tmp_path, changed(cluster={"instances": n}), POD_NAME="pg-0").room_for_instances for n in (1, 3, 5, 9)
    }
    assert rooms == {9}


def test_the_supervisor_is_started_with_the_lock_on_the_volume_and_the_pods_patience(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, changed(instance={"directory": str(tmp_path / "i"), "shutdown_timeout_s": 55}))
    launch.prepare_directories(configuration)
    argv = launch.supervisor_argv(configuration, tmp_path / "instance-manager.yaml")
    assert argv[argv.index("--lock-file") + 1] == str(tmp_path / "i" / "supervisor.lock")
    assert argv[argv.index("--shutdown-timeout-s") + 1] == "55"
    assert argv[argv.index("--name") + 1] == "pg-1"
    assert (tmp_path / "i" / "state").is_dir()
