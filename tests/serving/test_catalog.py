"""Which languages are served, and bad input of the command."""

import socket

import pytest
from helpers import free_port

from peft_clsr.cli import main
from peft_clsr.serving.catalog import make_catalog
from peft_clsr.serving.gate import hash_key

pytest.importorskip("ray.serve")


def test_a_language_is_found_by_its_names_and_dialects(models):
    catalog = make_catalog(str(models / "tiny"), [str(models / "experts")], [])
    assert [catalog.find(name) for name in ("Catalan", "ca_ES", "fr", None)] == ["ca", "ca-ES", "fr", None]
    assert catalog.expert("ca-ES")[1].code == "ca" and catalog.expert("fr") is None
    with pytest.raises(
        ValueError, match="'rw' has no expert here, and the model does not know it: expected one of be,"
    ):
        catalog.find("rw")


def test_only_the_named_languages_are_served(models):
    catalog = make_catalog(str(models / "tiny"), [str(models / "experts")], ["Romanian", "fr"])
    assert [expert.code for _, expert in catalog.experts] == ["ro"]
    assert catalog.find("ro-MD") == "ro-MD"
    with pytest.raises(ValueError, match="'ca' is not served here: expected ro, fr"):
        catalog.find("ca")
    assert make_catalog(str(models / "tiny"), [], ["fr"]).find(None) == "fr"
    alike = make_catalog(str(models / "tiny"), [str(models / "experts")], ["ca", "ca-valencia"])
    with pytest.raises(ValueError, match="no language is given, and 'ca' and 'ca-valencia' are heard as the same one"):
        alike.find(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--replicas", 0), "--replicas is 0, expected at least 1"),
        (("--max_seconds", 0), "--max_seconds is 0, expected more than 0"),
        (("--port", 70000), "--port is 70000, expected a port, from 1 to 65535"),
        (("--metrics_port", 0, "--ray_address", "auto"), "--metrics_port is 0, expected a port"),
        (("--language", "rw"), "language 'rw' has no expert here"),
        (("--adapters", "nowhere"), "--adapters nowhere"),
    ],
)
def test_the_command_refuses_bad_input_before_ray_starts(models, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("ray.init", lambda *arguments, **settings: pytest.fail("Ray starts"))
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")
    command = ["serve", "--model", models / "tiny", "--port", free_port(), "--metrics_port", free_port(), *arguments]
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, command)))
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "message"), [(" secret\n", "secret is asked for"), (" \n", "PEFT_CLSR_API_KEY has spaces alone")]
)
def test_spaces_around_the_key_do_not_count(models, monkeypatch, capsys, key, message):
    def stop(settings, catalog):
        assert settings.key_hash == hash_key("secret")
        raise ValueError("secret is asked for")

    monkeypatch.setattr("peft_clsr.serving.service.make_service", stop)
    monkeypatch.setenv("PEFT_CLSR_API_KEY", key)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")
    command = ["serve", "--model", models / "tiny", "--port", free_port(), "--metrics_port", free_port()]
    with pytest.raises(SystemExit):
        main(list(map(str, command)))
    assert f"error: {message}" in capsys.readouterr().err


def test_a_port_in_use_is_named(models, monkeypatch, capsys):
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(SystemExit):
        port = listener.getsockname()[1]
        main(["serve", "--model", str(models / "tiny"), "--port", str(port)])
    assert f"--port {port} of 127.0.0.1 cannot be used: Address already in use" in capsys.readouterr().err
