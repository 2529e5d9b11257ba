"""Which compilers are tried, and which level of instructions each CPU gets."""

import shutil
from pathlib import Path

import pytest

from twotower.backends.native import compile
from twotower.backends.native.compile import find_compilers, levels_of

# From /proc/cpuinfo, of machines that have more
NEHALEM = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
HASWELL = f"{NEHALEM} abm avx avx2 bmi1 bmi2 f16c fma movbe"
SKYLAKE_X = f"{HASWELL} avx512bw avx512cd avx512dq avx512f avx512vl"
ZEN_4 = f"{SKYLAKE_X} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} amx_bf16 amx_tile amx_int8"


@pytest.mark.parametrize(
    ("machine", "features", "level"),
    [
        ("x86_64", SAPPHIRE_RAPIDS, "x86-64-v4-amx"),
        ("x86_64", ZEN_4, "x86-64-v4-bf16"),
        ("x86_64", f"{ZEN_4} amx_tile amx_int8", "x86-64-v4-bf16"),
        ("x86_64", SKYLAKE_X, "x86-64-v4"),
        ("x86_64", f"{HASWELL} avx512f avx512cd", "x86-64-v3"),  # Knights Landing: not all of AVX512
        ("x86_64", HASWELL.replace(" fma", ""), "x86-64-v2"),
        ("x86_64", f"{HASWELL} avx512_bf16", "x86-64-v3"),
        ("AMD64", HASWELL, "x86-64-v3"),
        ("x86_64", "sse sse2", None),
        ("x86_64", "", None),
        ("aarch64", "fp asimd", "armv8-a"),
        ("arm64", "arm", "armv8-a"),
        ("riscv64", "", None),
    ],
)
def test_a_cpu_gets_the_best_level_whose_instructions_it_has(machine: str, features: str, level: str | None) -> None:
    found = levels_of(machine, f"flags\t\t: fpu vme {features} rdpid")
    assert next((one.name for one in found), None) == level


def test_several_names_of_one_compiler_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gcc-12").write_text("")
    (tmp_path / "clang").write_text("")
    for name in ("cc", "gcc"):
        (tmp_path / name).symlink_to("gcc-12")
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name) if (tmp_path / name).exists() else None)
    assert find_compilers() == [str(tmp_path / "cc"), str(tmp_path / "clang")]


@pytest.mark.skipif(not find_compilers(), reason="this machine has no C compiler")
def test_a_compiler_leaves_nothing_but_the_library_and_needs_no_other_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.c").write_text("int answer(void) { return 42; }\n")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(compile, "SOURCES", tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    compile.compile_library(find_compilers()[0], (), tmp_path / "out" / "a.so")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.so"]
