"""Wan2.2 models with the parts and the plumbing of the real ones, a few thousand weights of chance: no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_WIDTH: Final = 32
SENTENCES: Final = ("a dog runs on the beach", "slow camera pan over a city at night", "static, blurred, subtitles")


def save_tiny_models(folder: Path) -> dict[str, Path]:
    """Their folders by name, as `from_pretrained` reads them; 0.5 MB each."""
    torch.set_num_threads(1)  # for so little work they only get into each other's way
    return {name: save_tiny(name, folder / name) for name in ("t2v-A14B", "i2v-A14B", "ti2v-5B")}


def save_tiny(name: str, folder: Path) -> Path:
    tokenizer = _tokenizer()
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(len(tokenizer)),
        "vae": _vae(name),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    }
    pipe: Any
    if name == "t2v-A14B":
        experts = {"transformer": _transformer(16, 16, 2), "transformer_2": _transformer(16, 16, 3)}
        pipe = WanPipeline(**parts, **experts, boundary_ratio=0.875)
    elif name == "i2v-A14B":  # 16 channels of noise, 16 of the images, 4 of a mask
        experts = {"transformer": _transformer(36, 16, 2), "transformer_2": _transformer(36, 16, 3)}
        pipe = WanImageToVideoPipeline(**parts, **experts, boundary_ratio=0.9)
    else:
        pipe = WanPipeline(**parts, transformer=_transformer(48, 48, 2), expand_timesteps=True)
    pipe.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=256,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[*map(chr, range(32, 127)), "\u2581"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair=None, special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _text_encoder(words: int) -> Any:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=words,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return UMT5EncoderModel(config).eval()


def _vae(name: str) -> Any:
    """It works on squares of 2 x 2 pixels, which only ti2v-5B's own does: the same latents for a fifth of the time."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "base_dim": 4,
        "num_res_blocks": 1,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
    }
    if name != "ti2v-5B":
        sides = {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "scale_factor_spatial": 8}
        return AutoencoderKLWan(z_dim=16, **sides, **shape).eval()
    return AutoencoderKLWan(
        decoder_base_dim=4,
        z_dim=48,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        is_residual=True,
        dim_mult=[1, 1, 1, 1],
        temperal_downsample=[False, True, True],
        scale_factor_spatial=16,
        **shape,
    ).eval()


def _transformer(channels_in: int, channels_out: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels_in,
        out_channels=channels_out,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()
