"""Every launch of every kernel goes through Triton's own JIT, compiler and launcher for an sm_90, without a GPU.

The interpreter, in which the other tests run the kernels, takes any arguments that NumPy takes. Here a test fails if an
argument is missing or of another kind, or if an absent pointer, a tuple or a specialisation does not compile.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from launcher import ROOT, launch

pytest.importorskip("triton.backends.nvidia", reason="there is no Triton for NVIDIA")
import triton

import launch_cases


def obstacle() -> str | None:
    if torch.cuda.is_available():
        return "a GPU is there, whose own driver takes the launches of all the other tests"
    if shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there is no gcc, or no Python.h: Triton compiles its launchers in C"
    return None


pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Return the environment of a worker: the stub as libcuda, and folders for what its compilers write."""
    folder = tmp_path_factory.mktemp("libcuda")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", library]
    subprocess.run([*command, ROOT / "tests" / "support" / "stub_driver.c"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return {
        "TRITON_INTERPRET": "0", "TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": paths,
        "TRITON_CACHE_DIR": str(shared / "triton"),
        "DISABLE_PTXAS_OPT": "1",  # nothing runs the code, and optimising it takes longer than everything else
    }  # fmt: skip


@pytest.mark.parametrize("group", launch_cases.GROUPS)
def test_launches_reach_the_driver(group, environment):
    status, output = launch("launch_worker", group, **environment)
    assert status == 0, output[-4000:]
    launched = re.findall(r"^launched (\w+), (\d+) threads$", output, re.MULTILINE)
    assert re.findall(r"^asked (\w+)$", output, re.MULTILINE) == [kernel for kernel, _ in launched]
    most = {kernel: max(int(threads) for name, threads in launched if name == kernel) for kernel, _ in launched}
    assert most == launch_cases.LAUNCHED[group]


def test_every_kernel_is_launched():
    """A kernel is a `@jit` function whose name ends in `_kernel` or that asks for its program_id."""
    package = Path(importlib.util.find_spec("drpo_kernels").origin).parent
    functions = (
        node for path in package.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list)
    )  # fmt: skip
    kernels = {node.name for node in functions if node.name.endswith("_kernel") or "program_id" in ast.unparse(node)}
    assert kernels == set().union(*launch_cases.LAUNCHED.values())
