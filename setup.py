"""Builds the C kernels into the wheel where TWOTOWER_BUILD_KERNELS is 1, for every level of the build machine's kind of
CPU. Otherwise the wheel is for any machine, and its C compiler makes them there at first use."""

import os
import platform
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = "twotower/backends/native"


class BuildWithKernels(build_py):
    """Copies the package, and compiles its kernels beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        compile_ = runpy.run_path(f"src/{PACKAGE}/compile.py")
        levels = [level for level in compile_["LEVELS"] if platform.machine() in level.machines]
        compilers = compile_["find_compilers"]()
        if not levels or not compilers:
            raise SystemExit(f"kernels need a C compiler, and a kind of CPU of LEVELS; {platform.machine()} is here")
        for level in levels:
            file = Path(self.build_lib, PACKAGE, level.file.relative_to(compile_["SOURCES"].parent))
            file.parent.mkdir(exist_ok=True)
            compile_["compile_library"](compilers[0], level.target, file)


class WheelOfAnyPython(bdist_wheel):
    """A wheel for one platform and every Python 3: the kernels know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class DistributionWithKernels(Distribution):
    """Says that it isn't for every platform."""

    def has_ext_modules(self) -> bool:
        return True


if os.environ.get("TWOTOWER_BUILD_KERNELS") == "1":
    commands = {"build_py": BuildWithKernels, "bdist_wheel": WheelOfAnyPython}
    setup(distclass=DistributionWithKernels, cmdclass=commands)
else:
    setup()
