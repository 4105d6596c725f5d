"""The project's own small text-to-image model: a stock Stable Diffusion pipeline for 64x64 images of MiniLM texts.

`models/base` holds the autoencoder, the U-Net and the scheduler; the text encoder is the packaged all-MiniLM-L6-v2.
"""

import copy
import json
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import diffusers
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

from sage.errors import ConfigurationError, DataError
from sage.files import new_folder, write_json
from sage.packaged import minilm_folder

PIXELS = 64
LATENT_SIZE = 8
LATENT_CHANNELS = 32
MAX_TOKENS = 44
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "BertTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def text_parts() -> tuple[PreTrainedTokenizerBase, BertModel]:
    """Return the tokenizer and the text encoder, set up for StableDiffusionPipeline."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), model_max_length=MAX_TOKENS, local_files_only=True)
    encoder = BertModel.from_pretrained(minilm_folder(), local_files_only=True)
    # With this, StableDiffusionPipeline.encode_prompt passes the attention mask, so the encoder ignores padding.
    encoder.config.use_attention_mask = True
    return tokenizer, encoder.requires_grad_(False).eval()


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder: (3, 64, 64) images in [-1, 1] to (32, 8, 8) latents."""
    channels = (16, 32, 64, 128)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,  # groups of one channel each would take the colour of flat areas away
        sample_size=PIXELS,
    )


def new_unet() -> UNet2DConditionModel:
    """Return an untrained U-Net on (32, 8, 8) latents and 384-wide text states."""
    channels = (96, 192)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=8,  # by default 32, of three channels: 1.5% more loss after 440 steps
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    """Return DPM-Solver++ (Lu et al., 2022) for v-prediction with zero terminal SNR (Lin et al., 2023).

    It needs fewer steps than DDIM here, in independent and in shared sampling (docs/results.md).
    """
    return DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def assemble(autoencoder: Any, unet: UNet2DConditionModel, scheduler: Any = None) -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline of these parts with the project's text encoder; default: its scheduler."""
    tokenizer, encoder = text_parts()
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler or new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write autoencoder and U-Net in half precision and the scheduler, atomically; the text encoder is not saved."""
    with new_folder(folder) as temporary:
        for name in ("vae", "unet"):
            half = copy.deepcopy(getattr(pipeline, name)).half()
            half.save_pretrained(temporary / name, safe_serialization=True)
        pipeline.scheduler.save_pretrained(temporary / "scheduler")
        kinds = {name: ["diffusers", type(getattr(pipeline, name)).__name__] for name in ("vae", "scheduler")}
        write_json(temporary / "model_index.json", _INDEX | kinds)


def is_own(folder: Path) -> bool:
    """Return whether a folder holds a pipeline as `save` writes it, whose text encoder is the packaged one."""
    index = folder / "model_index.json"
    if not index.exists() or (folder / "text_encoder").exists():
        return False
    return bool(json.loads(index.read_text(encoding="utf-8")).get("text_encoder") == _INDEX["text_encoder"])


def load(folder: Path, torch_dtype: torch.dtype = torch.float32, **parts: Any) -> StableDiffusionPipeline:
    """Return a saved pipeline, with the text encoder of the installed package and with the given parts.

    Raises DataError if one of the model's parts is missing from the folder, ConfigurationError for an unknown part.
    """
    missing = [name for name in ("model_index.json", "vae", "unet", "scheduler") if not (folder / name).exists()]
    if missing:
        raise DataError(
            f"{folder} is no base model: it lacks {', '.join(missing)}. Run `sage pretrain` or restore models/."
        )
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    autoencoder, scheduler = (getattr(diffusers, index[name][1]) for name in ("vae", "scheduler"))
    pipeline = assemble(
        autoencoder.from_pretrained(folder / "vae", dtype=torch.float32, use_safetensors=True).eval(),
        UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32, use_safetensors=True).eval(),
        scheduler.from_pretrained(folder / "scheduler"),
    )
    if unknown := sorted(set(parts) - set(pipeline.components)):
        raise ConfigurationError(
            f"{folder} is a base model, which is loaded without {', '.join(unknown)}; give torch_dtype or one of its "
            f"parts, {', '.join(sorted(pipeline.components))}"
        )
    pipeline.register_modules(**parts)
    return pipeline if torch_dtype == torch.float32 else pipeline.to(torch_dtype)
