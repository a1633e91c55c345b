"""Names, order and defaults of the reference's methods, as listed in signatures.json."""

import inspect
import json
from pathlib import Path

import pytest

from liveavatar_engine import compat

SIGNATURES = json.loads((Path(__file__).parent / "signatures.json").read_text())


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
