"""The build: which nvcc, what the ptxas gate refuses, what a wheel holds, and rebuilding in place."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLCHAIN = ROOT / "csrc" / "toolchain"
sys.path.insert(0, str(TOOLCHAIN))
import backend  # noqa: E402
import nvcc  # noqa: E402
import ptxas_gate  # noqa: E402

EXTENSION = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")


def fake_nvcc(folder):
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_nvcc_search_order(tmp_path):
    places = [
        fake_nvcc(tmp_path / "named"),
        fake_nvcc(tmp_path / "home" / "bin"),
        fake_nvcc(tmp_path / "path"),
        fake_nvcc(tmp_path / "toolkit" / "bin"),
        fake_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin"),
    ]
    env = {
        "CUDACXX": str(places[0]),
        "CUDA_HOME": str(tmp_path / "home"),
        "PATH": str(tmp_path / "path"),
    }
    for expected in places:
        found = nvcc.find_nvcc(env, [str(tmp_path / "site")], str(tmp_path / "toolkit"))
        assert found.path == expected
        expected.unlink()
        env.pop("CUDACXX", None)
    with pytest.raises(nvcc.NvccNotFound, match="(?s)CUDA_HOME.*VSA_CUDA_BUILD=0") as error:
        nvcc.find_nvcc(env, [str(tmp_path / "site")], str(tmp_path / "toolkit"))
    assert "nvidia-compiler.txt" in str(error.value)


def test_wrong_cudacxx_is_an_error_not_a_fallback(tmp_path):
    with pytest.raises(nvcc.NvccNotFound, match="no-such-nvcc"):
        nvcc.find_nvcc({"CUDACXX": "no-such-nvcc", "PATH": str(fake_nvcc(tmp_path / "bin").parent)}, [])


def test_nvcc_environment_adds_the_wheels_library_folder(tmp_path):
    path = fake_nvcc(tmp_path / "links")
    path.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/site/cu13/bin/..' >&2\n")
    (tmp_path / "site" / "cu13" / "bin").mkdir(parents=True)
    found, library = nvcc.Nvcc(path), tmp_path / "site" / "cu13" / "lib"
    assert found.environment({"LIBRARY_PATH": "/x"})["LIBRARY_PATH"] == f"{library}:/x"
    assert found.environment({})["LIBRARY_PATH"] == str(library)
    library.with_name("lib64").mkdir()
    assert found.environment({"LIBRARY_PATH": "/x"})["LIBRARY_PATH"] == "/x"


def test_build_switch():
    assert nvcc.build_enabled({}, "linux")
    assert not nvcc.build_enabled({"VSA_CUDA_BUILD": "0"}, "linux")
    assert not nvcc.build_enabled({}, "darwin")
    with pytest.raises(ValueError, match="'yes'"):
        nvcc.build_enabled({"VSA_CUDA_BUILD": "yes"}, "linux")


def pinned_compiler():
    return dict(line.split("==") for line in backend.COMPILER_PINS.read_text().splitlines() if line[0] != "#")


@needs_linux
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_backend_asks_for_the_compiler_only_without_nvcc(kind, monkeypatch):
    hook = getattr(backend, f"get_requires_for_build_{kind}")

    def no_nvcc():
        raise nvcc.NvccNotFound

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("VSA_CUDA_BUILD", raising=False)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr(backend, "find_nvcc", no_nvcc)
    wanted = {f"{name}=={version}" for name, version in pinned_compiler().items()}
    assert len(wanted) == 5
    assert wanted <= set(hook())
    monkeypatch.setenv("VSA_CUDA_BUILD", "0")
    assert not wanted & set(hook())
    monkeypatch.delenv("VSA_CUDA_BUILD")
    monkeypatch.setattr(backend, "find_nvcc", lambda: nvcc.Nvcc(Path("/usr/bin/nvcc")))
    assert not wanted & set(hook())


def test_test_extra_and_constraints_name_the_pinned_compiler():
    project = (ROOT / "pyproject.toml").read_text()
    for name in pinned_compiler():
        assert f"\"{name}; sys_platform == 'linux'\"" in project
    assert "-c third_party/nvidia-compiler.txt" in (ROOT / "constraints.txt").read_text()


def test_cmake_lists_every_source():
    listed = set(re.findall(r"csrc/\S+\.(?:cu|cpp)", (ROOT / "CMakeLists.txt").read_text()))
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cpp")]
    assert listed == {str(path.relative_to(ROOT)) for path in sources}


CLEAN = """
extern "C" __global__ void kernel(float* x) {
  __shared__ float values[32];
  values[threadIdx.x] = *x;
  *x = values[1];
}"""
# 64 live values in 32 registers.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) kernel(float* x) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; i++) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[(63 - i) * 1024 + threadIdx.x] = values[i] * values[(i + 7) % 64];
}"""
LOCAL_MEMORY = """
extern "C" __global__ void kernel(float* x, int at) {
  float values[16] = {};
  for (int i = 0; i < 16; i++) values[(i * at) % 16] += x[i];
  x[0] = values[at];
}"""
# The accumulator changes while a wgmma that writes it is in flight.
SERIALISED = """
extern "C" __global__ void kernel(float* x, unsigned long long a, unsigned long long b) {
  float d[4] = {x[0], x[1], x[2], x[3]};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int i = 0; i < 2; i++) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
                 " {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] *= x[4];
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; i++) x[4 * threadIdx.x + i] = d[i];
}"""


