"""Settings: flags over environment over file over defaults, one namespace, refusals that name setting and origin."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from server.settings import ALIASES, ServeConfig, ServerSettings, engine_options
from server.settings_sources import Resolved, resolve


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("JAXSERVE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    """written(text) -> path of a settings file."""

    def write(text: str) -> str:
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    """A certificate for localhost and its key."""
    pair = {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-keyout", pair["ssl_keyfile"], "-out", pair["ssl_certfile"]]
    subprocess.run(command, check=True, capture_output=True)
    return pair


def value(resolved: Resolved, name: str) -> Any:
    both = {**resolved.config.server.model_dump(), **engine_options(resolved.config.engine)}
    return both[name]


# Precedence


def test_without_anything_every_setting_is_its_default() -> None:
    resolved = resolve({})
    assert resolved.config == ServeConfig(server=ServerSettings(), engine=EngineConfig())
    assert set(resolved.origins.values()) == {"default"}


@pytest.mark.parametrize(
    ("name", "low", "middle", "high"),
    [("port", 9001, 9002, 9003), ("page_size", 8, 32, 64), ("dtype", "float16", "bfloat16", "float32")],
)
def test_flags_stand_above_the_environment_and_that_above_the_file(
    monkeypatch: pytest.MonkeyPatch, written: Any, name: str, low: Any, middle: Any, high: Any
) -> None:
    path = written(f"{name}: {low}")
    variable = f"JAXSERVE_{name.upper()}"
    from_file = resolve({}, path)
    monkeypatch.setenv(variable, str(middle))
    from_environment = resolve({}, path)
    from_flag = resolve({name: high}, path)
    assert [value(r, name) for r in (from_file, from_environment, from_flag)] == [low, middle, high]
    origins = [r.origins[name] for r in (from_file, from_environment, from_flag)]
    assert origins == ["serve.yaml", variable, f"--{name.replace('_', '-')}"]


def test_the_environment_can_name_the_file_and_a_flag_another(
    monkeypatch: pytest.MonkeyPatch, written: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAXSERVE_CONFIG", written("port: 9001"))
    assert resolve({}).config.server.port == 9001
    other = tmp_path / "other.yaml"
    other.write_text("port: 9002")
    assert resolve({}, str(other)).config.server.port == 9002


def test_server_and_engine_settings_share_one_namespace_and_every_kind_of_value_is_read(
    monkeypatch: pytest.MonkeyPatch, written: Any
) -> None:
    environment = {
        "MODEL": "some/model",
        "MAX_MODEL_LEN": "512",
        "MEMORY_UTILIZATION": "0.5",
        "ENABLE_PREFIX_CACHING": "false",
        "IN_PROCESS": "true",
        "DRAIN_TIMEOUT": "2.5",
        "UNKNOWN_PARAMS": "warn",
    }
    for name, text in environment.items():
        monkeypatch.setenv(f"JAXSERVE_{name}", text)
    resolved = resolve({}, written("max-num-seqs: 4\nmax_num_queued_reqs: 0\nplayground: no\nseed: 7\n"))
    model, cache = resolved.config.engine.model, resolved.config.engine.cache
    assert (model.model, model.max_model_len) == ("some/model", 512)
    assert (cache.memory_utilization, cache.enable_prefix_caching) == (0.5, False)
    assert (resolved.config.engine.scheduler.max_num_seqs, resolved.config.engine.seed) == (4, 7)
    server = resolved.config.server
    assert (server.in_process, server.drain_timeout, server.unknown_params) == (True, 2.5, "warn")
    assert (server.max_num_queued_reqs, server.playground) == (0, False)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_names_that_users_of_vllm_know_are_good_in_environment_and_file(
    monkeypatch: pytest.MonkeyPatch, written: Any, alias: str, name: str
) -> None:
    given = {"page_size": 32, "memory_utilization": 0.5, "drain_timeout": 3.0, "frontends": 2, "log_level": "debug"}
    path = written(f"{alias.replace('_', '-')}: {given[name]}")
    assert value(resolve({}, path), name) == given[name]
    monkeypatch.setenv(f"JAXSERVE_{alias.upper()}", str(given[name]))
    resolved = resolve({})
    assert value(resolved, name) == given[name]
    assert resolved.origins[name] == f"JAXSERVE_{alias.upper()}"


@pytest.mark.parametrize(
    ("text", "keys"),
    [("one", ("one",)), ("one,two", ("one", "two")), ("one, two", ("one", "two")), ('["a,b", "c"]', ("a,b", "c"))],
)
def test_a_list_is_json_or_strings_between_commas(
    monkeypatch: pytest.MonkeyPatch, written: Any, text: str, keys: tuple[str, ...]
) -> None:
    assert resolve({"api_key": [text]}).config.server.api_key == keys
    assert resolve({}, written(f"api_key: {text}")).config.server.api_key == keys
    monkeypatch.setenv("JAXSERVE_API_KEY", text)
    assert resolve({}).config.server.api_key == keys


def test_a_list_flag_may_be_repeated_and_a_file_may_hold_a_list(written: Any) -> None:
    assert resolve({"served_model_name": ["a", "b,c"]}).config.server.served_model_name == ("a", "b", "c")
    assert resolve({}, written("served_model_name:\n- a\n- b,c\n")).config.server.served_model_name == ("a", "b,c")


def test_a_config_survives_json_between_processes(tmp_path: Path) -> None:
    config = resolve({"api_key": ["k"], "page_size": 32, "model": "m", "default_timeout": 1.5}).config
    assert ServeConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_logs_have_no_table_and_no_bars_between_them_unless_asked_for() -> None:
    assert resolve({}).config.engine.show_progress is True
    assert resolve({"log_format": "json"}).config.engine.show_progress is False
    assert resolve({"log_format": "json", "show_progress": True}).config.engine.show_progress is True


# Kubernetes


def test_addresses_that_kubernetes_gives_of_a_service_of_our_name_are_no_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in {
        "JAXSERVE_SERVICE_HOST": "10.0.0.7",
        "JAXSERVE_SERVICE_PORT": "8000",
        "JAXSERVE_SERVICE_PORT_HTTP": "8000",
        "JAXSERVE_PORT": "tcp://10.0.0.7:8000",
        "JAXSERVE_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "JAXSERVE_PORT_8000_TCP_ADDR": "10.0.0.7",
        "JAXSERVE_GRPC_SERVICE_HOST": "10.0.0.8",
        "JAXSERVE_GRPC_PORT": "tcp://10.0.0.8:50051",
    }.items():
        monkeypatch.setenv(name, text)
    resolved = resolve({})
    assert (resolved.config.server.port, resolved.config.server.grpc_port) == (8000, 50051)
    assert resolved.origins["port"] == "default"


# Refusals


def refusal(flags: dict[str, Any] | None = None, file: str | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        resolve(flags or {}, file)
    return str(refused.value)


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("JAXSERVE_PROT", "JAXSERVE_PORT"),
        ("JAXSERVE_MAX_MODEL_LENGTH", "JAXSERVE_MAX_MODEL_LEN"),
        ("JAXSERVE_CONFIGG", "JAXSERVE_CONFIG"),
        ("JAXSERVE_port", "JAXSERVE_PORT"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, variable: str, near: str
) -> None:
    monkeypatch.setenv(variable, "1")
    assert refusal() == f"unknown environment variable {variable}; did you mean {near}?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown setting prot; did you mean port?"),
        ("max-model-length: 1", "unknown setting max-model-length; did you mean max_model_len?"),
        ("zzz: 1", "unknown setting zzz"),
        ("config: other.yaml", "unknown setting config"),
        ("7: 1", "unknown setting 7"),
        ("port: 1\nport: 2", "port is set twice"),
        ("page-size: 8\nblock_size: 16", "sets page_size twice, the second time as block_size"),
        ("port", "not a str"),
        ("- port: 1", "not a list"),
        ("port: [", "is not YAML: line"),
        ("!!python/object/apply:os.system [x]", "is not YAML"),
    ],
)
def test_a_file_that_is_not_settings_is_refused_by_name(written: Any, text: str, message: str) -> None:
    path = written(text)
    told = refusal(file=path)
    assert told.startswith(f"config={path!r}")
    assert message in told


def test_an_empty_file_sets_nothing(written: Any) -> None:
    assert resolve({}, written("# nothing\n")).config.server == ServerSettings()


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(file=str(tmp_path / "none.yaml")).endswith("cannot be read: No such file or directory")
    assert "cannot be read" in refusal(file=str(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read" in refusal(file=str(binary))


def test_two_variables_for_one_setting_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_PAGE_SIZE", "16")
    monkeypatch.setenv("JAXSERVE_BLOCK_SIZE", "16")
    assert refusal() == "JAXSERVE_BLOCK_SIZE and JAXSERVE_PAGE_SIZE both set page_size: give one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 99999", "port=99999 must be less than or equal to 65535 (from serve.yaml)"),
        ("port: -1", "port=-1 must be greater than or equal to 0 (from serve.yaml)"),
        ("port: null", "port=None must be a valid integer (from serve.yaml)"),
        ("port: yes", "port=True must not be true or false (from serve.yaml)"),
        ("max_num_seqs: yes", "max_num_seqs=True must not be true or false (from serve.yaml)"),
        ("host: ''", "host='' must have at least 1 character (from serve.yaml)"),
        ("drain_timeout: .inf", "drain_timeout=inf must be a finite number (from serve.yaml)"),
        ("header_timeout: .nan", "header_timeout=nan must be a finite number (from serve.yaml)"),
        ("unknown_params: drop", "unknown_params='drop' must be 'error' or 'warn' (from serve.yaml)"),
        ("page_size: 12", "page_size=12 must be one of 8, 16, 32, 64 (from serve.yaml)"),
        ("dtype: [a]", "dtype=['a'] must be a valid string (from serve.yaml)"),
        ("root_path: api", "root_path='api' must begin with / and not end with it (from serve.yaml)"),
        ("served_model_name: [a, a]", "served_model_name=('a', 'a') holds a name twice (from serve.yaml)"),
        ("served_model_name: ''", "served_model_name=('',) holds an empty name (from serve.yaml)"),
        ("allowed_origins: example.org", "allowed_origins: 'example.org' must be * or like"),
        ("allowed_origins: https://a.org/x", "allowed_origins: 'https://a.org/x' must be * or like"),
        ("otlp_traces_endpoint: collector:4318", "otlp_traces_endpoint='collector:4318' must begin with http"),
        ("metrics_prefix: a-b", "metrics_prefix='a-b'"),
    ],
)
def test_a_wrong_value_is_refused_by_name_value_and_origin(written: Any, text: str, message: str) -> None:
    told = refusal(file=written(text))
    assert told.startswith(message)
    assert told.endswith("(from serve.yaml)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": 9000, "grpc_port": 9000}, "port=9000 and grpc_port=9000 must differ"),
        ({"port": 9000, "admin_port": 9000}, "port=9000 and admin_port=9000 must differ"),
        (
            {"grpc_port": 9000, "admin_port": 9000, "host": "10.0.0.1", "admin_host": "0.0.0.0"},
            "grpc_port=9000 and admin_port=9000 must differ",
        ),
        ({"in_process": True, "frontends": 2}, "in_process=True runs one front end, frontends=2 asks for more"),
        ({"ssl_keyfile": "k.pem"}, "ssl_keyfile='k.pem' needs ssl_certfile"),
        ({"ssl_certfile": "c.pem"}, "ssl_certfile='c.pem' needs ssl_keyfile"),
        ({"ssl_ca_certs": "a.pem"}, "ssl_ca_certs='a.pem' asks clients for certificates, which needs ssl_certfile"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_batched_tokens=32 must be at least"),
    ],
)
def test_contradictions_are_refused_by_name(flags: dict[str, Any], message: str) -> None:
    told = refusal(flags)
    assert told.startswith(message)
    assert "(from --" in told


def test_equal_ports_are_fine_where_they_are_on_different_addresses_or_any_free_one() -> None:
    assert resolve({"port": 9000, "admin_port": 9000, "host": "10.0.0.1"}).config.server.port == 9000
    assert resolve({"port": 0, "grpc_port": 0, "admin_port": 0}).config.server.port == 0


@pytest.mark.parametrize("key", ["", "with space", "tab\t", "schlüssel"])
def test_a_key_no_header_could_carry_is_refused_and_no_key_is_ever_shown(key: str) -> None:
    told = refusal({"api_key": [json.dumps(["good-key", key])]})
    assert told == "api_key: key 2 of 2 must be one or more visible ASCII characters (from --api-key)"


def test_an_empty_key_in_the_environment_does_not_mean_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "")
    assert refusal().startswith("api_key: key 1 of 1 must be")


def test_keys_are_in_no_error_no_table_and_no_repr(written: Any) -> None:
    assert "secret" not in refusal(file=written("api_key: {secret-key: 1}"))
    assert "secret" not in refusal(file=written("api_key: [secret-key\nport: 1"))
    resolved = resolve({"api_key": ["secret-key", "other"]})
    assert "secret" not in repr(resolved)
    assert dict((name, text) for name, text, _ in resolved.rows())["api_key"] == "***, ***"


# TLS files


def test_a_certificate_with_its_key_is_taken(certificate: dict[str, str]) -> None:
    server = resolve(certificate | {"ssl_ca_certs": certificate["ssl_certfile"]}).config.server
    assert server.ssl_certfile == certificate["ssl_certfile"]


def test_tls_files_that_are_missing_or_no_pem_are_refused_by_name(certificate: dict[str, str], tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    missing = str(tmp_path / "missing.pem")
    for name in ("ssl_certfile", "ssl_keyfile"):
        told = refusal(certificate | {name: missing})
        assert told.startswith(f"{name}={missing!r} is not a file that can be read")
        assert f"{name}={str(junk)!r}" in refusal(certificate | {name: str(junk)})
    assert "holds no certificates" in refusal(certificate | {"ssl_ca_certs": str(junk)})


def test_an_encrypted_or_foreign_key_is_refused_and_nobody_is_asked_for_a_password(
    certificate: dict[str, str], tmp_path: Path
) -> None:
    encrypted, foreign = str(tmp_path / "encrypted.pem"), str(tmp_path / "foreign.pem")
    source = certificate["ssl_keyfile"]
    commands = [
        ["openssl", "ec", "-aes128", "-passout", "pass:word", "-in", source, "-out", encrypted],
        ["openssl", "ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", foreign],
    ]
    for command, key in zip(commands, (encrypted, foreign), strict=True):
        subprocess.run(command, check=True, capture_output=True)
        assert "must be a certificate and its unencrypted key" in refusal(certificate | {"ssl_keyfile": key})


def test_settings_load_no_jax_and_no_web_framework() -> None:
    script = (
        "import sys, server.settings_sources\n"
        "sys.exit(' '.join({'jax', 'fastapi', 'uvicorn', 'grpc', 'transformers'} & set(sys.modules)) or None)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
