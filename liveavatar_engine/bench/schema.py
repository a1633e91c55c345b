"""The JSON document's shape, checked: tests and the gate refuse a document that says something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .results import FAILED, MEASURED, NOT_RUN, SCHEMA, SIMULATED, VERSION

Check = Callable[[str, Any], list[str]]
"""Complaints about the value at a place of the document."""


def validate(document: Any) -> list[str]:
    """What is wrong with a document, place by place; empty for a right one."""
    return _DOCUMENT("document", document)


def _kind(*kinds: type, none: bool = False) -> Check:
    def check(place: str, value: Any) -> list[str]:
        if value is None and none:
            return []
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if right and (not isinstance(value, float) or math.isfinite(value)):
            return []
        names = " or ".join([kind.__name__ for kind in kinds] + (["null"] if none else []))
        return [f"{place}: expected {names}, not {value!r}"]

    return check


def _exactly(*values: Any) -> Check:
    def check(place: str, value: Any) -> list[str]:
        if value in values and not isinstance(value, bool):
            return []
        return [f"{place}: expected {' or '.join(map(repr, values))}, not {value!r}"]

    return check


def _fields(fields: Mapping[str, Check], none: bool = False) -> Check:
    def check(place: str, value: Any) -> list[str]:
        if value is None and none:
            return []
        if not isinstance(value, dict):
            return [f"{place}: expected an object, not {value!r}"]
        complaints = [f"{place}: lacks {name}" for name in fields if name not in value]
        complaints += [f"{place}: knows no {name}" for name in value if name not in fields]
        for name, field in fields.items():
            if name in value:
                complaints += field(f"{place}.{name}", value[name])
        return complaints

    return check


def _each(entry: Check) -> Check:
    def check(place: str, value: Any) -> list[str]:
        if not isinstance(value, list):
            return [f"{place}: expected a list, not {value!r}"]
        return [one for number, item in enumerate(value) for one in entry(f"{place}[{number}]", item)]

    return check


def _by_name(entry: Check) -> Check:
    def check(place: str, value: Any) -> list[str]:
        if not isinstance(value, dict):
            return [f"{place}: expected an object, not {value!r}"]
        return [one for name, item in value.items() for one in entry(f"{place}.{name}", item)]

    return check


_TEXT, _NUMBER, _FLAG, _OBJECT = _kind(str), _kind(int, float), _kind(bool), _kind(dict)
_NUMBER_OR_NONE, _TEXT_OR_NONE = _kind(int, float, none=True), _kind(str, none=True)

_ENVIRONMENT = _fields(
    {
        "command": _TEXT,
        "commit": _TEXT,
        "dirty": _kind(bool, none=True),
        "device": _TEXT,
        "device_kind": _exactly("cuda", "cpu"),
        "capability": _kind(list, none=True),
        "memory_bytes": _NUMBER,
        "versions": _by_name(_TEXT_OR_NONE),
        "date": _TEXT,
    }
)
_STAGE = _fields(
    {
        "name": _TEXT,
        "ms": _NUMBER,
        "calls": _NUMBER,
        "per_block": _FLAG,
        **dict.fromkeys(("flops", "bytes", "tflops", "gbps", "datasheet", "measured"), _NUMBER_OR_NONE),
    }
)
_SERIES = _fields(
    {
        "unit": _TEXT,
        "label": _TEXT,
        "values": _each(_NUMBER),
        **dict.fromkeys(("deadline", "p50", "p99"), _NUMBER_OR_NONE),
    }
)
_RUN_FIELDS = _fields(
    {
        "suite": _TEXT,
        "settings": _OBJECT,
        "status": _exactly(MEASURED, SIMULATED, NOT_RUN, FAILED),
        "reason": _TEXT_OR_NONE,
        "seconds": _NUMBER,
        "warm_up": _TEXT,
        "figures": _by_name(_fields({"value": _NUMBER_OR_NONE, "unit": _TEXT, "label": _TEXT})),
        "series": _by_name(_SERIES),
        "stages": _each(_STAGE),
        "rows": _each(_OBJECT),
        "notes": _each(_TEXT),
        "problems": _each(_TEXT),
    }
)


def _run(place: str, value: Any) -> list[str]:
    complaints = _RUN_FIELDS(place, value)
    if complaints:
        return complaints
    if value["status"] in (MEASURED, SIMULATED):
        return [] if value["reason"] is None else [f"{place}.reason: a run that was {value['status']} has none"]
    if not value["reason"]:
        complaints.append(f"{place}.reason: missing, the run was {value['status']}")
    return complaints


_DOCUMENT = _fields(
    {
        "schema": _exactly(SCHEMA),
        "version": _exactly(VERSION),
        "complete": _FLAG,
        "environment": _ENVIRONMENT,
        "ceilings": _fields(
            {"copy_gbps": _NUMBER, "matmul_tflops": _NUMBER, "e4m3_tflops": _NUMBER_OR_NONE, "dtype": _TEXT}, none=True
        ),
        "limits": _fields(dict.fromkeys(("bf16", "e4m3", "memory"), _NUMBER), none=True),
        "runs": _each(_run),
    }
)
