"""Settings from flags, environment and file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from guard_service.config import FIELDS, MIB, ConfigError, Settings, load


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "guard.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = _file(tmp_path, "port: 1\nmetrics_port: 1\nthreads: 1\n")
    loaded = load({"port": "3"}, {"GUARD_PORT": "2", "GUARD_METRICS_PORT": "2"}, file)
    settings = loaded.settings
    assert (settings.port, settings.metrics_port, settings.threads) == (3, 2, 1)
    assert settings.host == Settings().host
    assert loaded.sources == {
        "port": "flag",
        "metrics_port": "GUARD_METRICS_PORT",
        "threads": f"file {file}",
    }


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    file = _file(tmp_path, "prot: 1\nthreads: many\n")
    with pytest.raises(ConfigError) as caught:
        load(
            {"port": "70000", "log_level": "loud", "tls_cert": "/none"},
            {"GUARD_QUEUE_ITEMS": "1", "GUARD_METRICS": "perhaps"},
            file,
        )
    told = "\n".join(caught.value.problems)
    for part in (
        "unknown setting prot; did you mean port?",
        "threads: 'many' is not an integer",
        "unknown setting GUARD_QUEUE_ITEMS; did you mean GUARD_MAX_QUEUE_ITEMS?",
        "GUARD_METRICS: 'perhaps' is neither true nor false",
        "port: 70000 is not between 0 and 65535",
        "log_level: 'loud' is none of",
        "tls_cert and tls_key go together",
        "tls_cert: /none is not a file",
    ):
        assert part in told
    assert len(caught.value.problems) == 8


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("- a list", "must be a mapping"),
        ("port: [", "while parsing"),
        ("port: true", "True is not a number"),
        ("port: 1.5", "1.5 is not an integer"),
        ("default_deadline_s: .nan", "nan is not a number"),
        ("host: 7", "7 is not text"),
        ("policies: {a: b}", "is not a list of paths"),
        ("policies: [/no/such/folder]", "/no/such/folder does not exist"),
        ("default_deadline_s: 400", "is over max_deadline_s"),
    ],
)
def test_a_broken_file_is_refused_with_its_reason(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("/", ".")):
        load({}, {}, _file(tmp_path, content))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load({}, {}, tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load({}, {}, tmp_path / "binary.yaml")
    assert load({}, {}, _file(tmp_path, "")).settings == Settings()


def test_values_of_each_kind_are_read(tmp_path: Path) -> None:
    environment = {
        "GUARD_POLICIES": f"{tmp_path}:{tmp_path}",
        "GUARD_METRICS": "off",
        "GUARD_DRAIN_TIMEOUT_S": "1.5",
        "GUARD_MAX_MESSAGE_BYTES": "8_388_608",
        "OTHER": "ignored",
    }
    settings = load({}, environment).settings
    assert settings.policies == (tmp_path, tmp_path)
    assert settings.metrics is False
    assert settings.drain_timeout_s == 1.5
    assert settings.max_message_bytes == 8 * 1024 * 1024


def test_what_kubernetes_sets_for_a_service_called_guard_is_no_setting() -> None:
    environment = {
        "GUARD_PORT": "tcp://10.0.0.1:50051",
        "GUARD_SERVICE_HOST": "10.0.0.1",
        "GUARD_SERVICE_PORT_GRPC": "50051",
        "GUARD_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    assert load({}, environment).settings == Settings()


def test_the_printed_settings_are_a_file_that_gives_them_back(tmp_path: Path) -> None:
    loaded = load({"port": "7", "policies": str(tmp_path)}, {"GUARD_TLS_CERT": ""})
    lines = list(loaded.lines())
    assert len(lines) == len(FIELDS)
    assert any(line.startswith("port: 7") and "# flag: " in line for line in lines)
    text = "\n".join(lines)
    assert set(yaml.safe_load(text)) == set(FIELDS)
    assert load({}, {}, _file(tmp_path, text)).settings == loaded.settings


def test_every_knob_tells_its_reason() -> None:
    assert all(knob.metadata["why"] for knob in FIELDS.values())


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:1"), ("::1", "[::1]:1"), ("unix:/run/guard", "unix:/run/guard")],
)
def test_the_address_is_what_grpc_binds(host: str, address: str) -> None:
    assert Settings(host=host, port=1).address == address


def test_a_message_takes_the_largest_image_where_images_are_judged() -> None:
    own = Settings()
    assert own.message_bytes(judges_images=False) == 4 * MIB
    assert own.message_bytes(judges_images=True) == own.max_image_bytes + 4 * MIB
    assert Settings(max_message_bytes=9 * MIB).message_bytes(judges_images=True) == 9 * MIB
    with pytest.raises(ConfigError, match="neither 0 nor at least 1024"):
        Settings(max_message_bytes=7)
