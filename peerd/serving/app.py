"""What a user writes: an App, which is a table from magic code to handler."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

from peerd._envelope import Message, Reply
from peerd.errors import AppLoadError

Handler = Callable[[Message], Reply]
CoroutineHandler = Callable[[Message], Coroutine[Any, Any, Reply]]
BatchHandler = Callable[[list[Message]], None]

HandlerT = TypeVar("HandlerT", bound=Handler | CoroutineHandler)
BatchHandlerT = TypeVar("BatchHandlerT", bound=BatchHandler)

# The envelope allows 2 GiB; a magic code is a word.
MAX_MAGIC_BYTES = 255


class App:
    """Handlers by magic code.

    A handler runs in the worker's only thread: while it runs, its peer receives nothing (datagrams
    wait in the kernel's buffer). So it should not block, or be an ``async def`` and await: an app
    that has one runs on an event loop (uvloop's when it is installed), and others are served
    meanwhile. What a handler raises is counted and logged, the message gets no reply, and the peer
    goes on.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._coroutine_handlers: dict[str, CoroutineHandler] = {}
        self._batch_handlers: dict[str, BatchHandler] = {}

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """The plain handlers by magic code."""
        return MappingProxyType(self._handlers)

    @property
    def coroutine_handlers(self) -> Mapping[str, CoroutineHandler]:
        """The ``async def`` handlers by magic code."""
        return MappingProxyType(self._coroutine_handlers)

    @property
    def batch_handlers(self) -> Mapping[str, BatchHandler]:
        """The batch handlers by magic code."""
        return MappingProxyType(self._batch_handlers)

    def handler(self, magic: str) -> Callable[[HandlerT], HandlerT]:
        """Register a function, or a coroutine function, that is called once a message.

        It returns bytes (the body of a reply with the same magic and version), a Message (a reply
        of its own) or None (no reply). Raises ValueError when the magic is not 1 to 255 ASCII
        characters or has a handler already, TypeError for what cannot be called.
        """

        def register(function: HandlerT) -> HandlerT:
            self._check(magic, function)
            if inspect.iscoroutinefunction(function):
                self._coroutine_handlers[magic] = function
            else:
                self._handlers[magic] = cast(Handler, function)
            return function

        return register

    def batch_handler(self, magic: str) -> Callable[[BatchHandlerT], BatchHandlerT]:
        """Register a function that is called once a wake-up with all messages of it; no replies.

        Raises as :meth:`handler` does, and TypeError for a coroutine function.
        """

        def register(function: BatchHandlerT) -> BatchHandlerT:
            self._check(magic, function)
            if inspect.iscoroutinefunction(function):
                raise TypeError(f"the batch handler of {magic!r} cannot be a coroutine function")
            self._batch_handlers[magic] = function
            return function

        return register

    def _check(self, magic: str, function: object) -> None:
        if not (magic.isascii() and 1 <= len(magic) <= MAX_MAGIC_BYTES):
            raise ValueError(
                f"a magic code is 1 to {MAX_MAGIC_BYTES} ASCII characters, not {magic!r}"
            )
        taken = (self._handlers, self._coroutine_handlers, self._batch_handlers)
        if any(magic in handlers for handlers in taken):
            raise ValueError(f"magic code {magic!r} has a handler already")
        if not callable(function):
            raise TypeError(f"the handler of {magic!r} is not callable: {function!r}")


def builtin_app() -> App:
    """The app that runs when no other is named: PING is answered with PONG, ECHO with ECHO."""
    app = App()

    @app.handler("PING")
    def ping(message: Message) -> Message:
        return Message("PONG", message.version, message.body)

    @app.handler("ECHO")
    def echo(message: Message) -> bytes:
        return message.body

    return app


def load_app(name: str | None) -> App:
    """The App that ``module:attr`` names (modules of the current directory included), or the built-in.

    Raises AppLoadError that says which half failed. An error raised inside the module while it is
    imported is its ``__cause__``, with the traceback.
    """
    if name is None:
        return builtin_app()
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise AppLoadError(f"app {name!r} is not of the form module:attr, for example chat:app")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise AppLoadError(
                f"app {name!r}: there is no module {missing!r} in {here} or on sys.path"
            ) from None
        raise AppLoadError(f"app {name!r}: importing {module_name!r} failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise AppLoadError(
            f"app {name!r}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    app: object = module
    for part in attribute.split("."):
        try:
            app = getattr(app, part)
        except AttributeError:
            apps = [key for key, value in vars(module).items() if isinstance(value, App)]
            hint = f"; it has {', '.join(apps)}" if apps else "; it has no App at all"
            raise AppLoadError(
                f"app {name!r}: module {module_name!r} has no attribute {attribute!r}{hint}"
            ) from None
    if not isinstance(app, App):
        raise AppLoadError(
            f"app {name!r}: {attribute!r} is a {type(app).__name__}, not a peerd.App"
        )
    return app
