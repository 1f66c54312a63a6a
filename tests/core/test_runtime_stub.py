"""xla_ops/_runtime.pyi says of the extension what the extension says of itself.

pybind11 begins each docstring with the signature that it converts arguments by:
`load_library(path: str) -> list[tuple[str, str]]`. The stub may be narrower only where
pybind11 has no better word than `dict`.
"""

import ast
import pathlib

import pytest

import xla_ops
from xla_ops import _runtime

STUB = ast.parse(pathlib.Path(xla_ops.__file__).with_name("_runtime.pyi").read_text())
FUNCTIONS = {f.name: f for f in STUB.body if isinstance(f, ast.FunctionDef)}
DICTS = {c.name for c in STUB.body if isinstance(c, ast.ClassDef)}
ALIASES = {
    target.id: node.value
    for node in STUB.body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name)
}
# What converts to an integer of C++.
INTEGER = "typing.SupportsInt | typing.SupportsIndex"


class _Spelled(ast.NodeTransformer):
    """Spells a type without modules and aliases."""

    def visit_Attribute(self, node):
        return ast.Name(node.attr)

    def visit_Name(self, node):
        return self.visit(ALIASES[node.id]) if node.id in ALIASES else node


def types(function: ast.FunctionDef) -> dict[str, str]:
    """Argument -> its type; and that of the result."""
    types = {a.arg: a.annotation for a in function.args.args}
    types["return"] = function.returns
    return {name: ast.unparse(_Spelled().visit(t)) for name, t in types.items() if t}


def is_dict(spelled: str) -> bool:
    return spelled.startswith("dict[") or spelled in DICTS


def test_every_function_has_a_stub():
    public = {n for n in dir(_runtime) if not n.startswith("__")}
    assert set(FUNCTIONS) == public


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name):
    signature = getattr(_runtime, name).__doc__.splitlines()[0]
    (compiled,) = ast.parse(f"def {signature.replace(INTEGER, 'int')}: ...").body
    written, found = types(FUNCTIONS[name]), types(compiled)
    assert list(written) == list(found)
    for argument, kind in found.items():
        if kind == "dict":
            assert is_dict(written[argument]), argument
        else:
            assert written[argument] == kind, argument


def test_plugin_info_has_the_keys_of_its_type(tmp_path):
    (info,) = [c for c in STUB.body if isinstance(c, ast.ClassDef)]
    keys = [ast.unparse(line.target) for line in info.body]
    assert list(_runtime.find_plugin_info(str(tmp_path / "none.so"))) == keys
