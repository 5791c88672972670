"""Imports etcd3 0.12.0 with any version of protobuf.

Its message modules (``etcd3/etcdrpc/{kv,auth,rpc}_pb2.py``) were generated for protobuf 3: they build their
descriptors one by one, which protobuf 4 and newer refuse ("Descriptors cannot be created directly"). A pin
below 4 would break our users' environments, and generated code in this project would have to be kept in
step. But each of the three files also contains its complete descriptor as a literal, the ``serialized_pb``
that protoc wrote. So the literals are read from the source with ``ast`` (the files are located, not
imported), a private pool is filled with their descriptors, today's ``message_factory`` builds the classes,
and modules with these classes are placed in ``sys.modules`` under the three names before etcd3 imports them.

The pool is private because the default pool accepts each file name only once per process, and another
package may have a "kv.proto" or "rpc.proto" as well. If protobuf still lets etcd3 build its descriptors
(version 3, or the pure-Python implementation), or if etcd3 has been imported already, nothing is changed.
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
        # protobuf 3.20 lets the old modules build their descriptors, with a warning for each.
        warnings.filterwarnings("ignore", "Call to deprecated create function", DeprecationWarning)
        modules = {} if _old_modules_work() else _message_modules()
        sys.modules.update(modules)
        etcd3 = importlib.import_module("etcd3")
    for name, module in modules.items():  # importing a submodule sets this attribute of its package
        setattr(etcd3.etcdrpc, name.rpartition(".")[2], module)
    return etcd3


def _old_modules_work() -> bool:
    """Tries what they do. A comparison of versions would miss protobuf's pure-Python implementation."""
    try:
        descriptor.EnumValueDescriptor(name="probe", index=0, number=0)
    except TypeError:
        return False
    return True


def _message_modules() -> dict[str, ModuleType]:
    spec = importlib.util.find_spec("etcd3")
    if spec is None or not spec.submodule_search_locations:
        return {}
    # Not find_spec("etcd3.etcdrpc"), which would import etcd3.
    directory = Path(spec.submodule_search_locations[0], "etcdrpc")
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
    """The top-level names of protoc's module. Nested messages and enums are attributes of their classes."""
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
