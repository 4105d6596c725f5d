"""Tiny random pipelines of the families, and embeddings in place of text encoders."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import diffusers
import tiny as own
import torch
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from tiny import autoencoder, t5, t5_tokenizer, unet
from torch import Tensor
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model

FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass
class Tiny:
    """A pipeline; shapes of the embeddings of one prompt by argument; arguments of a call.

    `embeddings` with "negative_" before them are given only under guidance. A length of None is drawn for each prompt.
    """

    pipe: Any
    embeddings: dict[str, tuple[int | None, ...]]
    call: dict[str, Any]
    masks: dict[str, int | None] = field(default_factory=dict)
    guidance: tuple[str, float] | None = None
    unguided: float = 1.0  # the guidance scale that turns guidance off
    lists: bool = False
    mask_type: torch.dtype = torch.int64  # as tokenizers give it

    def embed(self, prompts: int, seed: int = 0, guided: bool = True) -> dict[str, Any]:
        """Return embeddings of this many prompts, without text too under guidance, which differ in length."""
        random = torch.Generator().manual_seed(seed)
        found: dict[str, Any] = {}
        for prefix in ("", "negative_") if guided and self.guidance else ("",):
            lengths = [4 + (number + len(prefix)) % 3 for number in range(prompts)]
            for name, shape in self.embeddings.items():
                sides = [side or max(lengths) for side in shape]
                rows = torch.randn(prompts, *sides, generator=random)
                if self.lists:
                    found[prefix + name] = [row[:length] for row, length in zip(rows, lengths, strict=True)]
                else:
                    found[prefix + name] = rows
            for name, side in self.masks.items():
                mask = torch.arange(side or max(lengths)) < torch.tensor(lengths)[:, None]
                found[prefix + name] = mask.to(self.mask_type)
        return found


def _vae(channels: int = 4, **changes: Any) -> Any:
    settings = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4,),
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1,
        "scaling_factor": 1.5,
    }
    return diffusers.AutoencoderKL(**(settings | changes))


def flux(guidance_embeds: bool = True) -> Tiny:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    )
    scheduler = FLOW(use_dynamic_shifting=guidance_embeds)
    pipe = diffusers.FluxPipeline(scheduler, _vae(1), None, None, None, None, transformer)
    shapes = {"prompt_embeds": (8, 32), "pooled_prompt_embeds": (32,)}
    return Tiny(pipe, shapes, {"height": 8, "width": 8})


def qwen_image() -> Tiny:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = diffusers.QwenImagePipeline(FLOW(use_dynamic_shifting=True), vae, None, None, transformer)
    size = {"height": 32, "width": 32}
    return Tiny(pipe, {"prompt_embeds": (None, 16)}, size, {"prompt_embeds_mask": None}, ("true_cfg_scale", 4.0))


def z_image() -> Tiny:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    vae = _vae(
        16,
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
    )
    pipe = diffusers.ZImagePipeline(FLOW(), vae, None, None, transformer)
    size = {"height": 16, "width": 16}
    return Tiny(pipe, {"prompt_embeds": (None, 16)}, size, guidance=("guidance_scale", 3.0), unguided=0.0, lists=True)


def chroma() -> Tiny:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipe = diffusers.ChromaPipeline(FLOW(), _vae(1), None, None, transformer)
    call, guidance = {"height": 8, "width": 8}, ("guidance_scale", 3.0)
    return Tiny(
        pipe, {"prompt_embeds": (None, 32)}, call, {"prompt_attention_mask": None}, guidance, mask_type=torch.bool
    )


def lumina2() -> Tiny:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    pipe = diffusers.Lumina2Pipeline(transformer, FLOW(), _vae(), None, None)
    size = {"height": 32, "width": 32}
    return Tiny(pipe, {"prompt_embeds": (None, 8)}, size, {"prompt_attention_mask": None}, ("guidance_scale", 3.0))


def sana() -> Tiny:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    )
    pipe = diffusers.SanaPipeline(None, None, vae, transformer, FLOW(shift=7.0))
    call = {"height": 32, "width": 32, "use_resolution_binning": False}
    return Tiny(pipe, {"prompt_embeds": (None, 8)}, call, {"prompt_attention_mask": None}, ("guidance_scale", 3.0))


def wan(second: bool = True, **config: Any) -> Tiny:
    """By default two transformers, the second for the late steps."""

    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    if second:
        config = {"transformer_2": transformer(), "boundary_ratio": 0.875}
    pipe = diffusers.WanPipeline(None, None, vae, FLOW(shift=7.0), transformer(), **config)
    call = {"height": 16, "width": 16, "num_frames": 9}
    return Tiny(pipe, {"prompt_embeds": (6, 32)}, call, guidance=("guidance_scale", 5.0))


def ltx() -> Tiny:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    pipe = diffusers.LTXPipeline(FLOW(), vae, None, None, transformer)
    call = {"height": 32, "width": 32, "num_frames": 9}
    return Tiny(pipe, {"prompt_embeds": (None, 32)}, call, {"prompt_attention_mask": None}, ("guidance_scale", 3.0))


def flux2(klein: bool = False, distilled: bool = False) -> Tiny:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=not klein,
    )
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    size = {"height": 8, "width": 8}
    if klein:
        pipe = diffusers.Flux2KleinPipeline(FLOW(), vae, None, None, transformer, is_distilled=distilled)
        return Tiny(pipe, {"prompt_embeds": (6, 16)}, size, guidance=None if distilled else ("guidance_scale", 3.0))
    pipe = diffusers.Flux2Pipeline(FLOW(), vae, None, None, transformer)
    return Tiny(pipe, {"prompt_embeds": (6, 16)}, size)


def flux2_klein() -> Tiny:
    return flux2(klein=True)


def aura_flow() -> Tiny:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    pipe = diffusers.AuraFlowPipeline(
        None, None, _vae(use_quant_conv=True, use_post_quant_conv=True), transformer, FLOW()
    )
    size = {"height": 32, "width": 32}
    return Tiny(pipe, {"prompt_embeds": (None, 32)}, size, {"prompt_attention_mask": None}, ("guidance_scale", 3.0))


def cogview4() -> Tiny:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = FLOW(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(None, None, _vae(shift_factor=None), transformer, scheduler)
    size = {"height": 32, "width": 32}
    return Tiny(pipe, {"prompt_embeds": (16, 32)}, size, guidance=("guidance_scale", 3.0))


def hunyuan_dit() -> Tiny:
    """Two encoders, each with its own mask, and a scheduler of epsilon or v that draws noise."""
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    vae = _vae(use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
    pipe = diffusers.HunyuanDiTPipeline(
        vae, None, None, transformer, diffusers.DDPMScheduler(), None, None, requires_safety_checker=False
    )
    call = {"height": 16, "width": 16, "use_resolution_binning": False}
    shapes = {"prompt_embeds": (77, 32), "prompt_embeds_2": (256, 32)}
    masks = {"prompt_attention_mask": 77, "prompt_attention_mask_2": 256}
    return Tiny(pipe, shapes, call, masks, ("guidance_scale", 3.0))


def pixart_sigma() -> Tiny:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    vae = _vae(use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
    pipe = diffusers.PixArtSigmaPipeline(None, None, vae, transformer, diffusers.DPMSolverMultistepScheduler())
    call = {"height": 8, "width": 8, "use_resolution_binning": False}
    return Tiny(pipe, {"prompt_embeds": (None, 32)}, call, {"prompt_attention_mask": None}, ("guidance_scale", 3.0))


def _controlled(pipe: Callable[..., Any], network: Any, embeddings: dict[str, tuple[int | None, ...]]) -> Tiny:
    """A ControlNet whose control image, here one for all prompts, changes the latents."""
    control = diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 16))
    parts = {"vae": autoencoder(), "unet": network, "controlnet": wakened(control)}
    made = pipe(**parts, scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    return Tiny(made, embeddings, {"image": control_images(1)}, guidance=("guidance_scale", 5.0))


def control_images(count: int) -> Tensor:
    """Return images with edges: image k is white from column 4 k + 4 on."""
    edges = 4 * torch.arange(count)[:, None] + 4
    return (torch.arange(16) >= edges).float()[:, None, None].expand(count, 3, 16, 16)


def controlnet() -> Tiny:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = functools.partial(diffusers.StableDiffusionControlNetPipeline, **absent, requires_safety_checker=False)
    return _controlled(pipe, unet(), {"prompt_embeds": (6, 16)})


def wakened(network: torch.nn.Module) -> torch.nn.Module:
    """Give a ControlNet, whose last layers begin with zeros, an effect."""
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=1.0)
    return network


def controlnet_3() -> Tiny:
    """Encodes control images with noise of torch's own generator."""
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,  # the last one takes nothing from the ControlNet
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    }
    pipe = diffusers.StableDiffusion3ControlNetPipeline(
        diffusers.SD3Transformer2DModel(**sizes),
        FLOW(shift=3.0),
        autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        *[None] * 6,
        controlnet=wakened(diffusers.SD3ControlNetModel(**sizes)),
    )
    call = {"height": 16, "width": 16, "control_image": control_images(1)}
    shapes = {"prompt_embeds": (6, 32), "pooled_prompt_embeds": (32,)}
    return Tiny(pipe, shapes, call, guidance=("guidance_scale", 5.0))


