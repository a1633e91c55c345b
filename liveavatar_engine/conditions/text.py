"""Prompts to text context, through transformers' UMT5 encoder with Wan's weights."""

from __future__ import annotations

import html
import logging
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ..errors import CheckpointError
from ..weights.offload import Fetcher, LayerVisits
from ..weights.tensors import assign, check_names_and_shapes, read_pickle

_log = logging.getLogger(__name__)

_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_WAN_BLOCK = re.compile(r"blocks\.(?P<index>\d+)\.(?P<part>.+)\.weight")


def clean_prompt(prompt: str) -> str:
    """The prompt as the reference tokenises it: mojibake repaired, entities unescaped twice, white space collapsed."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class TextEncoder:
    """Tokenizer and UMT5 encoder of a checkpoint."""

    def __init__(
        self,
        encoder: transformers.UMT5EncoderModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        device: torch.device,
        fetcher: Fetcher | None = None,
    ) -> None:
        """Take an encoder on `device`; or, with a fetcher, one in host memory whose layers visit the device."""
        self._encoder, self._tokenizer, self._device = encoder, tokenizer, device
        self._visits: AbstractContextManager[None] = nullcontext()
        if fetcher is not None:
            self._visits = LayerVisits(list(encoder.encoder.block), fetcher)
            encoder.encoder.final_layer_norm.to(device)

    @classmethod
    def load(
        cls,
        weights: Path,
        tokenizer: Path,
        dtype: torch.dtype,
        device: torch.device,
        fetcher: Fetcher | None = None,
    ) -> TextEncoder:
        """Load Wan's `.pth` and the tokenizer folder beside it; with a fetcher, weights stay in host memory.

        Raises:
            CheckpointError: a file is missing, damaged or not of a UMT5 encoder.
        """
        encoder = _load_encoder(weights, dtype, device if fetcher is None else torch.device("cpu"))
        return cls(encoder, load_tokenizer(tokenizer), device, fetcher)

    def tokenize(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [prompts, length] each: cut to `length` with the end token kept, padded with 0."""
        batch = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=length,
            add_special_tokens=True,
        )
        return batch["input_ids"], batch["attention_mask"]

    @torch.inference_mode()
    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Context of one prompt's tokens: int64 [length] ids and mask -> [valid_tokens, text_dim]."""
        table = self._encoder.shared
        with self._visits:
            embedded = table(ids[None].to(table.weight.device)).to(self._device)
            states = self._encoder(inputs_embeds=embedded, attention_mask=mask[None].to(self._device)).last_hidden_state
        return states[0, : int(mask.sum())]

    def context(self, prompt: str, length: int) -> Tensor:
        """Context of `prompt`: [tokens, text_dim] with at most `length` tokens."""
        ids, mask = self.tokenize([prompt], length)
        return self.encode(ids[0], mask[0])


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in `folder`, never from the network."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its backends raise many types for a damaged folder
        raise CheckpointError(f"{folder}: not a usable tokenizer: {error}") from error


def _load_encoder(path: Path, dtype: torch.dtype, device: torch.device) -> transformers.UMT5EncoderModel:
    state = read_pickle(path)
    config = _encoder_config(path, {name: tuple(tensor.shape) for name, tensor in state.items()})
    with torch.device("meta"):
        encoder = transformers.UMT5EncoderModel(config).eval().requires_grad_(False)
    renamed = {_transformers_name(path, name): tensor for name, tensor in state.items()}
    expected = {name: tuple(t.shape) for name, t in encoder.named_parameters()}
    check_names_and_shapes(path, expected, {name: tuple(t.shape) for name, t in renamed.items()})
    for name, tensor in renamed.items():
        assign(encoder, name, tensor.to(device, dtype))
    encoder.tie_weights()
    return encoder


def _encoder_config(path: Path, shapes: dict[str, tuple[int, ...]]) -> transformers.UMT5Config:
    """UMT5's sizes, which follow from the tensors; constants are UMT5-XXL's."""
    try:
        vocabulary, dim = shapes["token_embedding.weight"]
        inner, _ = shapes["blocks.0.attn.q.weight"]
        ffn, _ = shapes["blocks.0.ffn.fc1.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not the tensors of Wan's UMT5 encoder (no usable {error})") from None
    blocks = {int(match["index"]) for name in shapes if (match := _WAN_BLOCK.fullmatch(name))}
    return transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=ffn,
        num_layers=max(blocks) + 1,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )


def _transformers_name(path: Path, name: str) -> str:
    """Wan's parameter name as transformers calls it."""
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    match = _WAN_BLOCK.fullmatch(name)
    if match is None or match["part"] not in _BLOCK_NAMES:
        raise CheckpointError(f"{path}: {name} is not a tensor of Wan's UMT5 encoder")
    return f"encoder.block.{match['index']}.{_BLOCK_NAMES[match['part']]}.weight"
