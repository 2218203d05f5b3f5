"""Certificates from files: proven before they are used, and a bad one never takes the place of a good one."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from instance_manager import certificates
from instance_manager.certificate_sets import Certificates
from instance_manager.certificates import CertificatesRefused, Lifetimes, make
from instance_manager.config_security import TlsSection
from instance_manager.tls import CertificateUnusable, covers, examine

DAY_S = 86400.0


def made(root: Path, *, cluster: str = "pg", days: int = 90, renew: bool = False) -> tuple[str, ...]:
    wanted = [certificates.member("pg-0", ["127.0.0.1"]), certificates.REPLICATION, certificates.user("alice")]
    return make(root, wanted, cluster=cluster, renew=renew, lifetimes=Lifetimes(days=days))


def server_only(root: Path, directory: Path) -> None:
    """As `usages: [server auth]` of cert-manager makes it."""
    old = x509.load_pem_x509_certificate((directory / "tls.crt").read_bytes())
    authority = serialization.load_pem_private_key((root / "ca/tls.key").read_bytes(), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    made = builder.sign(authority, hashes.SHA256())
    (directory / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    made(root / "ours")
    made(root / "theirs")
    return root


@pytest.fixture
def root(made_once: Path, tmp_path: Path) -> Path:
    """A copy of each test's own: `ours` and `theirs`."""
    shutil.copytree(made_once, tmp_path / "root")
    return tmp_path / "root"


def sets_of(root: Path, state: Path, **more: Path) -> Certificates:
    return Certificates(TlsSection(directory=root / "ours/members/pg-0", **more), None, state / "tls")  # type: ignore[arg-type]


def test_a_certificate_is_proven_by_its_own_authority(root: Path) -> None:
    facts = examine(root / "ours/members/pg-0")
    assert (facts.common_name, set(facts.names)) == ("pg-0", {"pg-0", "127.0.0.1"})
    assert 89 * DAY_S < facts.ends_s - facts.begins_s < 92 * DAY_S
    assert examine(root / "ours/replication", server=root / "ours/members/pg-0").common_name == "streaming_replica"


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("tls.key", "theirs/members/pg-0/tls.key", "no certificate with its key"),
        ("ca.crt", "theirs/members/pg-0/ca.crt", "is not accepted"),
        ("tls.crt", "ours/replication/tls.crt", "no certificate with its key"),
        ("tls.crt", None, "cannot be read: No such file"),
        ("ca.crt", None, "cannot be read: No such file"),
        ("ca.crt", "ours/members/pg-0/tls.key", "is no certificate"),
    ],
)
def test_what_is_wrong_with_the_files_is_said_without_their_content(
    root: Path, file: str, source: str | None, told: str
) -> None:
    directory = root / "ours/members/pg-0"
    key = (directory / "tls.key").read_text().splitlines()[1]
    (directory / file).unlink()
    if source is not None:
        shutil.copy(root / source, directory / file)
    with pytest.raises(CertificateUnusable, match=told) as caught:
        examine(directory)
    assert key not in str(caught.value)


def test_a_certificate_of_a_client_is_none_for_a_server(root: Path) -> None:
    with pytest.raises(CertificateUnusable, match="purpose"):
        examine(root / "ours/replication")


def test_a_new_certificate_is_taken_over_whole(root: Path, tmp_path: Path) -> None:
    sets = sets_of(root, tmp_path)
    sets.load()
    before = sets.peers_server
    assert sets.look() == ()
    shutil.rmtree(root / "ours/members")
    made(root / "ours")
    assert set(sets.look()) == {"postgres", "peers"}
    assert sets.peers_server is not before
    copy = sets.directory("postgres")
    assert copy is not None
    assert (copy / "tls.crt").read_bytes() == (root / "ours/members/pg-0/tls.crt").read_bytes()
    assert (copy / "tls.key").stat().st_mode & 0o777 == 0o600


def test_an_agent_knows_what_was_replaced_while_there_was_none(root: Path, tmp_path: Path) -> None:
    """Postgres outlives an agent, and serves what it was told last."""
    first, second, third = (sets_of(root, tmp_path) for _ in range(3))
    first.load()
    second.load()
    assert second.replaced_at_start == ()
    shutil.rmtree(root / "ours/members")
    made(root / "ours")
    third.load()
    assert set(third.replaced_at_start) == {"postgres", "peers"}


