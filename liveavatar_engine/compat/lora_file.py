"""Finding the adapter that a script of the reference names: a file, a folder, or a model on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

ADAPTER = "liveavatar.safetensors"
HUB_CACHE = Path("ckpt/LiveAvatar")
"""Where the reference keeps what it downloads, relative to the working directory; also where its README puts it."""


def adapter_file(name: str | Path) -> Path:
    """The adapter's file. What looks like a hub name, "owner/model", and is no path, is downloaded unless it is there.

    Raises:
        CheckpointError: there is no such file, or it cannot be downloaded.
    """
    path = Path(name)
    if path.is_dir():
        path = path / ADAPTER
    if path.is_file():
        return path
    text = str(name)
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1 or path.suffix:
        raise CheckpointError(f"LoRA {text}: no such file, and not a name on the Hugging Face hub (owner/model)")
    local = HUB_CACHE / ADAPTER
    return local if local.is_file() else _from_hub(text)


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    kept = try_to_load_from_cache(repository, ADAPTER, cache_dir=HUB_CACHE)
    if isinstance(kept, str):
        return Path(kept)
    try:
        return Path(hf_hub_download(repository, ADAPTER, cache_dir=HUB_CACHE))
    except Exception as error:  # the hub's client raises many types, among them those of its transport
        raise CheckpointError(
            f"LoRA {repository}: neither a file nor at {HUB_CACHE / ADAPTER}, and the Hugging Face hub does not give "
            f"it: {error}"
        ) from error
