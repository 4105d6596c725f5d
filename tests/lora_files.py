"""LoRAs for the tiny Stable Diffusion pipeline, as files that stock diffusers saves."""

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def save(stock, folder, seed, text=False):
    """Write a LoRA with random weights for the U-Net, with `text` for the text encoder, too; remove it again."""
    torch.manual_seed(seed)
    parts = {"unet": ["to_q", "to_v"], **({"text_encoder": ["q_proj"]} if text else {})}
    layers = {}
    for part, targets in parts.items():
        module = getattr(stock, part)
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    stock.unload_lora_weights()
    return folder / "pytorch_lora_weights.safetensors"
