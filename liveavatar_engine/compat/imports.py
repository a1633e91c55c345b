"""Imports of the reference's scripts, while one of them runs: our backend in its modules' place, and little else.

Three things are changed, from outside and for the time of a script. The modules of the pipelines and of the FP8 switch
are ours. Packages of the reference run their `__init__` only when something of it is used, because it imports models
that no script needs. What the reference imports and the machine lacks can be imported by its modules, and says so when
it is used; other libraries, which look whether such packages are there, do not see them.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import MappingProxyType, ModuleType
from typing import Any

from ..errors import ConfigError

PACKAGE = "liveavatar"
BACKEND: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "liveavatar.models.wan.causal_s2v_pipeline": {"WanS2V": "WanS2V"},
        "liveavatar.models.wan.causal_s2v_pipeline_tpp": {"WanS2V": "TppWanS2V"},
        "liveavatar.models.wan.causal_s2v_pipeline_tpp_blockwise": {"WanS2V": "BlockwiseWanS2V"},
        "liveavatar.utils.fp8_linear": {"replace_linear_with_scaled_fp8": "replace_linear_with_scaled_fp8"},
    }
)
"""Modules of the reference that are ours: their names, by those of `liveavatar_engine.compat`."""
OPTIONAL = frozenset(
    """accelerate cosyvoice cv2 dashscope decord deepspeed diffusers einops insightface librosa modelscope openai peft
    sam2 supervision swanlab torchaudio whisper xfuser""".split()  # noqa: SIM905
)
"""Packages that only some options of the scripts need."""


@contextmanager
def backend_imports() -> Iterator[None]:
    """Change imports as described above; modules of the reference loaded meanwhile are forgotten at the end."""
    finder, real_import = _Finder(), builtins.__import__
    before = {name: module for name, module in sys.modules.items() if _is_reference(name)}
    sys.meta_path.insert(0, finder)
    builtins.__import__ = _tolerant(real_import)
    try:
        yield
    finally:
        builtins.__import__ = real_import
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_reference(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_reference(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


class _Finder(MetaPathFinder):
    """Finds our modules, and packages of the reference to be run later."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in BACKEND:
            return ModuleSpec(fullname, _BackendLoader(BACKEND[fullname]))
        if not _is_reference(fullname):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None and spec.submodule_search_locations is not None:
            spec.loader = _LaterLoader(spec.loader)
        return spec


class _BackendLoader(Loader):
    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def create_module(self, spec: ModuleSpec) -> None:
        """The default one."""

    def exec_module(self, module: ModuleType) -> None:
        ours = importlib.import_module("liveavatar_engine.compat")
        for name, own in self._names.items():
            setattr(module, name, getattr(ours, own))


class _LaterLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LaterPackage(spec.name, self._loader)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


class _LaterPackage(ModuleType):
    """A package whose `__init__` runs when a name is asked for that is none of its modules."""

    def __init__(self, name: str, loader: Loader) -> None:
        super().__init__(name)
        self._loader: Loader | None = loader

    def __getattr__(self, name: str) -> Any:
        loader = self.__dict__.get("_loader")
        if loader is None or (name.startswith("__") and name != "__all__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if not name.startswith("__") and importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        self._loader = None
        try:
            loader.exec_module(self)
        except BaseException:
            self._loader = loader
            raise
        return getattr(self, name)


def _tolerant(real_import: Callable[..., Any]) -> Callable[..., Any]:
    """`__import__` that gives the reference's modules, and no others, a stand-in for an optional package."""

    def tolerant_import(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        try:
            return real_import(name, globals, locals, fromlist, level)
        except ModuleNotFoundError as error:
            package = name.partition(".")[0]
            importer = (globals or {}).get("__name__", "")
            missing = level == 0 and package in OPTIONAL and error.name == package
            if not missing or not (importer == "__main__" or _is_reference(importer)):
                raise
            return _absent(name if fromlist else package, package)

    return tolerant_import


class _AbsentType(type):
    """Classes that can be imported and inherited from; making or calling them raises a ConfigError."""

    package: str

    def __getattr__(cls, name: str) -> _AbsentType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__module__}.{cls.__name__}.{name}", cls.package)

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        raise ConfigError(
            f"this option of the script needs {cls.package}, which is not installed (it calls {cls.__name__}): "
            f"pip install {cls.package}, or leave the option out"
        )


def _absent(name: str, package: str) -> _AbsentType:
    return _AbsentType(name.rpartition(".")[2], (), {"package": package, "__module__": package})
