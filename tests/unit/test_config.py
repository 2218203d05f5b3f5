"""The configuration: what is accepted, and that each mistake says where it is and what mends it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from instance_manager.config import Configuration, ConfigurationError, _decode_path, load_configuration

GOOD: dict[str, Any] = {
    "cluster": {"name": "demo", "uid": "0123456789abcdef"},
    "instance": {"name": "demo-1", "directory": "/var/tmp/i1", "run_as": "nobody"},
    "members": [
        {"name": f"demo-{number}", "host": "127.0.0.1", "postgres_port": 6000 + number, "http_port": 7000 + number}
        for number in (1, 2, 3)
    ],
    "coordination": {"local": {"directory": "/var/tmp/store", "locks_directory": "/var/tmp/locks"}},
    "secrets": {
        "peer_token": "/var/tmp/s/peer",
        "replication_password": "/var/tmp/s/replication",
        "application_password": "/var/tmp/s/application",
        "monitoring_password": "/var/tmp/s/monitoring",
    },
}


def with_value(place: str, value: object) -> dict[str, Any]:
    """A good configuration with one place changed; `members.0.host` reaches into lists."""
    content = copy.deepcopy(GOOD)
    at: Any = content
    *way, last = place.split(".")
    for key in way:
        at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
    at[int(last) if isinstance(at, list) else last] = value
    return content


def written(directory: Path, content: object) -> Path:
    path = directory / "demo-1.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_documented_file_has_only_keys_that_are_known() -> None:
    text = (Path(__file__).parents[2] / "docs/configuration.md").read_text(encoding="utf-8")
    examples = [yaml.safe_load(each.split("```")[0]) for each in text.split("```yaml\n")[1:]]
    whole = [each for each in examples if "members" in each]
    assert len(whole) == 1
    # What excludes each other is there together: only types and names are looked at.
    assert set(whole[0]) == {each.name for each in msgspec.structs.fields(Configuration)}
    msgspec.convert(whole[0], Configuration, dec_hook=_decode_path)


def test_a_minimal_file_gets_the_defaults_of_the_design(tmp_path: Path) -> None:
    configuration = load_configuration(written(tmp_path, GOOD))
    timings = configuration.timings
    assert (timings.lease_duration_s, timings.renew_interval_s, timings.soft_s, timings.hard_s) == (10, 2, 6, 8)
    assert configuration.cluster.durability == "preferred"
    assert configuration.wanted_synchronous_standbys == 1
    assert [peer.name for peer in configuration.peers] == ["demo-2", "demo-3"]
    assert configuration.listen_host == "127.0.0.1"
    assert configuration.control_socket == Path("/var/tmp/i1/control.sock")
    assert configuration.lock_file == Path("/var/tmp/locks/demo-1.lock")


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("cluster.nmae", "demo", "unknown field `nmae`"),
        ("cluster.name", 5, r"\$\.cluster\.name"),
        ("cluster.durability", "some", "durability"),
        ("cluster.synchronous_standbys", 3, "needs at least 4 members, there are 3"),
        ("cluster.synchronous_standbys", 0, ">= 1"),
        ("bootstrap.replicas_from", "archive", "there is no archive; give the section archive"),
        ("bootstrap.replicas_from", "elsewhere", "replicas_from"),
        ("instance.name", "demo-9", "'demo-9' is not among members: demo-1, demo-2, demo-3"),
        ("instance.log_directory", "log", "must be an absolute path"),
        ("instance.log_directory", "/var/tmp/i1/data/log", "must not be in the data directory"),
        ("instance.directory", "/" + "x" * 100, "too long for a Unix socket; use a shorter path"),
        ("members.1.name", "demo-1", "every name must be there once"),
        ("members.1.name", "Demo_2", "'Demo_2' is no instance name"),
        ("members.1.name", "d" * 60, "is no instance name"),
        ("members.0.http_port", 0, r"members\[0\]\.http_port"),
        ("members.0.postgres_port", 65536, "65535"),
        ("members.0.http_port", "7001", "Expected `int`"),
        ("timings.hard_s", 9.5, "raise lease_duration_s or lower hard_s"),
        ("timings.renew_interval_s", 4, "soft_s must be at least twice renew_interval_s"),
        ("timings.soft_s", 8, "must be below hard_s"),
        ("timings.relax_after_s", 3, "must be below suspect_after_s"),
        ("timings.promise_timeout_s", 0, "promise_timeout_s must be above 0"),
        ("timings.lease_duration", 10, "unknown field"),
        ("log_level", "loud", "log_level"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_mend(tmp_path: Path, place: str, value: object, told: str) -> None:
    path = written(tmp_path, with_value(place, value))
    with pytest.raises(ConfigurationError, match=told) as error:
        load_configuration(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="Postgres runs as another user only under root")
def test_as_root_the_user_of_postgres_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no user 'nobody-at-all', and Postgres refuses to run as root"):
        load_configuration(written(tmp_path, with_value("instance.run_as", "nobody-at-all")))


@pytest.mark.parametrize("content", ["", "a: [", "- 1\n", "just text", "\x00"])
def test_what_is_no_configuration_at_all_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigurationError, match=r"demo-1\.yaml"):
        load_configuration(written(tmp_path, content))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        load_configuration(tmp_path / "absent.yaml")


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    content = with_value("cluster.synchronous_standbys", 5)
    content["instance"]["name"] = "demo-9"
    with pytest.raises(ConfigurationError) as error:
        load_configuration(written(tmp_path, content))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("members", "durability", "wanted"),
    [(1, "preferred", 0), (2, "preferred", 1), (3, "required", 1), (3, "asynchronous", 0), (2, "required", 1)],
)
def test_a_commit_is_on_a_majority_by_default(tmp_path: Path, members: int, durability: str, wanted: int) -> None:
    content = with_value("cluster.durability", durability)
    content["members"] = content["members"][:members]
    assert load_configuration(written(tmp_path, content)).wanted_synchronous_standbys == wanted


def test_tags_are_kept_as_they_are_written(tmp_path: Path) -> None:
    tags = {"zone": "a", "ssd": True, "weight": 3, "noloadbalance": False}
    assert load_configuration(written(tmp_path, with_value("instance.tags", tags))).instance.tags == tags


@pytest.mark.parametrize(
    ("tags", "problem"),
    [
        ({"nofailover": True}, "instance.tags.nofailover: has no effect here"),
        ({"clonefrom": True}, "instance.tags.clonefrom: has no effect here"),
        ({"a b": 1}, "'a b' is no tag's name"),
        ({"noloadbalance": "yes"}, "noloadbalance: is true or false"),
    ],
)
def test_a_tag_that_would_promise_what_nobody_does_is_refused(
    tmp_path: Path, tags: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        load_configuration(written(tmp_path, with_value("instance.tags", tags)))