def compile_behind_gate(source, folder):
    compiler = nvcc.find_nvcc()
    options = "-gencode=arch=compute_90a,code=sm_90a -std=c++20 -O3 -Xptxas=-v,--warn-on-spills".split()
    (folder / "kernel.cu").write_text(source)
    gate = [sys.executable, TOOLCHAIN / "ptxas_gate.py"]
    command = [*gate, compiler.path, *options, "-c", "kernel.cu", "-o", "kernel.o"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=compiler.environment())


@needs_linux
def test_gate_accepts_a_clean_kernel_and_records_it(tmp_path):
    run = compile_behind_gate(CLEAN, tmp_path)
    assert run.returncode == 0, run.stdout
    assert "Used" in run.stdout
    assert (tmp_path / "kernel.o").is_file()
    record = (tmp_path / "kernel.o.resources.json").read_text()
    assert re.search(r'"kernel": \{\s*"registers": \d+,\s*"static_shared_bytes": 128\s*\}', record)


@needs_linux
@pytest.mark.parametrize(
    ("source", "fault"),
    [(SPILLS, "spill"), (LOCAL_MEMORY, "local memory"), (SERIALISED, "wgmma or setmaxnreg")],
)
def test_gate_rejects(source, fault, tmp_path):
    run = compile_behind_gate(source, tmp_path)
    assert run.returncode == 1, run.stdout
    assert f"  {fault}" in run.stdout.split("ptxas_gate:")[1]
    assert not (tmp_path / "kernel.o").exists()


@needs_linux
def test_gate_passes_on_a_compile_error(tmp_path):
    run = compile_behind_gate("not C++", tmp_path)
    assert run.returncode not in (0, None)
    assert "error" in run.stdout


@pytest.mark.parametrize("code", ["C7507", "C7508", "C7510", "C7512", "C7517"])
def test_gate_knows_every_ptxas_loss(code):
    assert ptxas_gate.faults(f"ptxas info    : ({code}) Potential Performance Loss: in function 'k'")


def scratch_project(folder):
    """This project's build files around one small kernel."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc/toolchain", "third_party", "vsa_cuda"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    cmake = (ROOT / "CMakeLists.txt").read_text()
    cmake, kernels = re.subn(r"(vsa_kernels OBJECT)[^)]*", r"\1 csrc/launch/one.cu", cmake)
    cmake, bindings = re.subn(r"(_C MODULE NO_EXTRAS)[^)]*", r"\1 csrc/bindings.cpp", cmake)
    assert (kernels, bindings) == (1, 1)
    (folder / "CMakeLists.txt").write_text(cmake)
    (folder / "csrc" / "launch").mkdir()
    write_kernel(folder, CLEAN)
    set_answer(folder, 1)
    return folder


def write_kernel(project, kernel):
    text = f"{kernel}\nint runtime() {{ return CUDART_VERSION; }}\n"
    (project / "csrc" / "launch" / "one.cu").write_text(text)


def set_answer(project, answer):
    (project / "csrc" / "bindings.cpp").write_text(
        "#include <Python.h>\nint runtime();\n"
        f'static PyModuleDef module{{PyModuleDef_HEAD_INIT, "_C", "answer {answer}"}};\n'
        "PyMODINIT_FUNC PyInit__C() { return runtime() ? PyModule_Create(&module) : nullptr; }\n"
    )


def build_in_place(project, **env):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command,
        cwd=project,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def forget(cache, *variables):
    """Points entries of a CMakeCache.txt into a folder that is gone, as an isolated build's are."""
    text = cache.read_text()
    for name in variables:
        text, count = re.subn(rf"^({name}:\w+)=.*", r"\1=/tmp/gone-build-environment/x", text, flags=re.M)
        assert count == 1
    cache.write_text(text)


