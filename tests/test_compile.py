"""What `python -m drpo_kernels compile` reads from a binary and holds against it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drpo_kernels.commands.binaries import TARGETS, Usage, faults
from drpo_kernels.commands.loops import Loop, amdgcn, innermost_loops, sass

pytest.importorskip("triton")
from drpo_kernels.backends.triton.aot import Expected

TESTS = Path(__file__).resolve().parent

SASS = """
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;      /* 0x0 */
        /*0050*/               @P1 BRA 0x00a0 ;                          /* 0x0 */
        /*0060*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0070*/              @!P2 LDG.E.LTC128B.128 R8, desc[UR4][R2.64] ;  /* 0x0 */
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R8 ;       /* 0x0 */
        /*0090*/              @!P0 BRA 0x60 ;                            /* 0x0 */
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;  /* 0x0 */
        /*00b0*/               @P3 BRA 0xd0 ;                            /* 0x0 */
        /*00c0*/                   BRA P4, 0xa0 ;                        /* 0x0 */
        /*00d0*/                   STG.E desc[UR4][R2.64], R8 ;          /* 0x0 */
        /*00e0*/              @UP0 BRA.U 0xa0 ;                          /* 0x0 */
        /*00f0*/                   FADD R1, R1, 0x60 ;                   /* 0x0 */
        /*0100*/                   BRA 0x40 ;                            /* 0x0 */
        /*0110*/                   BRA 0x110;                            /* 0x0 */
"""

AMDGCN = """
row:
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; %.lr.ph
	global_load_dwordx4 v[74:77], v[68:69], off
	s_cbranch_execz .LBB0_2
	buffer_load_ushort v5, v[6:7], off
	buffer_store_short_d16_hi v4, v[6:7], off
	s_branch .LBB0_1
.LBB0_2:
	global_store_dwordx2 v[0:1], v2, off
"""


def test_loops_of_sass():
    """Innermost ones, a head with two ways back once, and neither the loop around them nor an endless empty one."""
    loops = innermost_loops(list(sass(SASS)))
    assert loops == (Loop(18, 8, 16, 64), Loop(16, 4, 128, 32))


def test_loops_of_amd_assembly():
    assert innermost_loops(list(amdgcn(AMDGCN))) == (Loop(18, 2, 16, 16),)


GOOD = Usage(load_bits=128, store_bits=128, loops=(Loop(32, 16, 128, 128), Loop(0, 64, 0, 128)))
ROW = Expected(load_bits=128, store_bits=128, loop_load_bytes=32)


@pytest.mark.parametrize(
    "found, usage, expected",
    [
        ([], GOOD, ROW),
        ([], Usage(), Expected()),
        (["SPILLS"], Usage(local_bytes=8), Expected()),
        ([], Usage(local_bytes=8), Expected(local_bytes=8)),
        (["SHARED"], Usage(shared_bytes=232_449), Expected()),
        (["NARROW"], Usage(load_bits=64), Expected(load_bits=128)),
        (["NARROW"], Usage(load_bits=128, store_bits=128, loops=(*GOOD.loops, Loop(32, 16, 32, 128))), ROW),
        (
            [],
            Usage(load_bits=128, store_bits=128, loops=(*GOOD.loops, Loop(32, 16, 32, 16))),
            Expected(128, 128, 32, 1),
        ),
        (["RELOADS"], Usage(load_bits=128, store_bits=128, loops=(Loop(48, 0, 128, 0),)), ROW),
    ],
)
def test_faults(found, usage, expected):
    assert [fault for fault, _ in faults(expected, "sm_90", usage)] == found


def outside_the_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    """The suite's own process has TRITON_INTERPRET set."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_kernel_that_moves_too_much_fails(tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--cases", "faulty_kernels:cases", "--targets", "sm_90,gfx942", "--json", str(report))
    result = outside_the_interpreter("-m", "drpo_kernels", "compile", *arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    statuses = {(k["name"], k["target"]): k["status"] for k in json.loads(report.read_text())["kernels"]}
    wrong = {"right": "ok", "twice": "RELOADS", "narrow": "NARROW"}
    assert statuses == {(name, target): word for name, word in wrong.items() for target in ("sm_90", "gfx942")}
    assert "64 bytes per thread and iteration, where 32 are enough" in result.stdout


LAYOUTS = """
import sys, triton
from drpo_kernels.backends.triton import aot
from drpo_kernels.commands.binaries import TARGETS, gpu_target
for case in aot.kernel_cases():
    if case.name in ("policy[drpo fp32>fp32]", "gradient[bf16>bf16]"):
        for target in filter(case.launched_on, TARGETS):
            print(triton.compile(case.source(), target=gpu_target(target), options=case.launch_options()).asm["ttgir"])
"""


def test_in_place_each_thread_overwrites_what_it_alone_has_read():
    """One layout for every load and store of a row, and no element of a block in two threads."""
    result = outside_the_interpreter("-c", LAYOUTS)
    assert result.returncode == 0, result.stderr
    modules = result.stdout.split("module attributes")[1:]
    preambles = re.findall(r"#blocked\d* = .*", result.stdout)
    assert len(modules) == len(preambles) == 2 * len(TARGETS)
    for module, layout in zip(modules, preambles, strict=True):
        accesses = set(re.findall(r"tt\.(?:load|store) .*?: tensor<(\d+)x!tt\.ptr<\w+>, (#\w+)>", module))
        ((block, _),) = accesses
        threads = [int(n) for n in re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[(\d+)\]", layout)]
        assert threads[0] * threads[1] * threads[2] <= int(block)
