"""The unit that ``peerd systemd-unit`` prints, and the options that it rejects."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.command import peerd


def systemd_unit(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return peerd("systemd-unit", *args, cwd=cwd)


def values(unit: str, name: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{name}=")]


def test_the_unit(tmp_path: Path) -> None:
    options = ["--peers", "8", "--base-port", "5001", "--app", "chat:app", "--stop-timeout", "20"]
    done = systemd_unit("--", *options, cwd=tmp_path)
    assert done.returncode == 0
    (command,) = values(done.stdout, "ExecStart")
    start = [sys.executable, "-m", "peerd", "supervise"]
    assert shlex.split(command) == [*start, *options, "--control=/run/peerd/5001.sock"]
    assert values(done.stdout, "Type")[-1] == "notify-reload"
    assert values(done.stdout, "WorkingDirectory") == [str(tmp_path)]
    assert int(values(done.stdout, "TimeoutStopSec")[0]) > 20
    assert int(values(done.stdout, "FileDescriptorStoreMax")[0]) > 8
    assert values(done.stdout, "DynamicUser") == ["yes"]
    assert values(done.stdout, "CapabilityBoundingSet") == [""]
    assert values(done.stdout, "RestartPreventExitStatus") == ["2 78"]


def test_the_unit_has_the_path_of_the_console_script() -> None:
    script = Path(sys.executable).with_name("peerd")
    done = subprocess.run(
        [script, "systemd-unit"], capture_output=True, text=True, timeout=30, check=True
    )
    assert values(done.stdout, "ExecStart") == [
        f"{script} supervise --control=/run/peerd/5001.sock"
    ]
    assert values(done.stdout, "WorkingDirectory") == []


def test_a_user_and_a_port_below_1024(tmp_path: Path) -> None:
    done = systemd_unit(
        "--user=peerd", f"--working-directory={tmp_path}", "--", "--base-port", "53"
    )
    assert done.returncode == 0
    assert not done.stderr
    assert values(done.stdout, "User") == ["peerd"]
    assert values(done.stdout, "DynamicUser") == []
    assert values(done.stdout, "WorkingDirectory") == [str(tmp_path)]
    assert values(done.stdout, "CapabilityBoundingSet") == ["CAP_NET_BIND_SERVICE"]
    assert values(done.stdout, "AmbientCapabilities") == ["CAP_NET_BIND_SERVICE"]


def test_arguments_are_quoted() -> None:
    done = systemd_unit("--", "--partition-key", 'a "b" $HOME 100% \\', "--prefix", "$x")
    (command,) = values(done.stdout, "ExecStart")
    assert r'''--partition-key "a \"b\" $$HOME 100%% \\" --prefix "$$x"''' in command


def test_the_unit_has_the_variables_but_not_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERD_ETCD", "http://etcd.example:2379")
    monkeypatch.setenv("PEERD_SUPERVISE_PEERS", "4")
    monkeypatch.setenv("PEERD_ETCD_PASSWORD", "secret")
    done = systemd_unit("--", "--etcd-user=me")
    assert done.returncode == 0
    assert sorted(values(done.stdout, "Environment")) == [
        "PEERD_ETCD=http://etcd.example:2379",
        "PEERD_SUPERVISE_PEERS=4",
    ]
    assert "4 peers" in values(done.stdout, "Description")[0]
    assert values(done.stdout, "EnvironmentFile") == ["/etc/peerd.env"]
    assert "secret" not in done.stdout


def test_a_config_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "peerd.toml").write_text("peers = 100\n")
    done = systemd_unit("--", "--config", "peerd.toml", cwd=tmp_path)
    assert values(done.stdout, "WorkingDirectory") == [str(tmp_path)]
    assert int(values(done.stdout, "FileDescriptorStoreMax")[0]) > 100
    (tmp_path / "peerd.toml").write_text("peers = 0\n")
    bad = systemd_unit("--", "--config", "peerd.toml", cwd=tmp_path)
    assert bad.returncode == 78
    assert "(peers is from peerd.toml)" in bad.stderr


def test_a_misspelt_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERD_SUPERVISE_FOO", "1")
    done = systemd_unit()
    assert done.returncode == 0
    assert "PEERD_SUPERVISE_FOO is not a setting" in done.stderr


def test_an_interpreter_in_a_home_is_readable() -> None:
    """The venv links to the interpreter, and those of pyenv and uv are in a home."""
    homes = [Path("/home"), Path("/root")]
    used = [Path(sys.executable).resolve(), Path(sys.base_prefix), Path(sys.argv[0]).resolve()]
    in_home = any(path.is_relative_to(home) for path in used for home in homes)
    assert values(systemd_unit(cwd=Path("/")).stdout, "ProtectHome") == [
        "read-only" if in_home else "yes"
    ]


def test_the_place_of_the_control_socket() -> None:
    private = systemd_unit("--", "--control", "/tmp/x/c.sock")
    assert "--control /tmp/x/c.sock would be in the service's own /tmp" in private.stderr
    done = systemd_unit("--", "--control", "/srv/peerd/c.sock")
    assert values(done.stdout, "ReadWritePaths") == ["/srv/peerd"]
    assert values(done.stdout, "ExecStart")[0].endswith("--control /srv/peerd/c.sock")


def test_a_directory_that_the_service_cannot_read_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert str(tmp_path) in systemd_unit("--app=chat:app", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--peerz", "8"], 2, "--peers"),
        (["--peers", "eight"], 2, "'eight'"),
        (["--peers", "0"], 2, "--peers 0"),
        (["--ttl", "1"], 2, "lease TTL"),
        (["--base-port", "65535", "--peers", "2"], 2, "past 65535"),
        (["--config", "/no/such.toml"], 78, "/no/such.toml"),
        (["supervise"], 2, "supervise"),
        (["--linger", "99999999"], 2, "--linger"),
        (["--max-rss", "1"], 2, "--max-rss"),
        (["--drain-timeout", "0"], 2, "--drain-timeout"),
    ],
)
def test_bad_options_are_rejected(options: list[str], code: int, message: str) -> None:
    done = systemd_unit("--", *options)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
