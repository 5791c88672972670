"""The App that a user writes: a table of handlers by magic code."""

from __future__ import annotations

import importlib
import inspect
import math
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

MAX_MAGIC_BYTES = 255  # the envelope allows 2 GiB


class App:
    """Handlers by magic code.

    A handler runs in the worker's only thread. While it runs, its peer receives nothing, and
    datagrams wait in the kernel's buffer. A handler that has to wait should be an ``async def``: its
    app runs on an event loop (uvloop's if that is installed), and the peer serves other messages
    while the handler waits. If a handler raises, the error is counted and logged, the message gets
    no reply, and the peer continues.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._coroutine_handlers: dict[str, CoroutineHandler] = {}
        self._batch_handlers: dict[str, BatchHandler] = {}
        self._timeouts_s: dict[str, float] = {}
        self._max_waiting: dict[str, int] = {}

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

    @property
    def timeouts_s(self) -> Mapping[str, float]:
        """The ``timeout`` of the handlers that have one, by magic code."""
        return MappingProxyType(self._timeouts_s)

    @property
    def max_waiting(self) -> Mapping[str, int]:
        """The ``max_waiting`` of the handlers that have one, by magic code."""
        return MappingProxyType(self._max_waiting)

    def handler(
        self, magic: str, *, timeout: float | None = None, max_waiting: int | None = None
    ) -> Callable[[HandlerT], HandlerT]:
        """Register a function, or a coroutine function, that is called once per message.

        It returns bytes (the body of a reply with the same magic code and version), a Message (a
        reply as it is) or None (no reply).

        Of an ``async def`` handler, ``timeout`` limits the seconds that it may wait for one message:
        then it is cancelled, and a TimeoutError is counted and logged as if the handler had raised
        it. ``max_waiting`` limits the messages for which it waits at a time: further ones are
        dropped, counted and logged. Over all handlers, a worker stops reading at 10,000.

        Raises ValueError when the magic code is not 1 to 255 ASCII characters or has a handler
        already, or when a limit is not positive. Raises TypeError when the object is not callable,
        and for a limit of a plain function.
        """
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"the timeout of {magic!r} must be a positive number, not {timeout!r}")
        if max_waiting is not None and not 0 < int(max_waiting) == max_waiting:
            raise ValueError(
                f"max_waiting of {magic!r} must be a positive integer, not {max_waiting!r}"
            )

        def register(function: HandlerT) -> HandlerT:
            self._check(magic, function)
            if inspect.iscoroutinefunction(function):
                self._coroutine_handlers[magic] = function
                if timeout is not None:
                    self._timeouts_s[magic] = timeout
                if max_waiting is not None:
                    self._max_waiting[magic] = int(max_waiting)
            elif timeout is not None or max_waiting is not None:
                raise TypeError(
                    f"the handler of {magic!r} is a plain function, which cannot be interrupted: "
                    "timeout and max_waiting are for async handlers"
                )
            else:
                self._handlers[magic] = cast(Handler, function)
            return function

        return register

    def batch_handler(self, magic: str) -> Callable[[BatchHandlerT], BatchHandlerT]:
        """Register a function that is called once per wake-up with all its messages; no replies.

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
    """The app that runs without ``--app``: PING is answered with PONG, ECHO with ECHO."""
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

    Raises AppLoadError, which names the half that failed. Its ``__cause__`` is the error that the
    module raised while it was imported, if any.
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
