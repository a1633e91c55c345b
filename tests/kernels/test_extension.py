"""The CUDA C++ extension: where it cannot be built the package says why, and what is broken never counts as absent."""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from liveavatar_kernels import extension

ROOT = Path(__file__).parents[2]
ABSENT = extension.absent()
built = pytest.mark.skipif(ABSENT is not None, reason=f"liveavatar_kernels._C: {ABSENT}")

NVCC = """#!/bin/sh
# Stands in for nvcc: writes every output, and fails where the test wants it to.
case "$*" in --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit 0;; esac
{then}
while [ $# -gt 0 ]; do
    case "$1" in -MF) : > "$2";; -o) echo "not a library" > "$2";; esac
    shift
done
"""


@pytest.fixture(scope="session")
def build_csrc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_csrc", ROOT / "tools" / "build_csrc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_csrc"] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def make_nvcc(home: Path, release: str = "13.0", then: str = "") -> Path:
    """A stand-in for a CUDA toolkit in `home`, and its nvcc."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release, then=then))
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with stand-ins for the packages that carry headers."""
    folder = tmp_path / "packages"
    for header in ("cutlass_library/source/include/cutlass/cutlass.h", "pybind11/include/pybind11/pybind11.h"):
        (folder / header).parent.mkdir(parents=True)
        (folder / header).touch()
        (folder / header.partition("/")[0] / "__init__.py").touch()
    return folder


def copy_package(source_root: Path) -> None:
    """Put a package `liveavatar_kernels` that has nothing but `extension` into a source root."""
    package = source_root / "liveavatar_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(extension.__file__, package)