def controlnet_flux() -> Tiny:
    """Encodes control images with noise of the images' generators."""
    made = flux()
    network = wakened(diffusers.FluxControlNetModel.from_transformer(made.pipe.transformer, 1, 1, 16, 2))
    made.pipe = diffusers.FluxControlNetPipeline(**made.pipe.components, controlnet=network)
    made.call = {"height": 16, "width": 16, "control_image": control_images(1)}
    return made


def controlnet_xl() -> Tiny:
    network = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = functools.partial(diffusers.StableDiffusionXLControlNetPipeline, **absent)
    return _controlled(pipe, network, {"prompt_embeds": (6, 32), "pooled_prompt_embeds": (16,)})


def stable_audio() -> Tiny:
    """Sounds: projected text states, and their length in seconds as a further condition."""
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32)
    pipe = diffusers.StableAudioPipeline(
        vae, None, projection, None, transformer, diffusers.EDMDPMSolverMultistepScheduler(solver_order=2)
    )
    masks: dict[str, int | None] = {"attention_mask": None}
    return Tiny(pipe, {"prompt_embeds": (None, 32)}, {}, masks, ("guidance_scale", 3.0))


def _t5(pipe: Any, width: int) -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": t5(width)}


def _bert_and_t5(pipe: Any, width: int) -> dict[str, Any]:
    sizes = {"vocab_size": 32, "hidden_size": width, "intermediate_size": 32}
    bert = BertModel(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    return {"tokenizer": t5_tokenizer(), "text_encoder": bert, "tokenizer_2": t5_tokenizer(), "text_encoder_2": t5()}


def _clip(pipe: Any, width: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = own.clip_tokenizer(Path(folder))
    sizes = {"hidden_size": width, "max_position_embeddings": 77}
    config = CLIPTextConfig.from_dict(own.clip_config().to_dict() | sizes)
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}


def _two_clips(pipe: Any, width: int) -> dict[str, Any]:
    found = _clip(pipe, width // 2)
    return found | {"tokenizer_2": found["tokenizer"], "text_encoder_2": own.projected_clip()}


def _clip_and_t5(pipe: Any, width: int) -> dict[str, Any]:
    return _clip(pipe, width) | {"tokenizer_2": t5_tokenizer(), "text_encoder_2": t5(width)}


# How the texts of a family are read, and the width of its text states; the others have embeddings only.
TEXTS: dict[str, tuple[Callable[[Any, int], dict[str, Any]], int]] = {
    "ChromaPipeline": (_t5, 32),
    "Lumina2Pipeline": (_t5, 8),
    "SanaPipeline": (_t5, 8),
    "WanPipeline": (_t5, 32),
    "LTXPipeline": (_t5, 32),
    "AuraFlowPipeline": (_t5, 32),
    "CogView4Pipeline": (_t5, 32),
    "HunyuanDiTPipeline": (_bert_and_t5, 32),
    "PixArtSigmaPipeline": (_t5, 32),
    "StableAudioPipeline": (_t5, 32),
    "FluxPipeline": (_clip_and_t5, 32),
    "StableDiffusionControlNetPipeline": (_clip, 16),
    "StableDiffusionXLControlNetPipeline": (_two_clips, 32),
}


# Pipelines that no row names, with tokenizers and encoders, and the arguments of a small call.


def mochi() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = diffusers.MochiPipeline(FLOW(), vae, t5(), t5_tokenizer(), transformer)
    return pipe, {"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16}


def cogview3() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    pipe = diffusers.CogView3PlusPipeline(t5_tokenizer(), t5(), autoencoder(), transformer, diffusers.DDIMScheduler())
    return pipe, {"height": 16, "width": 16, "max_sequence_length": 64}


def bria() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    pipe = diffusers.BriaPipeline(
        transformer=transformer,
        scheduler=FLOW(),
        vae=autoencoder(shift_factor=0),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    return pipe, {"height": 16, "width": 16}


def lumina() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=8,
    )
    return diffusers.LuminaPipeline(transformer, FLOW(), autoencoder(), t5(8), t5_tokenizer()), {}


def ovis_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    encoder = Qwen3Model(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    pipe = diffusers.OvisImagePipeline(
        FLOW(use_dynamic_shifting=True), autoencoder(shift_factor=0.0), encoder, tokenizer, transformer
    )
    return pipe, {"height": 16, "width": 16}


def latte() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    pipe = diffusers.LattePipeline(t5_tokenizer(), t5(), autoencoder(), transformer, diffusers.DDIMScheduler())
    # By default it cleans captions, which needs Beautiful Soup.
    return pipe, {"height": 16, "width": 16, "video_length": 1, "clean_caption": False}


def unknown(make: Callable[[], tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of no row, and the arguments of a small call; the same weights each time."""
    torch.manual_seed(0)
    pipe, call = make()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


FAMILIES: dict[str, Callable[[], Tiny]] = {
    "FluxPipeline": flux,
    "QwenImagePipeline": qwen_image,
    "ZImagePipeline": z_image,
    "ChromaPipeline": chroma,
    "Lumina2Pipeline": lumina2,
    "SanaPipeline": sana,
    "WanPipeline": wan,
    "LTXPipeline": ltx,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": flux2_klein,
    "AuraFlowPipeline": aura_flow,
    "CogView4Pipeline": cogview4,
    "HunyuanDiTPipeline": hunyuan_dit,
    "PixArtSigmaPipeline": pixart_sigma,
    "StableAudioPipeline": stable_audio,
    "StableDiffusionControlNetPipeline": controlnet,
    "StableDiffusionXLControlNetPipeline": controlnet_xl,
    "StableDiffusion3ControlNetPipeline": controlnet_3,
    "FluxControlNetPipeline": controlnet_flux,
}


def _own(name: str, embeddings: dict[str, tuple[int | None, ...]], **more: Any) -> Tiny:
    """A family of `tiny`, without its text encoders."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = own.pipeline(name, Path(folder))
    texts = [part for part in pipe.components if part.startswith(("tokenizer", "text_encoder"))]
    pipe.register_modules(**dict.fromkeys(texts))
    return Tiny(pipe, embeddings, own.OPTIONS.get(name, {}), guidance=("guidance_scale", 4.0), **more)


def stable_diffusion() -> Tiny:
    return _own("stable_diffusion", {"prompt_embeds": (6, 16)})


def stable_diffusion_2() -> Tiny:
    """Predicts v, and has projections that are linear."""
    made = stable_diffusion()
    network = unet(use_linear_projection=True, attention_head_dim=(2, 4))
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    made.pipe.register_modules(unet=network, scheduler=scheduler)
    return made


def stable_diffusion_xl() -> Tiny:
    return _own("stable_diffusion_xl", {"prompt_embeds": (6, 32), "pooled_prompt_embeds": (16,)})


def stable_diffusion_3(**changes: Any) -> Tiny:
    made = _own("stable_diffusion_3", {"prompt_embeds": (6, 32), "pooled_prompt_embeds": (32,)})
    if changes:
        transformer = diffusers.SD3Transformer2DModel.from_config(made.pipe.transformer.config, **changes)
        made.pipe.register_modules(transformer=transformer)
    return made


def stable_diffusion_3_5() -> Tiny:
    """Normalised queries and keys, and in its first layer a second attention of the image alone."""
    return stable_diffusion_3(qk_norm="rms_norm", dual_attention_layers=(0,))


def pixart_alpha() -> Tiny:
    return _own("pixart_alpha", {"prompt_embeds": (None, 32)}, masks={"prompt_attention_mask": None})


# The families of `tiny`, by their stock class.
OWN: dict[str, Callable[[], Tiny]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "PixArtAlphaPipeline": pixart_alpha,
}
# Other models of the same stock classes.
MODELS: dict[str, Callable[[], Tiny]] = {
    "Stable Diffusion 2": stable_diffusion_2,
    "Stable Diffusion 3.5": stable_diffusion_3_5,
    "FLUX.1 schnell": functools.partial(flux, guidance_embeds=False),
    "FLUX.2 klein, distilled": functools.partial(flux2, klein=True, distilled=True),
    "Wan 2.1": functools.partial(wan, second=False),
    "Wan 2.2 of 5 billion": functools.partial(wan, second=False, expand_timesteps=True),
}
ALL = FAMILIES | OWN | MODELS


def tiny(family: str) -> Tiny:
    """Return the tiny pipeline of a family or model; the same weights each time."""
    torch.manual_seed(0)
    made = ALL[family]()
    for component in made.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    made.pipe.set_progress_bar_config(disable=True)
    return made


def reading(family: str) -> Tiny:
    """Return the tiny pipeline of a family with tokenizers and text encoders."""
    made = tiny(family)
    encode, width = TEXTS[family]
    torch.manual_seed(1)
    parts = encode(made.pipe, width)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    made.pipe.register_modules(**parts)
    return made


def rows(values: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Return these rows of embeddings."""
    return {
        name: [rows[number] for number in chosen] if isinstance(rows, list) else rows[chosen]
        for name, rows in values.items()
    }


def generators(seeds: list[int]) -> list[torch.Generator]:
    """Return a generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents(output: Any) -> Tensor:
    """Return the latents, or the decoded images, clips or sounds, of a stock output."""
    return output[0]  # type: ignore[no-any-return]
