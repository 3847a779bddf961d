"""Certificates and keys: what is written is accepted, and nothing is ever overwritten."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from fedspine.certificates import check_private_key, check_server_pair, make_certificates, needed, public_keys
from fedspine.cli import main
from fedspine.errors import CertificateError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates") / "federation"
    make_certificates(directory, ["server.lab", "10.0.0.1"], ["b", "a"])
    return directory


def test_only_the_owner_can_read_them(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        *("ca.crt", "ca.key", "server.crt", "server.key"),
        *("a.key", "a.pub", "b.key", "b.pub"),
    }
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("host", "accepted"), [("server.lab", True), ("10.0.0.1", True), ("127.0.0.1", True), ("10.0.0.2", False)]
)
def test_a_client_accepts_the_server_by_its_names_only(made: Path, host: str, accepted: bool) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made / "server.crt", made / "server.key")
    client = ssl.create_default_context(cafile=made / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=host).close()
        assert accepted
    except ssl.SSLCertVerificationError:
        assert not accepted
    finally:
        ours.close()
        thread.join()


def test_keys_are_those_that_flower_takes(made: Path) -> None:
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve

    keys = public_keys(made)
    assert list(keys) == ["a", "b"]
    assert all(uses_nist_ec_curve(bytes_to_public_key(key)) for key in keys.values())
    check_private_key(made / "a.key")
    check_server_pair(made / "server.crt", made / "server.key")


def test_wrong_files_are_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"ca\.key: it is not the key of .*server\.crt"):
        check_server_pair(made / "server.crt", made / "ca.key")
    with pytest.raises(CertificateError, match=r"a\.pub: no private key"):
        check_private_key(made / "a.pub")
    with pytest.raises(CertificateError, match="it holds no public key of a device"):
        public_keys(tmp_path)


def test_what_may_not_be_read_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    monkeypatch.setattr(Path, "exists", deny)
    for words, read in (
        (r"this user may not read a\.key; give it to", lambda: needed(made, "a.key")),
        (r"this user may not read a\.pub", lambda: public_keys(made)),
        ("federation: cannot be written: Permission denied", lambda: make_certificates(made, [], ["c"])),
    ):
        with pytest.raises(CertificateError, match=words):
            read()


def test_a_device_can_be_added_and_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "federation")
    assert main(["certificates", folder, "--host", "localhost", "--nodes", "a"]) == 0
    assert main(["certificates", folder, "--nodes", "b"]) == 0
    assert "b.pub: to the server" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    for again, words in (
        (["--host", "localhost", "--nodes", "c"], "ca.crt exists already"),
        (["--nodes", "c,a"], "a.key exists already"),
        (["--nodes", "c,c"], "'c' is named twice"),
        (["--nodes", "c,"], "name ''"),
        (["--nodes", "../c"], "name '../c'"),
        (["--nodes", "server"], "name 'server'"),
        (["--host", "https://x:1", "--nodes", "c"], "must be a host name or an IP address"),
        ([], "nothing to make"),
    ):
        assert main(["certificates", folder, *again]) == 2
        assert words in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