def ask(source_root: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with `extension` of that source root, and without what is installed (-S)."""
    command = [sys.executable, "-S", "-c", f"from liveavatar_kernels import extension; {code}"]
    environment = {**os.environ, "PYTHONPATH": str(source_root)}
    return subprocess.run(command, cwd=source_root, env=environment, capture_output=True, text=True, check=False)


class TestToolkit:
    def test_without_nvcc(self, build_csrc: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(build_csrc.ToolkitMissingError, match="nvcc was not found in CUDA_HOME, CUDA_PATH or PATH"):
            build_csrc.Toolkit.find({"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "nowhere")})

    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
    def test_cuda_home_comes_before_the_path(
        self, variable: str, build_csrc: ModuleType, headers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(headers)
        ours, other = make_nvcc(tmp_path / "ours"), make_nvcc(tmp_path / "other")
        toolkit = build_csrc.Toolkit.find({variable: str(tmp_path / "ours"), "PATH": str(other.parent)})
        assert toolkit.nvcc == ours
        assert toolkit.cutlass == headers / "cutlass_library" / "source" / "include"
        assert toolkit.pybind11 == headers / "pybind11" / "include"

    def test_an_old_nvcc(self, build_csrc: ModuleType, tmp_path: Path) -> None:
        old = make_nvcc(tmp_path, release="11.5")
        with pytest.raises(build_csrc.ToolkitMissingError, match=r"nvcc is 11\.5, older than 12\.0"):
            build_csrc.Toolkit.find({"PATH": str(old.parent)})

    def test_a_broken_nvcc(self, build_csrc: ModuleType, tmp_path: Path) -> None:
        nvcc = make_nvcc(tmp_path)
        nvcc.write_text("#!/bin/sh\nexit 1\n")
        with pytest.raises(build_csrc.ToolkitMissingError, match="cannot tell its version"):
            build_csrc.Toolkit.find({"PATH": str(nvcc.parent)})

    @pytest.mark.parametrize(("package", "distribution"), [("cutlass_library", "nvidia-cutlass"), ("pybind11",) * 2])
    def test_without_headers(
        self,
        package: str,
        distribution: str,
        build_csrc: ModuleType,
        headers: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.syspath_prepend(headers)
        for header in (headers / package).rglob("*.h"):
            header.unlink()
        with pytest.raises(build_csrc.ToolkitMissingError, match=rf"\(PyPI: {distribution}\)"):
            build_csrc.Toolkit.find({"PATH": str(make_nvcc(tmp_path).parent)})


class TestSteps:
    @pytest.fixture(params=["ninja", "one by one"])
    def runner(self, request: pytest.FixtureRequest, build_csrc: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "one by one":
            monkeypatch.setattr(build_csrc, "_find_ninja", lambda: None)
        elif build_csrc._find_ninja() is None:
            pytest.skip("ninja is not installed")

    def test_every_source_is_compiled_and_linked(self, runner: None, build_csrc: ModuleType, tmp_path: Path) -> None:
        build, module = tmp_path / "a build", tmp_path / "_C.so"
        toolkit = build_csrc.Toolkit(make_nvcc(tmp_path), tmp_path, tmp_path)
        todo = build_csrc.steps(toolkit, ROOT / "csrc", build, module)
        build_csrc.run(todo, build)
        sources = {path for suffix in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")}
        assert {step.inputs[0] for step in todo[:-1]} == sources
        assert all(step.output.is_file() for step in todo)
        assert set(todo[-1].inputs) == {step.output for step in todo[:-1]}
        assert module.is_file()

    def test_a_failing_step_raises(self, runner: None, build_csrc: ModuleType, tmp_path: Path) -> None:
        toolkit = build_csrc.Toolkit(make_nvcc(tmp_path, then="exit 3"), tmp_path, tmp_path)
        todo = build_csrc.steps(toolkit, ROOT / "csrc", tmp_path / "build", tmp_path / "_C.so")
        with pytest.raises(subprocess.CalledProcessError):
            build_csrc.run(todo, tmp_path / "build")
        assert not (tmp_path / "_C.so").exists()


class TestSetup:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        """The project with one module of each package."""
        project = tmp_path / "project"
        for folder in ("csrc", "tools"):
            shutil.copytree(ROOT / folder, project / folder)
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, project / file)
        copy_package(project / "kernels")
        (project / "liveavatar_engine").mkdir()
        (project / "liveavatar_engine" / "__init__.py").touch()
        return project

    @staticmethod
    def build(project: Path, wish: str | None, nvcc: Path | None, packages: Path) -> subprocess.CompletedProcess[str]:
        """Build a wheel in `project`/dist, seeing no other nvcc than the one given."""
        hidden = {"CUDA_HOME", "CUDA_PATH", "LIVEAVATAR_BUILD_CUDA"}
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        folders = [] if nvcc is None else [str(nvcc.parent)]
        folders += [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
        environment["PATH"] = os.pathsep.join([*folders, "/bin"])
        environment["PYTHONPATH"] = str(packages)
        if wish is not None:
            environment["LIVEAVATAR_BUILD_CUDA"] = wish
        command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
        return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)

    @staticmethod
    def installed(project: Path) -> Path:
        """The wheel of `project`/dist, unpacked."""
        (wheel,) = (project / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(project / "installed")
        return project / "installed"

    def test_without_nvcc_the_wheel_says_why(self, project: Path, headers: Path) -> None:
        done = self.build(project, None, None, headers)
        assert done.returncode == 0, done.stderr
        assert "liveavatar_kernels._C: not built: nvcc was not found in" in done.stderr
        answer = ask(self.installed(project), "print(extension.absent())")
        assert answer.stdout.startswith("not built: nvcc was not found in CUDA_HOME, CUDA_PATH or PATH")

    def test_a_missing_toolkit_is_an_error_for_who_wants_it(self, project: Path, headers: Path) -> None:
        done = self.build(project, "1", None, headers)
        assert done.returncode != 0
        assert "LIVEAVATAR_BUILD_CUDA=1, but nvcc was not found" in done.stderr

    def test_an_unknown_wish_is_an_error(self, project: Path, headers: Path) -> None:
        done = self.build(project, "yes", None, headers)
        assert done.returncode != 0
        assert "LIVEAVATAR_BUILD_CUDA=yes is none of 0, 1, auto" in done.stderr

    def test_code_that_does_not_compile_is_an_error(self, project: Path, headers: Path, tmp_path: Path) -> None:
        done = self.build(project, None, make_nvcc(tmp_path, then="exit 3"), headers)
        assert done.returncode != 0
        assert "csrc/ did not compile" in done.stderr

    def test_what_a_former_build_left_is_not_packed(self, project: Path, headers: Path, tmp_path: Path) -> None:
        done = self.build(project, None, make_nvcc(tmp_path), headers)
        assert done.returncode == 0, done.stderr
        package = self.installed(project) / "liveavatar_kernels"
        assert list(package.glob("_C.*.so"))
        assert not list(package.glob("*.txt"))
        shutil.rmtree(project / "installed")
        done = self.build(project, "0", make_nvcc(tmp_path / "again"), headers)
        assert done.returncode == 0, done.stderr
        assert not list((self.installed(project) / "liveavatar_kernels").glob("_C.*.so"))
        answer = ask(project / "installed", "print(extension.absent())")
        assert answer.stdout.strip() == "not built: LIVEAVATAR_BUILD_CUDA=0"


class TestModule:
    @pytest.fixture
    def source_root(self, tmp_path: Path) -> Path:
        copy_package(tmp_path)
        return tmp_path

    def test_absent(self, source_root: Path) -> None:
        answer = ask(source_root, "print(extension.absent()); extension.load()")
        assert answer.stdout.strip() == "not built: make csrc builds it"
        assert "ImportError: liveavatar_kernels._C is absent (not built: make csrc builds it)" in answer.stderr

    def test_of_another_python(self, source_root: Path) -> None:
        (source_root / "liveavatar_kernels" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
        answer = ask(source_root, "print(extension.absent())")
        assert answer.stdout.strip() == "built for another Python: _C.cpython-39-x86_64-linux-gnu.so"

    def test_broken_is_not_absent(self, source_root: Path) -> None:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        (source_root / "liveavatar_kernels" / f"_C{suffix}").write_bytes(b"no library")
        answer = ask(source_root, "print(extension.absent()); extension.load()")
        assert answer.stdout.strip() == "None"
        assert "ImportError" in answer.stderr
        assert f"_C{suffix}" in answer.stderr


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    return extension.load()


@built
class TestBuilt:
    PROBLEM = {name: 256 for name in ("a", "b", "x_scale", "w_scale", "bias", "out")} | {
        "m": 7,
        "n": 32,
        "k": 64,
        "gelu": False,
        "tile": 0,
        "workspace": 0,
        "workspace_bytes": 0,
        "stream": 0,
    }

    def test_has_its_tiles(self, kernels: ModuleType) -> None:
        tiles = (kernels.FAST_128X128, kernels.FAST_128X256, kernels.PRECISE_128X128)
        assert tiles == (0, 1, 2)
        assert all(kernels.fp8_linear_workspace(3375, 5120, 13824, tile) >= 0 for tile in tiles)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"m": 0}, "m must be positive, n and k positive multiples of 16, not m=0 n=32 k=64"),
            ({"n": 24}, "not m=7 n=24 k=64"),
            ({"k": -16}, "not m=7 n=32 k=-16"),
            ({"tile": 9}, "there is no tile 9"),
            ({"a": 0}, "a is a null pointer"),
            ({"out": 264}, "out must be aligned to 16 bytes"),
            ({"x_scale": 258}, "x_scale must be aligned to 4 bytes"),
            ({"bias": 1}, "bias must be aligned to 4 bytes"),
        ],
        ids=str,
    )
    def test_refuses(self, change: dict[str, int], message: str, kernels: ModuleType) -> None:
        with pytest.raises(ValueError, match=message):
            kernels.fp8_linear(**self.PROBLEM | change)

    CONVOLUTION = {name: 256 for name in ("x", "weight", "bias", "residual", "out")} | {
        "frames": 2,
        "height": 5,
        "width": 7,
        "channels_in": 16,
        "channels_out": 24,
        "kt": 3,
        "kh": 3,
        "kw": 3,
        "tile": 0,
        "stream": 0,
    }

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"frames": 0}, "frames, height and width must be positive, not frames=0 height=5 width=7 channels=16->24"),
            ({"channels_in": 12}, "channels must be positive multiples of 8, not .* channels=12->24 kernel=3x3x3"),
            ({"channels_out": 3}, "channels must be positive multiples of 8"),
            ({"kw": 2}, "kh and kw must be 1 or 3, not .* kernel=3x3x2"),
            ({"tile": 2}, "there is no tile 2"),
            ({"x": 264}, "x must be aligned to 16 bytes"),
            ({"residual": 8}, "residual must be aligned to 16 bytes"),
            ({"weight": 0}, "weight is a null pointer"),
            ({"bias": 2}, "bias must be aligned to 4 bytes"),
        ],
        ids=str,
    )
    def test_refuses_convolutions(self, change: dict[str, int], message: str, kernels: ModuleType) -> None:
        assert (kernels.CONV_256X96, kernels.CONV_128X192) == (0, 1)
        with pytest.raises(ValueError, match=f"^causal_conv3d: {message}"):
            kernels.causal_conv3d(**self.CONVOLUTION | change)

    def test_says_what_cuda_says(self, kernels: ModuleType) -> None:
        """On a machine without a GPU, or with one that is no Hopper; on a Hopper these pointers would be followed."""
        import torch

        if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
            pytest.skip("a Hopper GPU is here")
        for call, problem in ((kernels.fp8_linear, self.PROBLEM), (kernels.causal_conv3d, self.CONVOLUTION)):
            expected = rf"^{call.__name__}: (cudaGetDevice: .+|cudaDevice.+|device \d+ is sm_\d+.+)"
            with pytest.raises(RuntimeError, match=expected):
                call(**problem)
