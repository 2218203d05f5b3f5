"""Certificates as metrics: an end that is near wakes somebody before it is there."""

from __future__ import annotations

from metrics_servers import Scrape

from instance_manager.agent.instance_metrics import certificate_blocks
from instance_manager.status import CertificateStatus


def test_the_life_of_each_certificate_and_what_is_wrong_with_its_files_are_told() -> None:
    good = CertificateStatus(use="peers", names=("pg-0",), days_left=12.5)
    replaced_by_a_bad_one = CertificateStatus(use="postgres", names=("pg-0",), days_left=3.0, problem="no certificate")
    never_proven = CertificateStatus(use="control", names=(), days_left=None, problem="no certificate")
    seen = Scrape(certificate_blocks((good, replaced_by_a_bad_one, never_proven)))
    assert seen.value("instance_manager_certificate_days_left", use="peers") == 12.5
    assert seen.value("instance_manager_certificate_days_left", use="control") is None
    assert seen.value("instance_manager_certificate_files_usable", use="peers") == 1
    assert seen.value("instance_manager_certificate_files_usable", use="postgres") == 0


def test_without_certificates_there_is_nothing() -> None:
    assert Scrape(certificate_blocks(())).value("instance_manager_certificate_files_usable", use="peers") is None
