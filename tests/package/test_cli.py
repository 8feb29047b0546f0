"""Tests of `python -m drpo_kernels`: its parsers on recorded text, and its commands as processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drpo_kernels.__main__ import COMMANDS, main
from drpo_kernels.aot.binaries import Usage, gpu_target, parse_amdgcn, parse_cuobjdump
from drpo_kernels.commands import compile, doctor, selfcheck
from drpo_kernels.commands.table import TextTable
from drpo_kernels.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])

CUOBJDUMP = """
Resource usage:
 Common:
  GLOBAL:0
 Function row:
  REG:32 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : row
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000ff00000000800 */
        /*0030*/              @!P0 EXIT ;                                /* 0x000000000000894d */
        /*0040*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0050*/               @P1 LDG.E.128 R8, desc[UR4][R2.64] ;      /* 0x0000000402087981 */
        /*0060*/                   STG.E.64 desc[UR4][R2.64], R8 ;       /* 0x0000000802007986 */
        /*0070*/                   STG.E desc[UR4][R2.64], R8 ;          /* 0x0000000802007986 */
        /*0080*/                   STS.128 [R2], R8 ;                    /* 0x0000000802007388 */
"""

AMDGCN = """
row:
	s_load_dwordx4 s[0:3], s[0:1], 0x0
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	global_load_ubyte v5, v[6:7], off
	global_store_short_d16_hi v[0:1], v2, off
	buffer_store_dwordx2 v[0:1], v4, s[8:11], 0 offen
	ds_write_b128 v0, v[1:4]
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 63
    .vgpr_count:     19
    .vgpr_spill_count: 0
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own without TRITON_INTERPRET, which this process has set."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = PYTHONPATH
    command = [sys.executable, "-m", "drpo_kernels", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_nvidia_usage():
    assert parse_cuobjdump(CUOBJDUMP) == Usage(registers=32, load_bits=128, store_bits=64)


def test_nvidia_spills_are_counted():
    local = "/*0090*/  @!PT LDL.LU.64 R2, [R1] ;\n/*00a0*/  STL [R1+0x8], R3 ;\n/*00b0*/  STL.64 [R1], R2 ;\n"
    usage = parse_cuobjdump(CUOBJDUMP.replace("STACK:0", "STACK:864") + local)
    assert (usage.local_bytes, usage.spill_loads, usage.spill_stores) == (864, 1, 2)


@pytest.mark.parametrize(
    "opcode, bits",
    [("LDG.E.S8", 8), ("LDG.E", 32), ("LDGSTS.E.BYPASS.LTC128B.64", 64), ("LDG.E.ENL2.256", 256), ("LDS.128", 0)],
)
def test_nvidia_width(opcode, bits):
    text = f"REG:1 STACK:0 SHARED:0 LOCAL:0\n        /*0040*/                   {opcode} R4, [R2] ;"
    assert parse_cuobjdump(text).load_bits == bits


def test_amd_usage():
    """Scalars that spill into vector registers do not touch memory."""
    usage = parse_amdgcn(AMDGCN)
    assert usage == Usage(registers=19, load_bits=128, store_bits=64)


def test_amd_scratch_is_a_spill():
    scratch = "\tscratch_store_dwordx2 off, v[0:1], off\n\tscratch_load_dword v0, off\n"
    usage = parse_amdgcn(AMDGCN.replace("size: 0", "size: 16") + scratch)
    assert (usage.local_bytes, usage.spill_loads, usage.spill_stores) == (16, 1, 1)


@pytest.mark.parametrize("parse", [parse_cuobjdump, parse_amdgcn])
def test_unreadable_output_is_an_error(parse):
    with pytest.raises(ValueError, match="no"):
        parse("nothing of the kind")


def test_targets():
    pytest.importorskip("triton")
    assert (gpu_target("sm_100").arch, gpu_target("gfx942").warp_size) == (100, 64)
    with pytest.raises(ValueError, match="'90'"):
        gpu_target("90")


def test_a_target_without_tiles_is_an_error(capfd):
    """Without row kernels for it the table would say that all is well."""
    pytest.importorskip("triton")
    assert compile.main(["--targets", "sm_90,sm_75", "--kernels", "losses"]) == 2
    assert "no tiles for sm_75: a target begins with gfx, sm_10" in capfd.readouterr().err


def test_table():
    table = TextTable(("name", "n"), widths=(6, 3))
    assert table.header() == "name      n\n------  ---"
    assert table.row(("a", 12)) == "a        12"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert (exit.value.code, capsys.readouterr().out.split()) == (0, ["drpo_kernels", __version__])


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_unknown_command(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert (exit.value.code, "usage" in capsys.readouterr().err) == (2, True)


# The core must run without these packages.
ABSENT = ["numpy", "transformers", "trl", "verl", "accelerate", "peft", "datasets", "matplotlib", "tqdm", "rich"]


def test_core_needs_torch_and_triton_only():
    blocked = f"import sys; sys.modules |= dict.fromkeys({ABSENT!r}); "
    check = "from drpo_kernels.commands.doctor import self_check; sys.exit(not self_check(['torch']))"
    result = subprocess.run([sys.executable, "-c", blocked + check], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_torch():
    code = "import sys; sys.modules['torch'] = None; import drpo_kernels"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: torch>=2.8 must be installed" in result.stderr and "pip install" in result.stderr


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "demo", ("a_package_of_the_extra", ""))
    assert main(["demo"]) == 2
    assert "a_package_of_the_extra" in capsys.readouterr().err


def test_compile_reports_every_target(tmp_path, monkeypatch):
    """The command starts under the interpreter and must leave it, because kernels decorated
    there cannot be compiled.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    report = tmp_path / "report.json"
    assert compile.main(["--cases", "toy_cases:good", "--targets", "sm_90,gfx942", "--json", str(report)]) == 0
    nvidia, amd = json.loads(report.read_text())["kernels"]
    assert (nvidia["target"], amd["target"]) == ("sm_90", "gfx942")
    for kernel in (nvidia, amd):
        assert (kernel["name"], kernel["status"], kernel["usage"]["load_bits"]) == ("row", "ok", 128)
        assert 0 < kernel["usage"]["registers"] <= 128


def test_compile_fails_on_spills_and_errors():
    result = run("compile", "--cases", "toy_cases:bad", "--targets", "sm_90,sm_nonsense")
    assert result.returncode == 1, result.stdout + result.stderr
    statuses = [line.split()[:3] for line in result.stdout.splitlines()[2:6]]
    assert statuses == [
        ["hog", "sm_90", "SPILLS"],
        ["hog", "sm_nonsense", "FAILED"],
        ["not-a-power-of-two", "sm_90", "FAILED"],
        ["not-a-power-of-two", "sm_nonsense", "FAILED"],
    ]
    for explanation in ("hog for sm_90 spills to local memory", "power of 2", "'sm_nonsense'", "3 failed, 1 spill"):
        assert explanation in result.stdout


def test_compile_says_when_nothing_is_left(monkeypatch, capsys):
    compile.load_cases("toy_cases:good")  # import the kernels before the variable goes: other tests interpret them
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert compile.main(["--cases", "toy_cases:good", "--kernels", "absent"]) == 2
    assert "'absent'" in capsys.readouterr().err


def test_doctor():
    """Without a GPU the command checks Triton too, in a process of its own."""
    result = run("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    checked = {tuple(line.split()[:2]) for line in result.stdout.splitlines() if line.endswith(" ok")}
    assert {backend for _, backend in checked} == {"torch", "triton"}
    assert "all comparisons within budget" in result.stdout


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_doctor_fails_on_a_wrong_number(monkeypatch, capsys, error):
    monkeypatch.setattr(selfcheck, "_errors", lambda got, want: (0.0, 0.0, 0.0, error))
    assert doctor.main(["--only", "torch"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_doctor_reports_a_crash(monkeypatch, capsys):
    def crash(**_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(selfcheck, "linear_policy_loss", crash)
    assert doctor.main(["--only", "torch"]) == 1
    assert "no such instruction" in capsys.readouterr().out
