"""The descriptors read from etcd3's files are those that Python's own parser finds."""

import ast
import importlib.util
from pathlib import Path

import pytest

from peerd.registry.etcd3_import import _serialized_file


@pytest.mark.parametrize("name", ["kv_pb2", "auth_pb2", "rpc_pb2"])
def test_the_literal_is_the_one_that_the_parser_finds(name: str) -> None:
    spec = importlib.util.find_spec("etcd3")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], "etcdrpc", f"{name}.py")
    (parsed,) = [
        node.value.args[0].value
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.keyword)
        and node.arg == "serialized_pb"
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.args[0], ast.Constant)
    ]
    assert isinstance(parsed, str)
    assert _serialized_file(path) == parsed.encode("latin-1")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv_pb2.py"
    path.write_text("serialized_pb = 1\n")
    with pytest.raises(ImportError, match=r"install etcd3==0\.12\.0"):
        _serialized_file(path)