def test_a_bad_one_never_takes_the_place_of_a_good_one(root: Path, tmp_path: Path) -> None:
    sets = sets_of(root, tmp_path)
    sets.load()
    before, copy = sets.peers_server, sets.directory("postgres")
    assert copy is not None
    kept = (copy / "tls.key").read_bytes()
    shutil.copy(root / "theirs/members/pg-0/tls.key", root / "ours/members/pg-0/tls.key")
    assert sets.look() == ()
    assert sets.peers_server is before
    assert (copy / "tls.key").read_bytes() == kept
    assert any("tls.peers: the new certificate is not used" in remark for remark in sets.remarks(0.0))
    # Half of a renewal: its other half follows.
    shutil.copy(root / "theirs/members/pg-0/tls.crt", root / "ours/members/pg-0/tls.crt")
    shutil.copy(root / "theirs/members/pg-0/ca.crt", root / "ours/members/pg-0/ca.crt")
    assert set(sets.look()) == {"postgres", "peers"}
    assert sets.remarks(0.0) == ()


def test_a_member_needs_a_certificate_that_is_also_a_clients(root: Path, tmp_path: Path) -> None:
    """Members demand it of each other: one that is a server's only would cut this instance off from all of them."""
    sets = sets_of(root, tmp_path)
    sets.load()
    before = sets.peers_client
    server_only(root / "ours", root / "ours/members/pg-0")
    assert sets.look() == ("postgres",)
    assert sets.peers_client is before
    assert any("tls.peers: the new certificate is not used" in remark for remark in sets.remarks(0.0))


def test_a_member_needs_a_certificate_of_its_own_host(root: Path, tmp_path: Path) -> None:
    tls = TlsSection(directory=root / "ours/members/pg-0")
    sets = Certificates(tls, None, tmp_path / "tls", host="127.0.0.1")
    sets.load()
    shutil.rmtree(root / "ours/members/pg-0")
    make(root / "ours", [certificates.member("pg-0", ["192.0.2.1"])], cluster="pg", renew=False)
    assert sets.look() == ("postgres",)
    assert any("do not cover 127.0.0.1" in remark for remark in sets.remarks(0.0))


def test_files_are_judged_without_taking_them_over(root: Path, tmp_path: Path) -> None:
    sets = sets_of(root, tmp_path, replication=root / "ours/replication")
    assert sets.problems() == ()
    shutil.copytree(root / "theirs/replication", root / "ours/replication", dirs_exist_ok=True)
    [problem] = sets.problems()
    assert problem.startswith("tls.replication: ")
    assert not (tmp_path / "tls").exists()


def test_an_agent_that_restarts_over_a_bad_one_goes_on_with_the_copy(root: Path, tmp_path: Path) -> None:
    sets_of(root, tmp_path).load()
    (root / "ours/members/pg-0/tls.crt").write_text("garbage")
    again = sets_of(root, tmp_path)
    again.load()
    assert again.peers_server is not None
    assert any("the copy of an earlier one is used" in remark for remark in again.remarks(0.0))


def test_without_any_usable_certificate_the_start_is_refused_with_the_reason(root: Path, tmp_path: Path) -> None:
    (root / "ours/members/pg-0/tls.crt").unlink()
    with pytest.raises(CertificateUnusable, match=r"tls\.postgres: .*tls\.crt cannot be read"):
        sets_of(root, tmp_path).load()


def test_a_replication_certificate_must_have_the_roles_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sets_of(root, tmp_path, replication=root / "ours/replication").load()
    with pytest.raises(CertificateUnusable, match="must be 'streaming_replica'"):
        sets_of(root, tmp_path / "other", replication=root / "ours/control/alice").load()


@pytest.mark.parametrize(
    ("left_days", "told"),
    [(40.0, None), (15.0, None), (13.0, "ends in 13.0 days"), (-1.0, "has ended: whoever checks it refuses")],
)
def test_the_end_of_a_certificate_is_told_in_time(
    root: Path, tmp_path: Path, left_days: float, told: str | None
) -> None:
    sets = sets_of(root, tmp_path)
    sets.load()
    now_s = examine(root / "ours/members/pg-0").ends_s - left_days * DAY_S
    remarks = sets.remarks(now_s)
    assert (remarks == ()) is (told is None)
    assert told is None or all(told in remark for remark in remarks)
    assert [round(status.days_left or 0) for status in sets.statuses(now_s)] == [round(left_days)] * 2


