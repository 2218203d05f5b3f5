"""components/tls and components/cert-manager as overlays/tls puts them together: the certificates that are asked for are those that the instances accept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml
from deploy_manifests import DEPLOY, Manifests, Plain, rendered

from instance_manager import certificates
from instance_manager.certificate_sets import Certificates
from instance_manager.certificates import Wanted
from instance_manager.config import Configuration

OVERLAY = DEPLOY / "overlays/tls"
KEY_AGREEMENT = {"digital signature", "server auth", "client auth"}


@pytest.fixture
def tls() -> Manifests:
    return rendered(OVERLAY)


def test_each_instance_accepts_the_certificates_that_are_asked_for(tls: Manifests, tmp_path: Path) -> None:
    issue(tls, tmp_path)
    for ordinal in range(tls.stateful_set["spec"]["replicas"]):
        assert problems(in_a_pod(tls, tmp_path, ordinal), tmp_path) == ()


def test_a_certificate_of_another_namespace_is_told(tls: Manifests, tmp_path: Path) -> None:
    """So the names must follow the namespace of the overlay, as the next test shows."""
    issue(tls, tmp_path, names=("*.pg.another.svc",))
    (problem,) = problems(in_a_pod(tls, tmp_path, 0), tmp_path)
    assert "tls.peers" in problem
    assert "pg-0.pg.somewhere.svc" in problem


def test_the_names_follow_the_namespace_of_the_overlay(tmp_path: Path) -> None:
    kustomization = yaml.safe_load((OVERLAY / "kustomization.yaml").read_text(encoding="utf-8"))
    kustomization["namespace"] = "orders"
    for key in ("resources", "components"):
        kustomization[key] = [
            str(up_to(tmp_path) / (OVERLAY / each).resolve().relative_to("/")) for each in kustomization[key]
        ]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    (tmp_path / "instance-manager.yaml").write_bytes((OVERLAY / "instance-manager.yaml").read_bytes())
    names = rendered(tmp_path).one("Certificate", "pg-tls")["spec"]["dnsNames"]
    assert names[:4] == ["*.pg.orders.svc", "pg-rw.orders.svc", "pg-ro.orders.svc", "pg-r.orders.svc"]


def test_clients_can_verify_every_service_by_its_names(tls: Manifests) -> None:
    names = set(tls.one("Certificate", "pg-tls")["spec"]["dnsNames"])
    namespace = tls.stateful_set["metadata"]["namespace"]
    for service in tls.of_kind("Service"):
        name = service["metadata"]["name"]
        if name == tls.name:
            assert f"*.{name}.{namespace}.svc" in names
        else:
            assert {name, f"{name}.{namespace}.svc"} <= names


def test_who_may_control_has_a_certificate_that_is_good_for_nothing_else(tls: Manifests, tmp_path: Path) -> None:
    configuration = tls.configuration(tmp_path)
    assert configuration.control is not None
    users = {each["spec"]["commonName"]: each["spec"] for each in tls.of_kind("Certificate")}
    for name in configuration.control.allowed_names:
        assert set(users[name]["usages"]) == {"digital signature", "client auth"}
        assert "dnsNames" not in users[name]
        assert users[name]["secretName"] not in secrets_in_pods(tls)


def test_pods_wait_for_the_secrets_of_their_certificates_and_never_see_the_authoritys_key(tls: Manifests) -> None:
    made = {each["spec"]["secretName"] for each in tls.of_kind("Certificate")}
    needed = secrets_in_pods(tls) - {"pg-secrets"}
    assert needed == {"pg-tls", "pg-replication-tls"}
    assert needed <= made
    for name in ("tls", "replication-tls"):
        secret = tls.volume(name)["secret"]
        assert secret["defaultMode"] == 0o440
        assert not secret.get("optional", False)


def test_the_configuration_names_the_places_of_the_certificates(tls: Manifests, tmp_path: Path) -> None:
    section = tls.configuration(tmp_path).tls
    assert section is not None
    assert str(section.directory) == tls.mounts["tls"]
    assert str(section.replication) == tls.mounts["replication-tls"]
    assert section.required


def test_every_certificate_is_renewed_well_before_its_end_with_a_new_key(tls: Manifests) -> None:
    for each in tls.of_kind("Certificate"):
        if not each["spec"].get("isCA"):
            assert hours(each["spec"]["renewBefore"]) * 3 <= hours(each["spec"]["duration"])
            # Instances tell of an end that is nearer than a fortnight: by then it must have been renewed.
            assert hours(each["spec"]["renewBefore"]) > 24 * 14
            assert each["spec"]["privateKey"]["rotationPolicy"] == "Always"


def test_issuers_are_there_and_the_authority_signs(tls: Manifests) -> None:
    issuers = {each["metadata"]["name"]: each["spec"] for each in tls.of_kind("Issuer")}
    for each in tls.of_kind("Certificate"):
        assert each["spec"]["issuerRef"]["name"] in issuers
    (authority,) = [each["spec"] for each in tls.of_kind("Certificate") if each["spec"].get("isCA")]
    signers = {each["spec"]["issuerRef"]["name"] for each in tls.of_kind("Certificate")} - {
        authority["issuerRef"]["name"]
    }
    assert [issuers[name] for name in signers] == [{"ca": {"secretName": authority["secretName"]}}]


def secrets_in_pods(manifests: Manifests) -> set[str]:
    return {volume["secret"]["secretName"] for volume in manifests.pod["volumes"] if "secret" in volume}


def issue(manifests: Manifests, directory: Path, names: tuple[str, ...] | None = None) -> None:
    """As cert-manager would, one directory per Secret; but for the namespace in which `in_a_pod` is."""
    namespace = manifests.stateful_set["metadata"]["namespace"]
    wanted = []
    for each in manifests.of_kind("Certificate"):
        spec: Plain = each["spec"]
        if spec.get("isCA"):
            continue
        assert set(spec["usages"]) <= KEY_AGREEMENT
        asked = tuple(name.replace(f".{namespace}.", ".somewhere.") for name in spec.get("dnsNames", ()))
        server = "server auth" in spec["usages"]
        wanted.append(
            Wanted(
                path=spec["secretName"],
                common_name=spec["commonName"],
                names=names or asked if server else asked,
                server=server,
            )
        )
    certificates.make(directory, wanted, cluster=manifests.name, renew=False)


def in_a_pod(manifests: Manifests, directory: Path, ordinal: int) -> Configuration:
    configuration = manifests.configuration(directory, ordinal)
    assert configuration.tls is not None
    secret = {
        path: manifests.volume(name)["secret"]["secretName"]
        for name, path in manifests.mounts.items()
        if name.endswith("tls")
    }
    places = {
        key: directory / secret[str(path)]
        for key in ("directory", "replication")
        if (path := getattr(configuration.tls, key)) is not None
    }
    return msgspec.structs.replace(configuration, tls=msgspec.structs.replace(configuration.tls, **places))


def problems(configuration: Configuration, directory: Path) -> tuple[str, ...]:
    assert configuration.tls is not None
    return Certificates(
        configuration.tls, configuration.control, directory / "copies", host=configuration.me.host
    ).problems()


def up_to(directory: Path) -> Path:
    """The root, relative to it: kustomize takes no absolute paths."""
    return Path(*[".."] * (len(directory.resolve().parts) - 1))


def hours(text: str) -> int:
    assert text.endswith("h")
    return int(text[:-1])
