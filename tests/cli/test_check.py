"""peerd check, and the sources of the settings of peerd supervise."""

import os
import socket
from pathlib import Path
from typing import Any

import orjson
import pytest

from harness.command import peerd
from harness.ports import free_ports
from harness.supervised import Supervised

NO_ETCD = "--etcd=http://127.0.0.1:9"


def checked(*args: str, code: int = 0, cwd: Path | None = None) -> dict[str, Any]:
    done = peerd("check", "--json", NO_ETCD, *args, cwd=cwd)
    assert done.returncode == code, done.stderr
    report = orjson.loads(done.stdout)
    assert isinstance(report, dict)
    return report


def origins(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {
        setting["name"]: (setting["value"], setting["origin"]) for setting in report["settings"]
    }


def refused(*args: str, code: int) -> str:
    done = peerd("check", NO_ETCD, *args)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_check_prints_what_would_run(etcd: str, tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(
        "import peerd\n"
        "print('hello from the import')\n"
        "app = peerd.App()\n"
        "@app.handler('CHAT')\ndef chat(message): ...\n"
        "@app.handler('ASK')\nasync def ask(message): ...\n"
        "@app.batch_handler('METRIC')\ndef metric(messages): ...\n"
    )
    port = free_ports(3)
    args = ["--peers=3", f"--base-port={port}", "--app=chat:app", f"--etcd={etcd}"]
    done = peerd("check", *args, "--prefix=check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"3 peers on localhost, UDP ports {port} to {port + 2}" in done.stdout
    assert "chat:app: CHAT, ASK (async), METRIC (batch)" in done.stdout
    assert f"etcd at {etcd} (answers, records: 0); keys check/..." in done.stdout
    assert f"{port}.sock" in done.stdout
    assert "hello" not in done.stdout
    report = orjson.loads(peerd("check", "--json", *args, cwd=tmp_path).stdout)
    assert report["ok"] is True
    assert [peer["port"] for peer in report["peers"]] == [port, port + 1, port + 2]
    assert report["app"] == {
        "name": "chat:app",
        "handlers": ["CHAT"],
        "coroutine_handlers": ["ASK"],
        "batch_handlers": ["METRIC"],
    }
    assert not list(tmp_path.glob("**/*.sock"))


def test_check_names_the_source_of_each_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "peerd.toml"
    config.write_text(
        'ttl = 7\nadvertise = "from-file"\npin = "auto"\noffload = false\nhost = "x"\n'
    )
    monkeypatch.setenv("PEERD_ADVERTISE", "from-environment")
    monkeypatch.setenv("PEERD_SUPERVISE_MAX_RSS", "1G")
    monkeypatch.setenv("PEERD_MAX_RSS", "2G")  # the more specific one wins
    monkeypatch.setenv("PEERD_CHECK_PEERS", "3")  # no setting of supervise
    monkeypatch.setenv("PEERD_SUPERVISE_HOST", "")  # set to nothing is not set
    port = free_ports()
    found = origins(checked(f"--config={config}", f"--base-port={port}", "--host=localhost"))
    assert found == {
        "base-port": (str(port), "--base-port"),
        "host": ("localhost", "--host"),
        "advertise": ("from-environment", "PEERD_ADVERTISE"),
        "etcd": ("http://127.0.0.1:9", "--etcd"),
        "ttl": ("7", str(config)),
        "pin": ("auto", str(config)),
        "offload": ("false", str(config)),
        "max-rss": (str(1 << 30), "PEERD_SUPERVISE_MAX_RSS"),
        "config": (str(config), "--config"),
    }


def test_a_taken_port_is_73_and_its_holder_is_named(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_ready()
    report = checked(
        "--peers=2", f"--base-port={running.base_port}", f"--control={running.control}", code=73
    )
    assert [problem["exit_code"] for problem in report["problems"]] == [73]
    shown = peerd("check", NO_ETCD, f"--base-port={running.base_port}")
    assert ", supervise would not run: 1 peer on localhost" in shown.stdout
    assert f"held by pid {running.pid}" in report["problems"][0]["text"]
    assert any(f"supervisor pid {running.pid} answers at" in text for text in report["warnings"])
    assert all(peer["state"] == "ready" for peer in running.status()["peers"])


def test_one_problem_does_not_hide_another(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        metrics = f"--metrics=127.0.0.1:{holder.getsockname()[1]}"
        done = peerd(
            "check",
            NO_ETCD,
            metrics,
            "--app=broken:app",
            f"--base-port={free_ports()}",
            cwd=tmp_path,
        )
    assert done.returncode == 73
    assert f"held by pid {os.getpid()}" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert done.stderr.count("Traceback") == 1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("1 / 0\n", "broken.py"),
        ("import os\nos._exit(3)\n", "importing it ended the process: exit code 3"),
        ("import os\nos.kill(os.getpid(), 9)\n", "killed by SIGKILL"),
        ("import time\ntime.sleep(600)\n", "did not load within --boot-timeout, 0.5 s"),
        ("app = 1\n", "not a peerd.App"),
        (
            "import subprocess, time\nsubprocess.Popen(['sleep', '600'])\n1 / 0\n",
            "ZeroDivisionError",
        ),
    ],
)
def test_an_app_that_cannot_be_loaded_is_78(tmp_path: Path, source: str, text: str) -> None:
    (tmp_path / "broken.py").write_text(source)
    timeout = "--boot-timeout=0.5" if "sleep(600)" in source else "--boot-timeout=30"
    port = f"--base-port={free_ports()}"
    done = peerd("check", NO_ETCD, "--app=broken:app", timeout, port, cwd=tmp_path)
    assert done.returncode == 78
    assert text in done.stderr
    assert done.stderr.count("Traceback") <= 1


def test_an_unreachable_etcd_is_a_warning() -> None:
    report = checked(f"--base-port={free_ports()}")
    assert report["registry"]["records"] is None
    assert "http://127.0.0.1:9 does not answer" in report["warnings"][0]


def test_a_control_socket_that_cannot_be_created_is_a_warning(tmp_path: Path) -> None:
    port = f"--base-port={free_ports()}"
    (tmp_path / "file").write_text("")
    for place, why in (
        (tmp_path / "file", "exists and is not a socket"),
        (tmp_path / "no" / "such" / "c.sock", "is not a folder"),
        (Path("/proc/peerd.sock"), "is not writable"),
    ):
        if why == "is not writable" and os.access(place.parent, os.W_OK):
            continue  # access() allows root everything, but no file can be created in /proc
        (warning,) = [
            text
            for text in checked(port, f"--control={place}")["warnings"]
            if "'peerd status' would not work with this control socket" in text
        ]
        assert why in warning
    assert len(checked(port, f"--control={tmp_path / 'new' / 'c.sock'}")["warnings"]) == 1


def test_check_says_that_supervise_would_start_an_etcd() -> None:
    from peerd.registry import embedded_etcd
    from peerd.settings import DEFAULT_ENDPOINT

    if embedded_etcd.is_listening(DEFAULT_ENDPOINT):
        pytest.skip(f"this machine has an etcd at {DEFAULT_ENDPOINT}")
    done = peerd("check", f"--base-port={free_ports()}")
    assert done.returncode == 0
    assert f"peerd would start an etcd at {DEFAULT_ENDPOINT}" in done.stdout
    assert not embedded_etcd.is_listening(DEFAULT_ENDPOINT)


@pytest.mark.parametrize(
    ("toml", "texts"),
    [
        ("peer = 8\n", ["unknown setting 'peer': did you mean 'peers'?"]),
        ("xyz = 8\n", ["unknown setting 'xyz'\n", ": known settings: advertise, app, base-port"]),
        ('peers = "8"\n', ["peers is an integer, not a string: '8'"]),
        ("peers = 8.5\n", ["peers is an integer, not a float: 8.5"]),
        ("peers = true\n", ["peers is an integer, not a boolean: true"]),
        ("host = 8\n", ["host is a string, not an integer: 8"]),
        ("[etcd]\nurl = 1\n", ["etcd is a string, not a table"]),
        ('offload = "yes"\n', ["offload is true or false, not a string: 'yes'"]),
        ('stop-timeout = "1"\n', ["stop-timeout is a number, not a string"]),
        ("app = 2020-01-01\n", ["app is a string, not a date or time"]),
        ('max-rss = "64X"\n', ["max-rss: '64X': write bytes, or a size such as 64M or 1G"]),
        ('log-level = "loud"\n', ["log-level: 'loud' is not one of 'debug', 'info'"]),
        ("stop-timeout = nan\n", ["stop-timeout: 'nan' is not a number of seconds"]),
        ("peers = \n", ["Invalid value (at line 1, column 9)"]),
        ("config = 'x'\n", ["unknown setting 'config'"]),
        ("peers = 0\n", ["--peers 0: give a number from 1", "peers is from "]),
        ("ttl = 1\n", ["lease TTL 1 s", "ttl is from "]),
        ('prefix = "x/"\n', ["prefix 'x/'", "prefix is from "]),
        ('etcd-ca = "/nope"\n', ["--etcd-ca /nope: No such file", "etcd-ca is from "]),
        ('etcd-password-file = "/nope"\n', ["/nope: No such file", "etcd-password-file is from "]),
        ("drain-timeout = 0\n", ["drain-timeout: 0.0 is not in the range x>0"]),
        ("max-age = 0.5\n", ["--max-age 0.5: give 1 seconds or more", "max-age is from "]),
        # Every problem of the file is reported.
        ('peer = 1\nttl = "x"\n', ["'peers'?", "ttl is an integer, not a string"]),
    ],
)
def test_a_bad_file_is_78(tmp_path: Path, toml: str, texts: list[str]) -> None:
    config = tmp_path / "peerd.toml"
    config.write_text(toml)
    error = refused(f"--config={config}", code=78)
    assert str(config) in error
    for text in texts:
        assert text in error


@pytest.mark.parametrize("value", ["foo", ""])
def test_the_source_of_a_bad_endpoint_is_named(
    tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "peerd.toml"
    config.write_text(f'etcd = "{value}"\n')
    for command in (["check"], ["supervise"], ["systemd-unit", "--"]):
        in_file = peerd(*command, f"--config={config}")
        assert in_file.returncode == 78
        assert f"etcd endpoint '{value}'" in in_file.stderr
        assert f"(etcd is from {config})" in in_file.stderr
        assert peerd(*command, f"--etcd={value}").returncode == 2
    monkeypatch.setenv("PEERD_ETCD", "foo")
    assert "(etcd is from PEERD_ETCD)" in peerd("check").stderr


def test_known_settings_are_listed_once(tmp_path: Path) -> None:
    config = tmp_path / "peerd.toml"
    config.write_text("xyz = 1\nabc = 2\n")
    assert refused(f"--config={config}", code=78).count("partition-key") == 1


def test_a_valid_file(tmp_path: Path) -> None:
    config = tmp_path / "peerd.toml"
    port = free_ports(2)
    config.write_text(
        f'peers = 2\nbase_port = {port}\nrecv-buffer = "1M"\nmax-age = 60\nmax-rss = 67108864\n'
        'stop-timeout = 2.5\nmetrics = "127.0.0.1:0"\nlog-format = "json"\non-crashloop = "exit"\n'
    )
    refusal = refused(f"--config={config}", code=78)
    assert "metrics: '127.0.0.1:0': a port is a number from 1 to 65535" in refusal
    config.write_text(config.read_text().replace('"127.0.0.1:0"', f'"127.0.0.1:{port}"'))
    found = origins(checked(f"--config={config}"))
    assert found["recv-buffer"] == (str(1 << 20), str(config))
    assert found["base-port"] == (str(port), str(config))
    assert found["metrics"] == (f"127.0.0.1:{port}", str(config))


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("PEERD_PEERS", "x", "'x' is not a valid integer (from PEERD_PEERS)"),
        (
            "PEERD_SUPERVISE_PEERS",
            "0",
            "--peers 0: give a number from 1 to 4096 (peers is from PEERD_",
        ),
        ("PEERD_PIN", "yes", "(from PEERD_PIN)"),
        ("PEERD_TTL", "1", "(ttl is from PEERD_TTL)"),
        ("PEERD_OFFLOAD", "x", "Recognized values: 0, 1,"),
    ],
)
def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert text in refused(code=2)


def test_a_misspelt_variable_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hints = {
        "PEERD_PEER": "did you mean PEERD_PEERS?",
        "PEERD_SUPERVISE_PERS": "did you mean PEERD_SUPERVISE_PEERS?",
        "PEERD_SUPERVISE_COLOUR": "'peerd supervise --help'",
        "PEERD_ETCD_PASWORD_FILE": "did you mean PEERD_ETCD_PASSWORD_FILE?",
    }
    for variable in hints:
        monkeypatch.setenv(variable, "8")
    warnings = checked(f"--base-port={free_ports()}")["warnings"]
    for variable, hint in hints.items():
        (line,) = [line for line in warnings if f"{variable} is" in line]
        assert f"{variable} is not a setting: {hint}" in line


def test_other_variables_get_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (
        "PEERD_PREFIX",
        "PEERD_ETCD_PASSWORD",
        "PEERD_LONG_TESTS",
        "PEERD_REQUIRE_ETCD_34",
        "PEERD_DEBUG",
        # Set by Kubernetes for a service called peerd.
        "PEERD_SERVICE_HOST",
        "PEERD_SERVICE_PORT",
        "PEERD_PORT",
        "PEERD_PORT_5001_UDP_ADDR",
    ):
        monkeypatch.setenv(variable, "1")
    warnings = checked(f"--base-port={free_ports()}")["warnings"]
    assert not [line for line in warnings if "PEERD_" in line]


@pytest.mark.parametrize(
    ("size", "in_bytes"),
    [
        ("67108864", 64 << 20),
        ("64M", 64 << 20),
        ("1g", 1 << 30),
        ("0.5GiB", 512 << 20),
        ("65536K", 64 << 20),
    ],
)
def test_valid_sizes(size: str, in_bytes: int) -> None:
    found = origins(checked(f"--max-rss={size}", f"--base-port={free_ports()}"))
    assert found["max-rss"] == (str(in_bytes), "--max-rss")


@pytest.mark.parametrize("size", ["64X", "", "-1", "M", "1e9", "9" * 50])
def test_invalid_sizes(size: str) -> None:
    assert "write bytes, or a size such as" in refused(f"--max-rss={size}", code=2)


def test_a_misspelt_variable_is_logged_by_supervise(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEERD_PEER", "8")
    running = supervised.start(peers=1).wait_ready()
    assert running.err.count("did you mean PEERD_PEERS?") == 1
