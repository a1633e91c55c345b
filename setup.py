"""Package build. Metadata lives in pyproject.toml; here csrc/ becomes liveavatar_kernels._C (csrc/README.md)."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import build_csrc
from build_csrc import Toolkit, ToolkitMissingError

PACKAGE = "liveavatar_kernels"
NOTE = "_C_absent.txt"
"""Lies in the package where _C does not, and says why; `liveavatar_kernels.extension` reads it."""
CSRC = Path("csrc")

wish = os.environ.get("LIVEAVATAR_BUILD_CUDA", "auto")
if wish not in ("0", "1", "auto"):
    raise SystemExit(f"LIVEAVATAR_BUILD_CUDA={wish} is none of 0, 1, auto")


class BuildCsrc(build_ext):
    """Compiles csrc/ where that is wanted and possible; elsewhere the package gets a note that says why not."""

    def run(self) -> None:
        found = self._toolkit()
        if isinstance(found, Toolkit):
            self.toolkit = found
            self._write_note(None)
        else:
            self.announce(f"{PACKAGE}._C: {found}", logging.WARNING)
            for extension in self.extensions:  # what a former build left must not get into this one
                Path(self.build_lib, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            self._write_note(found)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "csrc"
        try:
            build_csrc.run(build_csrc.steps(self.toolkit, CSRC.resolve(), build, module), build, self.parallel)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"csrc/ did not compile: exit status {error.returncode}, see above") from None

    def _toolkit(self) -> Toolkit | str:
        if wish == "0":
            return "not built: LIVEAVATAR_BUILD_CUDA=0"
        try:
            return Toolkit.find(os.environ)
        except ToolkitMissingError as missing:
            if wish == "1":
                raise SetupError(f"LIVEAVATAR_BUILD_CUDA=1, but {missing}") from None
            return f"not built: {missing}"

    def _write_note(self, reason: str | None) -> None:
        folders = [Path(self.build_lib, PACKAGE)]
        if self.inplace:
            folders.append(Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE)))
        for folder in folders:
            if reason is None:
                (folder / NOTE).unlink(missing_ok=True)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / NOTE).write_text(reason + "\n", encoding="utf-8")


def files(*suffixes: str) -> list[str]:
    return sorted(path.as_posix() for suffix in suffixes for path in CSRC.rglob(f"*{suffix}"))


setup(
    ext_modules=[
        Extension(
            f"{PACKAGE}._C",
            sources=files(".cpp", ".cu"),
            depends=[*files(".h", ".cuh", ".md", ".py"), "tools/build_csrc.py"],
        )
    ],
    cmdclass={"build_ext": BuildCsrc},
    # pip runs egg_info to ask what a build needs: only who wants the extension waits for what compiles it.
    setup_requires=build_csrc.REQUIREMENTS if wish == "1" and "egg_info" in sys.argv else (),
)
