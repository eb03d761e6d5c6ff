"""The compiled extension: its type stub, what it links and what it exports."""

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

from vsa_cuda import _extension

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=f"vsa_cuda._C is not built: {_extension.unavailable_reason()}"
)
STUB = Path(_extension.__file__).with_name("_C.pyi")


def stub_signatures():
    """{"function" or "Class.method": argument names} of _C.pyi; properties and classes map to None."""
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = argument_names(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    is_property = bool(member.decorator_list)
                    found[f"{node.name}.{member.name}"] = None if is_property else argument_names(member)
    return found


def argument_names(function):
    return [
        argument.arg for argument in function.args.args + function.args.kwonlyargs if argument.arg != "self"
    ]


def bound_signatures():
    """The same of the compiled module, from the signatures that pybind11 puts into docstrings."""
    module = _extension.load()
    found = {}
    for name, thing in vars(module).items():
        if name.startswith("__"):
            continue
        if not isinstance(thing, type):
            found[name] = documented_arguments(thing)
            continue
        found[name] = None
        for member, value in vars(thing).items():
            if isinstance(value, property):
                found[f"{name}.{member}"] = None
            elif not member.startswith("_") or (member == "__init__" and "self: " in (value.__doc__ or "")):
                found[f"{name}.{member}"] = documented_arguments(value)
    return found


def documented_arguments(function):
    signature = function.__doc__.splitlines()[0]
    return re.findall(r"[(,] ?(?!self\b)(\w+): ", signature)


def test_stub_names_what_is_bound():
    stub, bound = stub_signatures(), bound_signatures()
    assert set(stub) == set(bound)
    different = {name: (stub[name], bound[name]) for name in stub if stub[name] != bound[name]}
    assert not different, f"(in _C.pyi, in _C): {different}"


def test_several_arguments_are_keywords_only():
    """Swapped addresses would be silent corruption."""
    checked = 0
    module = _extension.load()
    for name, arguments in bound_signatures().items():
        if arguments is not None and len(arguments) > 1:
            thing = functools.reduce(getattr, name.split("."), module)
            assert re.match(r"\w+\((self: [\w.]+, )?\*, ", thing.__doc__), thing.__doc__
            checked += 1
    assert checked > 5


def binutils(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_links_no_cuda_library_and_no_torch():
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", binutils("readelf", "-d", _extension.load().__file__))
    assert needed
    assert not [name for name in needed if re.match("libcuda|libcudart|libtorch|libc10|libnv", name)]


def test_exports_no_runtime_function():
    """torch loads its own libcudart globally; exported functions of ours would be bound to that one."""
    table = binutils("nm", "-D", "--defined-only", _extension.load().__file__)
    exported = [line.split()[-1] for line in table.splitlines()]
    assert "PyInit__C" in exported
    assert not [name for name in exported if re.match("_?_?cuda|cu[A-Z]", name)]
