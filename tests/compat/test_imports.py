"""What a script of the reference finds when it imports, and what others find meanwhile."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from liveavatar_engine import compat
from liveavatar_engine.compat.imports import OPTIONAL, backend_imports
from liveavatar_engine.errors import ConfigError

CHECKOUT = Path(__file__).parent / "reference_like"


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(CHECKOUT))
    with backend_imports():
        yield


def _as(importer: str, statement: str) -> dict[str, Any]:
    """Names after an import statement in a module called `importer`."""
    names: dict[str, Any] = {"__name__": importer, "__builtins__": builtins}
    exec(statement, names)
    return names


def test_the_backend_is_found_in_place_of_the_pipelines(imports: None) -> None:
    for module, kind in (
        ("causal_s2v_pipeline", compat.WanS2V),
        ("causal_s2v_pipeline_tpp", compat.TppWanS2V),
        ("causal_s2v_pipeline_tpp_blockwise", compat.BlockwiseWanS2V),
    ):
        assert importlib.import_module(f"liveavatar.models.wan.{module}").WanS2V is kind
    assert _as("__main__", "import liveavatar.utils.fp8_linear as fp8")["fp8"].replace_linear_with_scaled_fp8 is (
        compat.replace_linear_with_scaled_fp8
    )


def test_a_package_runs_when_a_name_of_its_own_is_asked_for(imports: None) -> None:
    models = importlib.import_module("liveavatar.models")
    assert "liveavatar.models.wan.wrapper" not in sys.modules
    for _ in range(2):
        with pytest.raises(AssertionError, match="must not need this"):
            _ = models.Wrapper
    configs = importlib.import_module("liveavatar.models.wan.wan_2_2.configs")
    assert configs.WAN_CONFIGS
    with pytest.raises(AttributeError, match="has no attribute 'NOTHING'"):
        _ = configs.NOTHING


def test_a_module_of_a_package_runs_no_package(imports: None) -> None:
    assert _as("__main__", "from liveavatar.models.wan.wan_2_2 import configs")["configs"].MAX_AREA_CONFIGS


def test_what_is_missing_can_be_imported_but_not_used(imports: None) -> None:
    names = _as(
        "liveavatar.utils.tool", "import dashscope\nfrom dashscope.api.deep import Client\nimport sam2.a.b as b"
    )
    for use in (names["dashscope"].connect, names["Client"], type("Own", (names["Client"],), {}), names["b"].build):
        with pytest.raises(ConfigError, match=r"needs (dashscope|sam2), which is not installed .*pip install"):
            use()


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("transformers.utils", "import dashscope"),
        ("liveavatar.utils.tool", "import nobody_has_this"),
        ("liveavatar.utils.tool", "from . import nothing_here"),
        ("__main__", "from liveavatar.utils import nothing_here"),
    ],
)
def test_other_imports_fail_as_ever(importer: str, statement: str, imports: None) -> None:
    with pytest.raises(ImportError):
        exec(statement, {"__name__": importer, "__package__": importer.rpartition(".")[0], "__builtins__": builtins})


def test_nobody_else_sees_what_is_missing(imports: None) -> None:
    _as("__main__", "import dashscope")
    assert "dashscope" not in sys.modules
    assert importlib.util.find_spec("dashscope") is None


def test_what_is_installed_is_used(imports: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decord.py").write_text("import einops_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="einops_is_not_there"):
        _as("__main__", "import decord")


def test_the_packages_of_the_tests_are_missing_here() -> None:
    assert {"dashscope", "sam2"} <= OPTIONAL
    assert not any(importlib.util.find_spec(package) for package in ("dashscope", "sam2"))
