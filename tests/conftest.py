"""Fixtures of all tests, among them the guard that fails tests which leave something behind."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from harness.leak_guard import LeakGuard
from harness.ports import free_ports
from harness.supervised import Supervised
from peerd.registry.embedded_etcd import EmbeddedEtcd

# The timing of examples depends on what else the machine does.
hypothesis.settings.register_profile("peerd", deadline=None)
hypothesis.settings.load_profile("peerd")

_GUARD = pytest.StashKey[LeakGuard]()
_HAS_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("leak_patience_s", "time that leftovers of a test have to go away", default="20")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_HAS_FAILED] = True
    return report


class WiderFixtures:
    """A plugin, because pytest calls no hook of tests/conftest.py for fixtures of the session."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Do not count what a fixture of a wider scope sets up as a leak of the first test that uses it."""
        guard = request.config.stash.get(_GUARD, None)
        if fixturedef.scope == "function" or guard is None:
            return (yield)
        with guard.granting():
            return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Give every process that a test starts the default signals, however the tests were started.

    nohup, and a script that starts the tests in the background, have them ignore signals. The test process
    still ignores these, but by a handler that does nothing, which its children do not inherit.
    """
    config.pluginmanager.register(WiderFixtures())
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def leak_guard(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LeakGuard]:
    guard = LeakGuard(
        tmp_path_factory.mktemp("guard"), float(request.config.getini("leak_patience_s"))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(guard.temporary))
        patch.setattr(tempfile, "tempdir", str(guard.temporary))
        patch.setenv("XDG_RUNTIME_DIR", str(guard.runtime))
        request.config.stash[_GUARD] = guard
        yield guard
        del request.config.stash[_GUARD]


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest, leak_guard: LeakGuard) -> Iterator[None]:
    """Fails a test that leaves a process, a thread, a descriptor or a file behind."""
    yield
    # The traceback of a failed test keeps its objects alive; its failure is report enough.
    has_failed = request.node.stash.get(_HAS_FAILED, False)
    left = leak_guard.leftovers(wait=not has_failed)
    if left and not has_failed:
        pytest.fail(f"left behind: {'; '.join(left)}", pytrace=False)


@pytest.fixture(scope="session")
def etcd() -> Iterator[str]:
    """The endpoint of a running etcd. Its tests use different key prefixes."""
    with EmbeddedEtcd(free_ports()) as etcd:
        yield etcd.endpoint


@pytest.fixture
def supervised(tmp_path: Path, etcd: str) -> Iterator[Supervised]:
    """A way to run ``peerd supervise``; what still runs at the end of the test is killed."""
    runner = Supervised(tmp_path, etcd)
    yield runner
    runner.kill_all()