def test_a_short_life_is_no_alarm(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "ours/members")
    made(root / "ours", days=1)
    sets = sets_of(root, tmp_path)
    sets.load()
    ends_s = examine(root / "ours/members/pg-0").ends_s
    assert sets.remarks(ends_s - DAY_S) == ()
    assert len(sets.remarks(ends_s - 0.1 * DAY_S)) == 2


@pytest.mark.parametrize(
    ("name", "host", "covered"),
    [
        ("pg-0.pg.ns.svc", "pg-0.pg.ns.svc", True),
        ("PG-0.pg.ns.svc", "pg-0.pg.ns.svc", True),
        ("*.pg.ns.svc", "pg-2.pg.ns.svc", True),
        ("*.pg.ns.svc", "pg.ns.svc", False),
        ("*.pg.ns.svc", "a.b.pg.ns.svc", False),
        ("*", "pg-0", False),
        ("pg-0", "pg-0.pg.ns.svc", False),
        ("0:0:0:0:0:0:0:1", "::1", True),
        ("127.0.0.1", "127.0.0.2", False),
    ],
)
def test_which_host_a_name_covers(name: str, host: str, covered: bool) -> None:
    assert covers(name, host) is covered


# The command's own rules.


def test_what_is_there_is_never_overwritten(root: Path) -> None:
    before = {path: path.read_bytes() for path in sorted((root / "ours").rglob("*")) if path.is_file()}
    assert made(root / "ours") == ()
    assert made(root / "ours", renew=True) == ()
    assert {path: path.read_bytes() for path in before} == before


def test_renewal_replaces_what_ends_soon_and_nothing_else(root: Path) -> None:
    shutil.rmtree(root / "ours/members")
    made(root / "ours", days=10)
    short = examine(root / "ours/members/pg-0")
    assert made(root / "ours") == ()
    (done,) = made(root / "ours", renew=True)
    assert "members/pg-0: renewed, the old one ends on" in done
    assert examine(root / "ours/members/pg-0").ends_s > short.ends_s


def test_an_authority_is_renewed_with_its_own_key_and_what_it_signed_stays_good(tmp_path: Path) -> None:
    wanted = [certificates.member("pg-0", ["127.0.0.1"])]
    make(tmp_path, wanted, cluster="pg", renew=False, lifetimes=Lifetimes(authority_days=100, days=90))
    old = (tmp_path / "ca/tls.crt").read_bytes()
    leaf = (tmp_path / "members/pg-0/tls.crt").read_bytes()
    make(tmp_path, wanted, cluster="pg", renew=True)
    assert (tmp_path / "ca/tls.crt").read_bytes() != old
    assert (tmp_path / "members/pg-0/tls.crt").read_bytes() == leaf
    assert (tmp_path / "members/pg-0/ca.crt").read_bytes() == (tmp_path / "ca/tls.crt").read_bytes()
    examine(tmp_path / "members/pg-0")


@pytest.mark.parametrize("missing", ["ca/tls.key", "ca/tls.crt", "members/pg-0/tls.crt"])
def test_half_of_what_was_there_is_left_alone(root: Path, missing: str) -> None:
    (root / "ours" / missing).unlink()
    before = {path: path.read_bytes() for path in sorted((root / "ours").rglob("*")) if path.is_file()}
    with pytest.raises(CertificatesRefused):
        made(root / "ours", renew=True)
    assert {path: path.read_bytes() for path in before} == before


def test_keys_are_for_their_owner_only(root: Path) -> None:
    keys = list((root / "ours").rglob("tls.key"))
    assert len(keys) == 4
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_a_listener_speaks_no_version_of_tls_below_the_minimum(root: Path, tmp_path: Path) -> None:
    sets = Certificates(
        TlsSection(directory=root / "ours/members/pg-0", minimum_version="TLSv1.3"), None, tmp_path / "tls"
    )
    sets.load()
    assert sets.peers_server is not None
    assert sets.peers_server.minimum_version is ssl.TLSVersion.TLSv1_3
    assert sets.peers_server.verify_mode is ssl.CERT_REQUIRED