def answer(project):
    code = "import _C; print(_C.__doc__)"
    env = os.environ | {"PYTHONPATH": str(project / "vsa_cuda")}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return run.stdout.strip()


def wheel(project, out, **env):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    run = subprocess.run(
        [*pip, ".", "-w", out], cwd=project, env=os.environ | env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = Path(out).glob("*.whl")
    return path


@needs_linux
@pytest.mark.slow
def test_rebuild_in_place_after_the_build_environment_is_gone(tmp_path):
    project = scratch_project(tmp_path)
    isolated_nvcc = fake_nvcc(tmp_path / "isolated" / "bin")
    isolated_nvcc.write_text(f'#!/bin/sh\nexec {nvcc.find_nvcc().path} "$@"\n')
    first = build_in_place(project, CUDACXX=str(isolated_nvcc))
    assert first.returncode == 0, first.stdout
    assert answer(project) == "answer 1"

    (cache,) = (project / "build").glob("cmake-*/CMakeCache.txt")
    forget(cache, "pybind11_DIR", "CMAKE_MAKE_PROGRAM", "Python_EXECUTABLE")
    set_answer(project, 2)
    second = build_in_place(project, CUDACXX=str(isolated_nvcc))
    assert second.returncode == 0, second.stdout
    assert answer(project) == "answer 2"
    assert "one.cu" not in second.stdout, "the kernels were compiled again for nothing"

    isolated_nvcc.unlink()
    set_answer(project, 3)
    third = build_in_place(project)
    assert third.returncode == 0, third.stdout
    assert answer(project) == "answer 3"

    write_kernel(project, SPILLS)
    refused = build_in_place(project)
    assert refused.returncode != 0
    assert "ptxas_gate:" in refused.stdout
    assert answer(project) == "answer 3"

    write_kernel(project, CLEAN)
    names = zipfile.ZipFile(wheel(project, tmp_path / "wheels")).namelist()
    assert_wheel_contents(names, EXTENSION)


def assert_wheel_contents(names, *binaries):
    package = {name for name in names if name.startswith("vsa_cuda/")}
    python = {f"vsa_cuda/{path.relative_to(ROOT / 'vsa_cuda')}" for path in (ROOT / "vsa_cuda").rglob("*.py")}
    package = {name for name in package if "__pycache__" not in name}  # written at installation
    assert package == python | {f"vsa_cuda/{name}" for name in (*binaries, "_C.pyi", "py.typed")}
    outside = {name.split("/")[0] for name in names} - {"vsa_cuda"}
    assert all(name.endswith((".dist-info", "..")) for name in outside), outside


def test_switched_off_the_wheel_is_pure_python(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    scratch_project(project)
    (project / "vsa_cuda" / EXTENSION).write_bytes(b"left over from an earlier build")
    stale = project / "build" / "lib" / "vsa_cuda"
    stale.mkdir(parents=True)
    (stale / "removed.py").write_text("")
    path = wheel(project, tmp_path / "wheels", VSA_CUDA_BUILD="0")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert_wheel_contents(archive.namelist())
        archive.extractall(tmp_path / "installed")

    # Where the tests run from an editable install, its finder would find the extension in the work tree.
    code = """if True:
        import sys
        sys.meta_path[:] = [x for x in sys.meta_path if "__editable__" not in str(x.__module__)]
        import vsa_cuda, vsa_cuda._extension
        print(vsa_cuda.__file__, vsa_cuda.info()["backend"])
        vsa_cuda._extension.load()"""
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stdout.split() == [str(tmp_path / "installed" / "vsa_cuda" / "__init__.py"), "reference"]
    assert "RuntimeError: vsa_cuda._C" in run.stderr and "pip install" in run.stderr


def installed_wheel():
    for found in importlib.metadata.distributions(name="vsa_cuda"):
        if found.read_text("RECORD") and '"editable": true' not in (found.read_text("direct_url.json") or ""):
            return found
    return None


@needs_linux
def test_installed_wheel():
    found = installed_wheel()
    if found is None:
        pytest.skip("vsa_cuda is not installed, or is installed editable")
    assert_wheel_contents([str(path) for path in found.files], EXTENSION)
