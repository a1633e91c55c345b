"""A checkout of the reference: is it one, which version, and does its network have the signature that we call."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from ...config import ModelConfig
from ...errors import InputError

PACKAGE = "liveavatar"
NETWORK_MODULE = "liveavatar.models.wan.causal_model_s2v"
NETWORK_CLASS = "CausalWanModel_S2V"
ATTENTION_MODULE = "liveavatar.models.wan.wan_2_2.modules.attention"
FP8_MODULE = "liveavatar.utils.fp8_linear"
KNOWN_VERSION = "66d77b5 (20 January 2026)"
"""The newest change to the reference's code that this comparison was written against."""

CONSTRUCTOR = tuple(field.name for field in fields(ModelConfig) if field.name != "audio_layers")
"""Arguments of the network's constructor that we give: fields of `ModelConfig`, which have the reference's names."""
_PREFILL = (
    *("x", "t", "context", "seq_len", "ref_latents", "motion_latents", "cond_states", "audio_input", "motion_frames"),
    *("drop_motion_frames", "kv_cache", "crossattn_cache", "current_start", "current_end"),
)
_SIGNATURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"__init__": CONSTRUCTOR, "_forward_inference": (*_PREFILL, "mask"), "_forward_sink": _PREFILL}
)


@dataclass(frozen=True)
class Checkout:
    """The reference in a folder of the user's.

    Attributes:
        root: the folder, absolute.
        version: its git commit where it has one, and in any case a digest of the network's file.
    """

    root: Path
    version: str

    @classmethod
    def find(cls, folder: Path) -> Checkout:
        """Look at `folder` without running anything of it.

        Raises:
            InputError: it is not the reference, or a version whose network is called in another way.
        """
        root = folder.expanduser().resolve()
        if not root.exists():
            raise InputError(f"--reference {folder}: no such folder")
        if not root.is_dir():
            raise InputError(f"--reference {folder}: is a file; expected the folder of a Live Avatar checkout")
        file = root / module_file(NETWORK_MODULE)
        if not file.is_file():
            raise InputError(
                f"--reference {folder}: not a checkout of Live Avatar: {module_file(NETWORK_MODULE)} is not in it"
            )
        source = file.read_bytes()
        _check_signatures(file, source)
        return cls(root, _version(root, source))

    def has(self, module: str) -> bool:
        """Whether the checkout holds the file of `module`."""
        return (self.root / module_file(module)).is_file()


def module_file(module: str) -> Path:
    """Where a checkout keeps a module, relative to its root."""
    return Path(*module.split(".")).with_suffix(".py")


def _check_signatures(file: Path, source: bytes) -> None:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{file}: not a Python file that can be read ({error})") from None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if NETWORK_CLASS not in classes:
        raise InputError(f"{file}: has no class {NETWORK_CLASS}; compare knows the version {KNOWN_VERSION}")
    methods = {node.name: node for node in classes[NETWORK_CLASS].body if isinstance(node, ast.FunctionDef)}
    for name, expected in _SIGNATURES.items():
        if name not in methods:
            raise InputError(f"{file}: {NETWORK_CLASS} has no {name}; compare knows the version {KNOWN_VERSION}")
        arguments = methods[name].args
        found = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        if missing := [argument for argument in expected if argument not in found]:
            raise InputError(
                f"{file}: {NETWORK_CLASS}.{name} has no argument {', '.join(missing)}; "
                f"compare knows the version {KNOWN_VERSION}"
            )


def _version(root: Path, source: bytes) -> str:
    digest = f"{module_file(NETWORK_MODULE).name} sha256 {hashlib.sha256(source).hexdigest()[:12]}"
    if not (root / ".git").exists():
        return digest
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return digest
    return f"commit {commit}, {digest}"
