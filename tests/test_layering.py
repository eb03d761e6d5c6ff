"""The arrows of CONTRIBUTING.md: what may include, import or mention what."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPP_LAYERS = ["tiles", "kernels", "launch", "bindings.cpp"]
# A module imports from its own row or the rows above.
PYTHON_LAYERS = [
    {"_extension", "geometry"},
    {"checks", "reference", "_kernels"},
    {"ops"},
    {"autograd"},
    {"functional"},
    {"nn"},
    {"integrations", "info"},
    {"__init__", "demo", "__main__"},
]
APPLICATIONS = {"demo", "__main__"}
LONGEST_FILE = 500


def cpp_breaches(path, text):
    """Broken rules of one C++ or CUDA file. `path` is relative to csrc/."""
    layer = CPP_LAYERS.index(path.parts[0])
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', code)
    for include in includes:
        top = include.split("/")[0]
        if top in CPP_LAYERS and CPP_LAYERS.index(top) > layer:
            yield f"{path}: a file of {path.parts[0]} includes {include}"
        if top in ("torch", "ATen", "c10"):
            yield f"{path}: includes {include}, but the C++ side knows no torch"
        if top == "pybind11" and path.parts[0] != "bindings.cpp":
            yield f"{path}: includes {include}, but pybind11 belongs to bindings.cpp"
        if path.suffix in (".h", ".cpp") and (
            include.endswith(".cuh") or re.match(r"cuda|cute|cutlass", include)
        ):
            yield f"{path}: a plain C++ file includes {include}"
    rules = [
        (r"\basm\b", "PTX", "tiles"),
        (r"<<<|\bcudaLaunch\w*", "a kernel launch", "launch"),
        (r"\bcu[A-Z]\w+\(|\bcuda[A-Z]\w+\(", "a driver or runtime call", "launch"),
        (r"\bPYBIND11_\w+", "a binding", "bindings.cpp"),
        (r"(torch|at|c10)::", "torch", None),
        (r"\bgetenv\b", "the environment", None),
    ]
    for pattern, what, home in rules:
        if (match := re.search(pattern, code)) and path.parts[0] != home:
            yield f"{path}: has {what} ({match[0]}), allowed only in {home}"
    if path.parts[0] == "tiles":
        if match := re.search(r"softmax|attention|\b(lse|query|params)\b", code, re.IGNORECASE):
            yield f"{path}: tiles know no attention, found {match[0]}"
    if re.search(r"\[[&=]\]\s*[({]", code):
        yield f"{path}: a lambda that captures everything"


def python_layer(module):
    for rank, names in enumerate(PYTHON_LAYERS):
        if module in names:
            return rank
    raise AssertionError(f"vsa_cuda/{module}: no layer; add it to PYTHON_LAYERS in {Path(__file__).name}")


def python_imports(path, tree):
    """Modules of vsa_cuda that one of its files imports, by their first name under the package."""
    package = ["vsa_cuda", *path.parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "vsa_cuda":
                    yield parts[1] if len(parts) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = base + (node.module.split(".") if node.module else [])
            if parts[:1] != ["vsa_cuda"]:
                continue
            for alias in node.names:
                if alias.name != "__version__":
                    yield (parts + [alias.name])[1]
        elif isinstance(node, ast.Constant) and node.value == "vsa_cuda._C":
            yield "_C"


def python_breaches(path, text):
    """Broken rules of one Python file. `path` is relative to vsa_cuda/."""
    tree = ast.parse(text)
    module = path.parts[0].removesuffix(".py")
    rank = python_layer(module)
    for imported in python_imports(path, tree):
        if imported == "_C":
            if module != "_extension":
                yield f"{path}: imports vsa_cuda._C, which only _extension.py may"
        elif python_layer(imported) > rank:
            yield f"{path}: imports {imported}, a layer above"
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.vsa_cuda"):
            if module not in {"ops", "autograd"} | APPLICATIONS:
                yield f"{path}: uses torch.ops.vsa_cuda; call through autograd.py"
    if names & {"environ", "getenv"} and module not in APPLICATIONS:
        yield f"{path}: reads the environment"


def sources(folder, *suffixes):
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def test_cpp_layers():
    paths, breaches = sources("csrc", ".h", ".cuh", ".cpp", ".cu"), []
    assert {path.relative_to(ROOT / "csrc").parts[0] for path in paths} == set(CPP_LAYERS)
    for path in paths:
        breaches += cpp_breaches(path.relative_to(ROOT / "csrc"), path.read_text())
    assert not breaches, "\n".join(breaches)


def test_python_layers():
    paths, breaches = sources("vsa_cuda", ".py"), []
    assert paths
    for path in paths:
        breaches += python_breaches(path.relative_to(ROOT / "vsa_cuda"), path.read_text())
    assert not breaches, "\n".join(breaches)


def test_files_are_short():
    suffixes = {".py", ".h", ".cuh", ".cpp", ".cu"}
    paths = [path for folder in ("csrc", "vsa_cuda", "tests", "bench") for path in sources(folder, *suffixes)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    long = {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert lengths and not long, f"more than {LONGEST_FILE} lines: {long}"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("tiles/a.cuh", '#include "kernels/pool.cuh"'),
        ("kernels/a.cuh", '#include "launch/plan.h"'),
        ("launch/a.cu", "#include <torch/extension.h>"),
        ("launch/a.cpp", "#include <pybind11/pybind11.h>"),
        ("kernels/a.h", '#include "tiles/tma.cuh"'),
        ("kernels/a.h", "#include <cuda_bf16.h>"),
        ("kernels/a.cuh", 'asm volatile("wgmma.fence.sync.aligned;");'),
        ("kernels/a.cuh", "kernel<<<1, 1>>>();"),
        ("bindings.cpp", "cudaLaunchKernelExC(&config, kernel, args);"),
        ("kernels/a.cuh", "cudaFuncSetAttribute(kernel, attribute, 1);"),
        ("launch/a.cpp", "at::Tensor x;"),
        ("launch/a.cpp", 'std::getenv("DEBUG")'),
        ("tiles/a.cuh", "float online_softmax(float x);"),
        ("kernels/a.cuh", "auto step = [&](int i) { return i; };"),
    ],
)
def test_cpp_rules_catch(path, text):
    assert list(cpp_breaches(Path(path), text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ops.py", "from vsa_cuda.autograd import VideoSparse"),
        ("geometry.py", "from . import reference"),
        ("geometry.py", "def f():\n    from vsa_cuda import nn"),
        ("ops.py", "import vsa_cuda"),
        ("_kernels.py", "from vsa_cuda import _C"),
        ("_kernels.py", "from ._C import launch"),
        ("ops.py", "importlib.import_module('vsa_cuda._C')"),
        ("integrations/fastvideo.py", "from ..demo import video"),
        ("nn.py", "torch.ops.vsa_cuda.pool(q)"),
        ("ops.py", "import os\nos.environ.get('X')"),
    ],
)
def test_python_rules_catch(path, text):
    assert list(python_breaches(Path(path), text))


def test_rules_pass_clean_code():
    code = '#include "kernels/pool.cuh"  // cudaLaunch, asm, torch::Tensor\n'
    assert not list(cpp_breaches(Path("launch/a.cu"), code))
    assert not list(python_breaches(Path("nn.py"), "from vsa_cuda.functional import f\nfrom . import checks"))
