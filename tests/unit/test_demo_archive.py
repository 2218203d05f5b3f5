"""Where the demo and the drill archive to, by their options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from instance_manager.demo import command
from instance_manager.demo.plan import ArchivePlan, Layout, loopback_plan, read_plan, write_files
from instance_manager.drill import command as drill
from instance_manager.drill import environment


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        ((), ArchivePlan()),
        (("--no-archive",), None),
        (
            ("--s3", "https://minio.example:9000/backups"),
            ArchivePlan(endpoint="https://minio.example:9000", bucket="backups"),
        ),
    ],
)
def test_the_options_say_where(words: tuple[str, ...], plan: ArchivePlan | None) -> None:
    assert command._archive_plan(options(*words)) == plan


def test_both_at_once_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--no-archive", "--s3", "http://a/b")
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place", ["backups", "minio:9000/backups", "http://minio:9000", "http://minio:9000/", "http://m/a/b"]
)
def test_what_is_no_endpoint_with_a_bucket_is_told(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "demo")
    problem = command._s3_problem(place)
    assert problem is not None
    assert "give the endpoint's URL and a bucket" in problem


def test_a_bucket_without_a_login_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in command.S3_LOGINS:
        monkeypatch.delenv(name, raising=False)
    problem = command._s3_problem("http://minio:9000/backups")
    assert problem is not None
    assert "no credentials in the environment" in problem
    monkeypatch.setenv("AWS_PROFILE", "demo")
    assert command._s3_problem("http://minio:9000/backups") is None


@pytest.mark.parametrize("archive", [None, ArchivePlan(), ArchivePlan(endpoint="http://127.0.0.1:9", bucket="b")])
def test_each_instance_is_configured_for_the_clusters_archive(tmp_path: Path, archive: ArchivePlan | None) -> None:
    layout = Layout(tmp_path / "c")
    plan = loopback_plan(instances=2, base_port=20000, archive=archive)
    write_files(layout, plan)
    assert read_plan(layout) == plan
    for name in plan.names:
        content = yaml.safe_load(layout.config(name).read_text())
        section = content.get("archive")
        if archive is None:
            assert section is None
        elif archive.endpoint is None:
            backup = {"schedule": {"at": ["03:00"]}, "retention": {"count": 7}}
            assert section == {"directory": str(layout.archive), "backup": backup}
            assert layout.archive.is_dir()
        else:
            assert section["s3"] == {"endpoint": "http://127.0.0.1:9", "bucket": "b", "path_style": True}
            assert section["server_name"] == f"demo-{plan.uid[:8]}"


@pytest.mark.parametrize("words", [(), ("--archive",)])
def test_the_drill_archives_only_where_it_is_asked_to(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ArchivePlan | None] = []

    class Planned(Exception):
        pass

    def plan(**wanted: object) -> object:
        archive = wanted["archive"]
        assert archive is None or isinstance(archive, ArchivePlan)
        made.append(archive)
        raise Planned

    monkeypatch.setattr(environment, "loopback_plan", plan)
    parser = argparse.ArgumentParser()
    drill.add_arguments(parser)
    with pytest.raises(Planned):
        drill.run(parser.parse_args(["--case", "switchover", *words]))
    assert made == [ArchivePlan() if words else None]
