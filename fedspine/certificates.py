"""What the machines of a federation prove themselves with: a certificate authority, the server's certificate, and a key
pair per device.

The server shows its certificate, which the devices check against the authority's (TLS). A device signs its requests
with its own key, and the server knows the public keys that it accepts (Flower's node authentication, which takes
elliptic-curve keys in OpenSSH's format). All keys are of the curve P-384.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedspine.errors import CertificateError

AUTHORITY, AUTHORITY_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY = "server.crt", "server.key"
HERE = ("localhost", "127.0.0.1", "::1")
"""Names of the server on its own machine, where its processes talk to one another by TLS too."""
VALID_DAYS = 3650
RESERVED = ("ca", "server")


@dataclass(frozen=True)
class Made:
    """Files that were written."""

    authority: bool
    """Whether there is a new authority, with a server's certificate."""
    nodes: tuple[str, ...]


def make_certificates(directory: Path, hosts: Sequence[str], nodes: Sequence[str]) -> Made:
    """Write `ca.crt`, `ca.key`, `server.crt`, `server.key` for the server's `hosts` (names or addresses), and NAME.key,
    NAME.pub for every node. Without hosts, key pairs only: for devices that are added later.

    Errors: `CertificateError` for a wrong name or a file that exists; nothing is written then.
    """
    if not hosts and not nodes:
        raise CertificateError("nothing to make: give --host, --nodes, or both")
    for node in nodes:
        check_name(node)
        if nodes.count(node) > 1:
            raise CertificateError(f"--nodes: '{node}' is named twice; give each device its own name")
    files = _authority_and_server(hosts) if hosts else {}
    for node in nodes:
        files |= _key_pair(node)
    try:
        taken = next((name for name in files if (directory / name).exists()), None)
        if taken:
            raise CertificateError(
                f"{directory / taken} exists already, and what was made with it would be of no use then; choose "
                "another folder, or leave out what is there: --host where there is an authority, --nodes that have keys"
            )
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in files.items():
            with open(os.open(directory / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise CertificateError(f"{directory}: cannot be written: {error.strerror}") from None
    return Made(bool(hosts), tuple(nodes))


def check_name(name: str) -> None:
    """Errors: `CertificateError` for a name of a device that is no plain word."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name) or name in RESERVED:
        raise CertificateError(
            f"name '{name}': must be letters, digits, '-', '_' and '.', at most 64, and none of {', '.join(RESERVED)}"
        )


def public_keys(directory: Path) -> dict[str, bytes]:
    """PEM public key by name of the device, in the order of the names: every NAME.pub of a folder.

    Errors: `CertificateError` when there is none, or one may not be read, or is no elliptic-curve key.
    """
    keys = {}
    for path in sorted(directory.glob("*.pub")):
        try:
            key = load_ssh_public_key(needed(directory, path.name).read_bytes())
        except ValueError as error:
            raise CertificateError(f"{path}: no public key in OpenSSH's format ({error})") from None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise CertificateError(f"{path}: must be an elliptic-curve key, as `fedspine certificates` makes them")
        keys[path.stem] = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if not keys:
        raise CertificateError(
            f"--certificates {directory}: it holds no public key of a device (NAME.pub), or this user may not list it; "
            f"make some with `fedspine certificates {directory} --nodes NAME,NAME`"
        )
    return keys


def check_private_key(path: Path) -> None:
    """Errors: `CertificateError` when a file is no elliptic-curve private key in OpenSSH's format."""
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{path}: no private key in OpenSSH's format ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path}: must be an elliptic-curve key, as `fedspine certificates` makes them")


def check_server_pair(certificate: Path, key: Path) -> None:
    """Errors: `CertificateError` when a key is not that of a certificate, or one of the files is neither."""
    try:
        public = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    except ValueError as error:
        raise CertificateError(f"{certificate}: no certificate ({error})") from None
    try:
        private = load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{key}: no private key ({error})") from None
    if private.public_key() != public:
        raise CertificateError(f"{key}: it is not the key of {certificate}; take both from one folder")


def needed(directory: Path, name: str) -> Path:
    """A file of a folder with certificates.

    Errors: `CertificateError` when it is not there, or this user may not read it.
    """
    path = directory / name
    try:
        path.open("rb").close()
    except PermissionError:
        raise CertificateError(
            f"--certificates {directory}: this user may not read {name}; give it to the user who runs this (chown)"
        ) from None
    except OSError:
        raise CertificateError(
            f"--certificates {directory}: it holds no {name}; copy it from where `fedspine certificates` wrote it, or "
            "join and serve with --insecure for a trial"
        ) from None
    return path


def _authority_and_server(hosts: Sequence[str]) -> dict[str, bytes]:
    authority_key, server_key = _new_key(), _new_key()
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedSpine authority")])
    own_id = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    authority = (
        _certificate(issuer, issuer, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(own_id, critical=False)
        .sign(authority_key, SHA384())
    )
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *HERE))]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedSpine server")])
    server = (
        _certificate(subject, issuer, server_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_id), critical=False)
        .sign(authority_key, SHA384())
    )
    return {
        AUTHORITY: authority.public_bytes(Encoding.PEM),
        AUTHORITY_KEY: _pem(authority_key),
        SERVER: server.public_bytes(Encoding.PEM),
        SERVER_KEY: _pem(server_key),
    }


def _key_pair(name: str) -> dict[str, bytes]:
    key = _new_key()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return {f"{name}.key": private, f"{name}.pub": public + b"\n"}


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=VALID_DAYS))
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    """Errors: `CertificateError` when it is neither an address nor a host name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host):
        raise CertificateError(f"--host '{host}': must be a host name or an IP address, without a port")
    return x509.DNSName(host)
