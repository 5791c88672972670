"""Fixtures of all tests, and the guard that each test cleans up after itself."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from harness.etcd_fixture import shared_etcd
from harness.leak_guard import LeakGuard
from harness.supervised import Supervised

# The timing of examples depends on what else the machine does.
hypothesis.settings.register_profile("peerd", deadline=None)
hypothesis.settings.load_profile("peerd")

etcd = shared_etcd
_GUARD = pytest.StashKey[LeakGuard]()
_HAS_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "leak_patience_s", "time for what a test leaves to go away by itself", default="20"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_HAS_FAILED] = True
    return report


class WiderFixtures:
    """A plugin, because pytest asks no conftest.py below its root about fixtures of the session."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """What a fixture of a wider scope sets up is no leak of the test that needs it first."""
        guard = request.config.stash.get(_GUARD, None)
        if fixturedef.scope == "function" or guard is None:
            return (yield)
        with guard.granting():
            return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Lets every process that a test starts begin with default signals, however the tests were started.

    Signals that are ignored, as nohup and background jobs of a script have them, stay so for the tests
    themselves: a handler that does nothing is not inherited.
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


@pytest.fixture
def supervised(tmp_path: Path, etcd: str) -> Iterator[Supervised]:
    """A way to run ``peerd supervise``; what still runs at the end of the test is killed."""
    runner = Supervised(tmp_path, etcd)
    yield runner
    runner.kill_all()
