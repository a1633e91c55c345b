"""What processes of a pipeline tell each other: small facts and tensors, as bytes.

A record is a JSON header and, if it carries tensors, a safetensors file behind it. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

_LENGTH_BYTES = 4


@dataclass(frozen=True)
class Record:
    """A message.

    Attributes:
        kind: what it says.
        fields: JSON values.
        tensors: any dtype; they arrive on the CPU.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def encode(self) -> bytes:
        """As bytes; waits for tensors on a GPU."""
        header = json.dumps([self.kind, dict(self.fields)]).encode()
        body = safetensors.torch.save(_apart(self.tensors)) if self.tensors else b""
        return b"".join((len(header).to_bytes(_LENGTH_BYTES, "little"), header, body))

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """What `encode` made."""
        start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        kind, fields = json.loads(data[_LENGTH_BYTES:start])
        body = data[start:]
        return cls(kind, fields, safetensors.torch.load(body) if body else {})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in the same memory, which safetensors refuses."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        memory = here.untyped_storage().data_ptr()
        apart[name] = here.clone() if memory in taken else here
        taken.add(memory)
    return apart
