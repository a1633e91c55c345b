"""Kernels on a GPU: right at small sizes and the model's, the same bits twice, in graphs that follow what they read.

The cases and tolerances are those of tests/kernels, which runs the same kernels in Triton's interpreter. Imports
nothing beyond torch, numpy, safetensors, transformers and pytest: the machine with the GPU has no more.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.model_sizes import WAN_14B

from liveavatar_engine.bench.kernels.checks import Arguments, Judge, Outputs, bits, duplicate
from liveavatar_engine.bench.kernels.rows import TRUTHS
from liveavatar_engine.bench.kernels.subjects import (
    CAUSAL_CONV3D,
    CROSS_ATTENTION,
    MODULATED_NORM,
    ONE_BUFFER,
    PAIR,
    RING_ATTENTION,
    RING_WRITE,
    SUBJECTS,
    Candidate,
    Subject,
)
from liveavatar_engine.bench.kernels.timing import CudaClock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda:0")
AT_MODEL_SIZE = ("cudnn", "fa2", "fa3")
"""Libraries that need not take every small shape, unless an op picks them unasked."""

Input = tuple[Subject, Any, torch.dtype]
SMALL: list[Input] = [
    (subject, case, dtype)
    for subject in SUBJECTS
    if subject is not PAIR
    for case in subject.cases
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]
LARGE: list[Input] = [
    (subject, case, torch.bfloat16)
    for subject in SUBJECTS
    if subject is not PAIR
    for case in subject.model_cases(WAN_14B)
]
INPUTS = [*SMALL, *LARGE]
IN_BF16 = [number for number, (_, _, dtype) in enumerate(SMALL) if dtype == torch.bfloat16]
SPLIT = [
    number
    for number, (subject, case, _) in enumerate(INPUTS)
    if number >= len(SMALL) and subject is RING_ATTENTION and case.tokens == max(WAN_14B.block_tokens)
]
"""Attention whose last wave is split over keys."""


def _name(number: int) -> str:
    subject, case, dtype = INPUTS[number]
    return f"{subject.name}, {case.name}, {str(dtype).removeprefix('torch.')}"


def _implementations(number: int) -> list[str]:
    """Those that must be right on an input, if they can run."""
    subject, case, _ = INPUTS[number]
    names = [one.implementation for one in subject.candidates(case, torch.device("cpu"))]
    if number < len(SMALL):
        optional = () if subject is CAUSAL_CONV3D else AT_MODEL_SIZE
        return [name for name in names if name not in (*TRUTHS, *optional) and ONE_BUFFER not in name]
    libraries = subject.libraries if subject.rivals(case) != case.name else ()
    return [name for name in names if name not in (*TRUTHS, *libraries)]


by_input = pytest.mark.parametrize("number", [*IN_BF16, *SPLIT], ids=_name)
by_implementation = pytest.mark.parametrize(
    ("number", "implementation"),
    [
        pytest.param(number, name, id=f"{_name(number)}, {name}")
        for number in range(len(INPUTS))
        for name in _implementations(number)
    ],
)


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    _judged.cache_clear()


@lru_cache(maxsize=1)
def _judged(number: int) -> tuple[Arguments, Judge]:
    subject, case, dtype = INPUTS[number]
    arguments = subject.arguments(case, dtype, GPU, 0)
    return arguments, subject.judge(case, arguments)


def _candidate(number: int, implementation: str) -> Candidate:
    subject, case, _ = INPUTS[number]
    (one,) = (one for one in subject.candidates(case, GPU) if one.implementation == implementation)
    if one.absent is not None:
        pytest.skip(one.absent)
    return one


def _run(one: Candidate, arguments: Arguments) -> Outputs:
    """What it makes of a copy of the arguments."""
    try:
        return one.run(one.prepare(duplicate(arguments)))
    except KernelUnavailableError as error:
        pytest.skip(str(error))


def _complaints(judge: Judge, implementation: str, outputs: Outputs) -> list[str]:
    return [str(finding) for finding in judge(implementation, outputs) if not finding.passes]


@by_implementation
def test_right_and_the_same_twice(number: int, implementation: str) -> None:
    one = _candidate(number, implementation)
    arguments, judge = _judged(number)
    outputs = _run(one, arguments)
    assert not _complaints(judge, implementation, outputs)
    if not one.library:
        for first, second in zip(outputs, _run(one, arguments), strict=True):
            assert bits(first).equal(bits(second)), "not deterministic"


def _others(number: int) -> tuple[Any, Arguments]:
    """The same shapes with other contents: other numbers, another window, slot or grouping."""
    subject, case, dtype = INPUTS[number]
    if subject is RING_WRITE:
        free = case.cache_tokens - case.tokens
        case = replace(case, start=0 if case.start else free if case.quantized else case.cache_tokens - 1)
    if subject is MODULATED_NORM and case.ends:
        case = replace(case, ends=(*(end // 2 for end in case.ends[:-1]), case.ends[-1]))
    if subject is CROSS_ATTENTION:
        views = ((case.slots - 1 - slot, tokens // 2, padding + 1) for slot, tokens, padding in case.views)
        case = replace(case, views=tuple(views))
    arguments = subject.arguments(case, dtype, GPU, 1)
    if subject is RING_WRITE:
        arguments["at"][0] = 0
    if subject is RING_ATTENTION:
        for name in ("ring", "sink"):
            for tensor in arguments[name][:4]:
                if tensor is not None:
                    first = tensor[0].clone()
                    tensor[0].copy_(tensor[1])
                    tensor[1].copy_(first)
        window = arguments["window"]
        window.segments[..., 1] = (window.segments[..., 1] + 1) // 2
        arguments["window"] = window._replace(slots=1 - window.slots, shift=window.shift.flip(0))
    return case, arguments


def _copy(target: Any, source: Any) -> None:
    """Overwrite the tensors of arguments in place."""
    if isinstance(target, torch.Tensor):
        target.copy_(source)
    elif isinstance(target, dict):
        for name, value in target.items():
            _copy(value, source[name])
    elif isinstance(target, tuple):
        for ours, theirs in zip(target, source, strict=True):
            _copy(ours, theirs)


@pytest.mark.parametrize(
    ("number", "implementation"),
    [
        pytest.param(number, name, id=f"{_name(number)}, {name}")
        for number in (*IN_BF16, *SPLIT)
        for name in (("triton", "cudnn") if INPUTS[number][0] is CAUSAL_CONV3D else ("triton",))
    ],
)
def test_graph_follows_what_it_reads(number: int, implementation: str) -> None:
    """Numbers, windows and slots change between replays; what was captured does not."""
    subject = INPUTS[number][0]
    one = _candidate(number, implementation)
    arguments, judge = _judged(number)
    static = duplicate(arguments)
    _run(one, arguments)  # compiles
    held: list[Outputs] = []
    replay = CudaClock().capture(lambda: held.append(one.run(static)))
    other_case, others = _others(number)
    other_judge = subject.judge(other_case, others)
    for contents, judged in ((arguments, judge), (others, other_judge), (arguments, judge)):
        _copy(static, contents)
        replay()
        torch.cuda.synchronize()
        assert not _complaints(judged, implementation, held[0])


@pytest.mark.parametrize("implementation", ["triton", None], ids=["triton", "the op's choice"])
@by_input
def test_never_waits_for_the_device(number: int, implementation: str | None) -> None:
    subject, case, _ = INPUTS[number]
    one = _candidate(number, "triton")
    arguments = duplicate(_judged(number)[0])
    _run(one, arguments)
    assert not CudaClock().reads_the_device(lambda: subject.run(case, arguments, implementation))
