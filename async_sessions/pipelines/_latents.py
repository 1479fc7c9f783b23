"""A look at latents without decoding them. Needs the extra `wan`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

SIDE: Final = 256  # pixels of the picture that the colours are fitted to: at least 256 latent pixels
LONGEST: Final = 160  # pixels of a preview: its WebP stays far below the 64 KiB that an event may carry


class LatentColours:
    """An affine map from the channels of a latent pixel to its colour, fitted to the model's own VAE by least squares.

    It is fitted to one picture of chance, coarse colours below fine ones, which the VAE encodes when the model is
    loaded: no table of numbers has to know the VAE. What it shows is coarse and its colours are approximate, as far as
    they are an affine matter at all.
    """

    def __init__(self, vae: AutoencoderKLWan, device: torch.device) -> None:
        self._mean, self._std = (
            torch.tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        picture = _picture()
        with torch.no_grad():
            samples = (picture * 2 - 1).unsqueeze(2).to(device, vae.dtype)
            encoded: Any = vae.encode(samples)
        latents = (encoded.latent_dist.mode()[0, :, 0].float().cpu() - self._mean) / self._std
        colours = avg_pool2d(picture, SIDE // latents.shape[-1])[0].flatten(1).T
        terms = _terms(latents)
        # A little ridge: channels that say nothing of the colour get no say.
        ridge = 1e-4 * len(terms) * torch.eye(terms.shape[1])
        self._map = torch.linalg.solve(terms.T @ terms + ridge, terms.T @ colours)

    def webp(self, latents: torch.Tensor) -> bytes:
        """The middle frame of `latents` (channels x frames x height x width, normalised), as a small WebP file."""
        middle = latents[:, latents.shape[1] // 2].detach().float().cpu()
        height, width = middle.shape[1:]
        colours = (_terms(middle) @ self._map).clamp(0, 1).mul(255).round().to(torch.uint8)
        image = Image.fromarray(colours.view(height, width, 3).numpy())
        image.thumbnail((LONGEST, LONGEST))
        written = io.BytesIO()
        image.save(written, "WEBP", quality=75)
        return written.getvalue()


def _terms(latents: torch.Tensor) -> torch.Tensor:
    """A row a latent pixel: its channels, and a one."""
    channels = latents.flatten(1)
    return torch.cat([channels, torch.ones(1, channels.shape[1])]).T


def _picture() -> torch.Tensor:
    """1 x 3 x SIDE x SIDE in [0, 1], the same every time: coarse patches of colour, with ever weaker finer ones."""
    chance = torch.Generator().manual_seed(0)
    picture = torch.full((1, 3, SIDE, SIDE), 0.5)
    for cells in (2, 4, 8, 16, 32):
        patches = torch.rand((1, 3, cells, cells), generator=chance) - 0.5
        picture += interpolate(patches, (SIDE, SIDE), mode="bicubic") / cells**0.5
    return picture.clamp(0, 1)
