"""Tiny random pipelines of every family, with real tokenizers made from a handful of tokens."""

import json
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["red cat", "red dog", "blue cat", "a tall tree", "tall trees"]
GROUPS = [[0, 1, 2], [3, 4]]
TOKENS = 16


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def autoencoder(**kwargs: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        **kwargs,
    ).eval()


def clip_config(**kwargs: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **kwargs,
    )


def unet(**kwargs: Any) -> UNet2DConditionModel:
    network = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            **kwargs,
        }
    ).eval()
    # Untrained, a prompt would hardly change the picture.
    for name, weight in network.named_parameters():
        if "attn2.to_out.0.weight" in name:
            weight.data.mul_(20)
    return network


def stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(folder),
        unet=unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter and an end; padding as T5 has it."""
    tokens = ["<pad>", "</s>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def t5(width: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    return T5EncoderModel(config).eval()


def projected_clip() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_config(projection_dim=16, hidden_act="gelu")).eval()


def stable_diffusion_xl(folder: Path) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        text_encoder_2=projected_clip(),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
    )


def stable_diffusion_3(folder: Path) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        vae=autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=projected_clip(),
        text_encoder_2=projected_clip(),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def pixart_alpha(folder: Path) -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=autoencoder(),
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def flux(folder: Path, guidance: bool = True) -> FluxPipeline:
    """FLUX.1 dev, or schnell, whose network does not take the guidance scale and whose shift is none."""
    torch.manual_seed(0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
        vae=autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(clip_config()).eval(),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance,
        ).eval(),
    )


FAMILIES = {make.__name__: make for make in (stable_diffusion, stable_diffusion_xl, stable_diffusion_3, pixart_alpha)}
# What a family's stock pipeline needs to be told at this size.
OPTIONS: dict[str, dict[str, Any]] = {
    "stable_diffusion_3": {"max_sequence_length": 20},
    "pixart_alpha": {"use_resolution_binning": False, "max_sequence_length": 20},
    "flux": {"max_sequence_length": 20},
}
# What can be fine-tuned: these, and of the segment driver's.
TRAINED = FAMILIES | {"flux": flux}


def safety_checker() -> dict[str, Any]:
    """Return a checker that finds something in some images, and its feature extractor, by the names of the parts."""
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(projection_dim=4, vision_config=vision | {"image_size": 16, "patch_size": 8})
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(-0.2)
    torch.nn.init.normal_(checker.concept_embeds)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    return {"safety_checker": checker, "feature_extractor": extractor}


def overflow_at(letter: str, pipe: Any) -> None:
    """Let the text encoder of a Stable Diffusion pipeline overflow at prompts with this letter."""
    token = pipe.tokenizer(letter, add_special_tokens=False).input_ids[0]
    pipe.text_encoder.get_input_embeddings().weight.data[token] = torch.inf


def pipeline(family: str, folder: Path) -> DiffusionPipeline:
    pipe = TRAINED[family](folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
