"""What tools that know Patroni are told of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_instance import configuration
from msgspec.structs import replace

from instance_manager.agent.details import settings_in_patronis_words
from instance_manager.config_sections import PostgresSection


def test_the_configuration_is_told_in_patronis_words(tmp_path: Path) -> None:
    told = settings_in_patronis_words(configuration(tmp_path, "a"))
    assert (told["ttl"], told["loop_wait"], told["retry_timeout"]) == (10, 2, 1.5)
    assert (told["synchronous_mode"], told["synchronous_mode_strict"]) == ("quorum", False)
    assert told["maximum_lag_on_failover"] == 16 * 1024 * 1024


def test_an_asynchronous_cluster_is_told_as_one(tmp_path: Path) -> None:
    told = settings_in_patronis_words(configuration(tmp_path, "a", "asynchronous"))
    assert (told["synchronous_mode"], told["synchronous_node_count"]) == (False, 0)


@pytest.mark.parametrize("name", ["vault.token", "ssl_passphrase_command"])
def test_a_parameter_that_may_hold_a_secret_is_told_by_its_name_only(tmp_path: Path, name: str) -> None:
    given = configuration(tmp_path, "a")
    parameters: dict[str, str | int | float | bool] = {name: "planted", "work_mem": "64MB"}
    told = settings_in_patronis_words(replace(given, postgres=PostgresSection(parameters=parameters)))
    assert told["postgresql"] == {
        "parameters": {name: "(not shown)", "work_mem": "64MB"},
        "use_pg_rewind": True,
        "use_slots": True,
    }
    assert "planted" not in str(told)
