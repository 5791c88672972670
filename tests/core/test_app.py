from pathlib import Path

import pytest

from peerd import App, AppLoadError, Message
from peerd.serving.app import load_app


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module file in the current directory; its name is unique to the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / f"app_of_{tmp_path.name.replace('-', '_')}.py"


def test_handlers_by_magic_code() -> None:
    app = App()

    @app.handler("A")
    def one(message: Message) -> bytes:
        return message.body

    @app.batch_handler("B")
    def many(messages: list[Message]) -> None: ...

    assert app.handlers == {"A": one}
    assert app.batch_handlers == {"B": many}


@pytest.mark.parametrize("magic", ["", "é", "x" * 256])
def test_a_magic_code_that_cannot_be_sent_is_refused(magic: str) -> None:
    with pytest.raises(ValueError, match="1 to 255 ASCII"):
        App().handler(magic)(lambda message: None)


def test_a_magic_code_has_one_handler() -> None:
    app = App()
    app.handler("A")(lambda message: None)
    with pytest.raises(ValueError, match="has a handler already"):
        app.batch_handler("A")(lambda messages: None)


def test_a_coroutine_function_handles_messages_but_no_batches() -> None:
    app = App()

    @app.handler("A")
    async def handler(message: Message) -> bytes:
        return b""

    assert app.coroutine_handlers == {"A": handler}
    assert not app.handlers

    async def batch(messages: list[Message]) -> None: ...

    with pytest.raises(TypeError, match="coroutine"):
        app.batch_handler("B")(batch)  # type: ignore[type-var]


def test_limits_are_for_async_handlers() -> None:
    app = App()

    @app.handler("A", timeout=2, max_waiting=3)
    async def limited(message: Message) -> None: ...

    assert (app.timeouts_s, app.max_waiting) == ({"A": 2}, {"A": 3})
    with pytest.raises(TypeError, match="async"):
        app.handler("B", timeout=1.0)(lambda message: None)
    with pytest.raises(TypeError, match="async"):
        app.handler("B", max_waiting=1)(lambda message: None)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_a_positive_number(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout of 'A'"):
        App().handler("A", timeout=timeout)


@pytest.mark.parametrize("max_waiting", [0, -1, 1.5])
def test_max_waiting_is_a_positive_integer(max_waiting: int) -> None:
    with pytest.raises(ValueError, match="max_waiting of 'A'"):
        App().handler("A", max_waiting=max_waiting)


def test_the_built_in_app() -> None:
    handlers = load_app(None).handlers
    assert handlers["PING"](Message("PING", "2", b"x")) == Message("PONG", "2", b"x")
    assert handlers["ECHO"](Message("ECHO", "2", b"x")) == b"x"


def test_an_app_is_loaded_by_name(module: Path) -> None:
    module.write_text("import peerd\napp = peerd.App()\nclass Nested:\n    inner = app\n")
    assert load_app(f"{module.stem}:app") is load_app(f"{module.stem}:Nested.inner")


@pytest.mark.parametrize("name", ["chat", "chat:", ":app", ""])
def test_a_name_of_the_wrong_form(name: str) -> None:
    with pytest.raises(AppLoadError, match="module:attr"):
        load_app(name)


def test_a_missing_module() -> None:
    with pytest.raises(AppLoadError, match="there is no module 'no_such_module'"):
        load_app("no_such_module:app")


@pytest.mark.parametrize(
    ("source", "text", "cause"),
    [
        ("import peerd\nchat = peerd.App()\n", "has no attribute 'app'; it has chat", None),
        ("app = 3\n", "is a int, not a peerd", None),
        ("1 / 0\n", "ZeroDivisionError", ZeroDivisionError),
        ("import no_such_dependency\n", "importing '{module}' failed", ModuleNotFoundError),
    ],
    ids=["no such attribute", "no app", "an error", "a missing import"],
)
def test_a_module_without_the_app(
    module: Path, source: str, text: str, cause: type[Exception] | None
) -> None:
    module.write_text(source)
    with pytest.raises(AppLoadError, match=text.format(module=module.stem)) as caught:
        load_app(f"{module.stem}:app")
    assert isinstance(caught.value.__cause__, cause or type(None))
