"""The reference's methods, as listed in signatures.json, and its scripts' flags, as listed in flags.json."""

import inspect
import json
import re
from pathlib import Path

import pytest

from liveavatar_engine import compat

FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
SIGNATURES = json.loads((Path(__file__).parent / "signatures.json").read_text())


@pytest.mark.parametrize("script", FLAGS)
def test_the_migration_page_names_every_flag(script: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    assert [flag for flag in FLAGS[script] if not re.search(rf"`{flag}[` ]", page)] == []


@pytest.mark.parametrize("method", SIGNATURES)
def test_signature(method: str) -> None:
    owner, name = method.split(".")
    own, *parameters = inspect.signature(getattr(getattr(compat, owner), name)).parameters.values()
    assert own.name == "self"
    assert all(parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    ours = [
        [parameter.name] if parameter.default is inspect.Parameter.empty else [parameter.name, parameter.default]
        for parameter in parameters
    ]
    assert json.loads(json.dumps(ours)) == SIGNATURES[method]
