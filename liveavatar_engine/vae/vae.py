"""The VAE as the engine uses it: encode a video or a still image, decode a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.tensors import assign, check_names_and_shapes, read_pickle
from .coders import Decoder, Encoder
from .layers import CausalConv3d, History
from .shape import VaeShape

# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on
"""Statistics of Wan 2.1's latents, by which they are normalised; they stand in no checkpoint file."""

FRAMES_PER_STEP = 4
"""Video frames that make one latent frame after the first."""


class Vae(nn.Module):
    """Wan 2.1's VAE. Latents are normalised; pixels are in [-1, 1].

    The encoder runs in float32 whatever the engine's precision: conditions are encoded once and steer everything.
    """

    def __init__(self, shape: VaeShape) -> None:
        super().__init__()
        if shape.latent_channels != len(LATENT_MEAN):
            raise CheckpointError(f"VAE with {shape.latent_channels} latent channels, expected {len(LATENT_MEAN)}")
        channels = shape.latent_channels
        self.encoder = Encoder(shape)
        self.conv1 = CausalConv3d(2 * channels, 2 * channels, (1, 1, 1))
        self.conv2 = CausalConv3d(channels, channels, (1, 1, 1))
        self.decoder = Decoder(shape)

    @torch.inference_mode()
    def encode(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents of a video given frame by frame, as soon as each is complete.

        Args:
            frames: [3, height, width] each, in [-1, 1]; the first alone, then groups of four, make a latent frame. An
                incomplete last group is left out.

        Yields:
            float32 [latent_channels, height / 8, width / 8].
        """
        history, group = History(), []
        for index, frame in enumerate(frames):
            group.append(frame)
            if index == 0 or len(group) == FRAMES_PER_STEP:
                yield self._encode_step(torch.stack(group, dim=1), history)
                group = []

    @torch.inference_mode()
    def encode_still(self, image: Tensor, latents: int) -> Tensor:
        """Latents of an image that stands still.

        Encoding stops where it must repeat itself: once a step leaves the encoder's history as it was, bit for bit,
        every later latent equals the last.

        Args:
            image: [3, height, width] in [-1, 1].
            latents: how many latent frames; 4 * latents - 3 video frames.

        Returns:
            float32 [latent_channels, latents, height / 8, width / 8].
        """
        history = History()
        encoded = [self._encode_step(image[:, None], history)]
        group = image[:, None].expand(-1, FRAMES_PER_STEP, -1, -1)
        while len(encoded) < latents:
            before = history.copy()
            encoded.append(self._encode_step(group, history))
            if history.equals(before):
                encoded += [encoded[-1]] * (latents - len(encoded))
        return torch.stack(encoded, dim=1)

    def decoder_stream(self) -> DecoderStream:
        """A decoder at the start of a video."""
        return DecoderStream(self)

    def _encode_step(self, pixels: Tensor, history: History) -> Tensor:
        weight = self.conv1.weight
        moments = self.conv1.step(self.encoder.step(pixels[None].to(weight.device, weight.dtype), history), history)
        mean, _ = moments[0, :, 0].chunk(2)
        latent_mean, latent_std = _statistics(mean)
        return (mean - latent_mean) / latent_std


class DecoderStream:
    """Decodes a stream latent by latent, carrying its causal history; any chunking gives the same frames."""

    def __init__(self, vae: Vae) -> None:
        self._vae = vae
        self._history = History()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of the next latent frames.

        Args:
            latents: [latent_channels, frames, height / 8, width / 8], normalised.

        Returns:
            float32 [3, video_frames, height, width], clamped to [-1, 1]: four video frames a latent frame, but one for
            the stream's first.
        """
        weight = self._vae.conv2.weight
        mean, std = _statistics(latents.to(weight.device))
        scaled = (latents.to(weight.device) * std[:, None] + mean[:, None])[None].to(weight.dtype)
        hidden = self._vae.conv2.step(scaled, self._history)
        steps = [self._vae.decoder.step(latent, self._history) for latent in hidden.split(1, dim=2)]
        return torch.cat(steps, dim=2)[0].float().clamp(-1, 1)


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, [latent_channels, 1, 1] each."""
    mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (LATENT_MEAN, LATENT_STD))
    return mean[:, None, None], std[:, None, None]


def to_uint8(pixels: Tensor) -> Tensor:
    """[3, frames, height, width] in [-1, 1] -> uint8 [frames, height, width, 3], rounded to nearest."""
    return ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8)


def load_vae(path: Path, dtype: torch.dtype, device: torch.device) -> Vae:
    """Load `Wan2.1_VAE.pth`: the decoder in `dtype`, the encoder in float32.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not those of a Wan 2.1 VAE.
    """
    state = read_pickle(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        shape = VaeShape.of_tensors(shapes)
        with torch.device("meta"):
            vae = Vae(shape).eval().requires_grad_(False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    check_names_and_shapes(path, {name: tuple(t.shape) for name, t in vae.state_dict().items()}, shapes)
    for name, tensor in state.items():
        decodes = name.startswith(("decoder.", "conv2."))
        assign(vae, name, tensor.to(device, dtype if decodes else torch.float32))
    return vae
