"""Imports etcd3 0.12.0, whatever protobuf is installed.

Its message modules (``etcd3/etcdrpc/{kv,auth,rpc}_pb2.py``) were generated for protobuf 3: they build
their descriptors one by one, which protobuf 4 and newer refuse ("Descriptors cannot be created
directly"). A pin below 4 would break our users' environments, and generated code of our own would
have to be kept in step. But each of the three files also holds its whole descriptor as a literal, the
``serialized_pb`` that protoc wrote. So the literals are read out of the source with ``ast`` (the files
are found, not imported), they make up a private pool of descriptors, today's ``message_factory``
builds the classes from it, and modules with these classes stand in ``sys.modules`` under the three
names before etcd3 asks for them.

The pool is private because the default one holds each file name once in a process, and "kv.proto" and
"rpc.proto" are names that somebody else may have. Where protobuf still lets etcd3 build its
descriptors (version 3, or the pure-Python implementation), or where etcd3 was imported already,
nothing is touched.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from google.protobuf import descriptor, descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper

_PACKAGE = "etcd3.etcdrpc"
_SERIALIZED = re.compile(r"""serialized_pb=_b\(('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\)""")
_NAMES = ("kv_pb2", "auth_pb2", "rpc_pb2")  # rpc.proto imports the other two


def import_etcd3() -> ModuleType:
    """The module ``etcd3``. Raises ImportError where it is not installed."""
    if "etcd3" in sys.modules:
        return sys.modules["etcd3"]
    with warnings.catch_warnings():
        # protobuf 3.20 lets the old modules build their descriptors and scolds each time.
        warnings.filterwarnings("ignore", "Call to deprecated create function", DeprecationWarning)
        modules = {} if _old_modules_work() else _message_modules()
        sys.modules.update(modules)
        etcd3 = importlib.import_module("etcd3")
    for name, module in modules.items():  # what importing a submodule does for its package
        setattr(etcd3.etcdrpc, name.rpartition(".")[2], module)
    return etcd3


def _old_modules_work() -> bool:
    """Tries what they do. By version alone one would miss protobuf's pure-Python implementation."""
    try:
        descriptor.EnumValueDescriptor(name="probe", index=0, number=0)
    except TypeError:
        return False
    return True


def _message_modules() -> dict[str, ModuleType]:
    spec = importlib.util.find_spec("etcd3")
    if spec is None or not spec.submodule_search_locations:
        return {}
    # Not find_spec("etcd3.etcdrpc"): that would import etcd3 to ask it.
    directory = Path(spec.submodule_search_locations[0], "etcdrpc")
    # Added as a message, not as bytes: then fields that came after etcd 3.3 can be put in first.
    pool = descriptor_pool.DescriptorPool()
    modules = {}
    for name in _NAMES:
        path = directory / f"{name}.py"
        file = descriptor_pb2.FileDescriptorProto.FromString(_serialized_file(path))
        pool.Add(file)
        module = ModuleType(f"{_PACKAGE}.{name}", __doc__)
        module.__file__ = str(path)
        module.__dict__.update(_members(pool.FindFileByName(file.name)))
        modules[module.__name__] = module
    return modules


def _serialized_file(path: Path) -> bytes:
    """The literal in ``serialized_pb=_b('...')``, where ``_b`` encodes as latin-1.

    Only the literal is parsed: the tree of the whole file would leave 4 MiB in the heap.
    """
    found = _SERIALIZED.search(path.read_text())
    text = ast.literal_eval(found[1]) if found else None
    if isinstance(text, str):
        return text.encode("latin-1")
    raise ImportError(f"{path} is not the file of etcd3 0.12.0: install etcd3==0.12.0")


def _members(file: Any) -> Iterator[tuple[str, Any]]:
    """What protoc's module has at its top. Nested messages and enums hang on their classes."""
    yield "DESCRIPTOR", file
    factory: Any = message_factory
    if hasattr(factory, "GetMessageClass"):
        class_of = factory.GetMessageClass
    else:  # protobuf 4.21
        class_of = factory.MessageFactory(file.pool).GetPrototype
    for name, message in file.message_types_by_name.items():
        yield name, class_of(message)
    for name, enum in file.enum_types_by_name.items():
        yield name, enum_type_wrapper.EnumTypeWrapper(enum)
        yield from ((value.name, value.number) for value in enum.values)
