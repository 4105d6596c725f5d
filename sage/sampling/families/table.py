"""The families that the segment driver knows, one row each (`sage.sampling.segments.Family`)."""

import functools
from collections.abc import Hashable
from typing import Any, cast

from sage.sampling.families import stable_audio
from sage.sampling.families.size_ids import size_ids
from sage.sampling.segments import Family, segmented

_STATES = {"prompt_embeds": "prompt_embeds"}
_MASKED = _STATES | {"prompt_embeds_mask": "prompt_attention_mask"}
_MASKED_FIRST = (
    ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
)
_PLAIN_PAIR = (("prompt_embeds", "negative_prompt_embeds"),)
_POOLED = _STATES | {"pooled_prompt_embeds": "pooled_prompt_embeds"}
_POOLED_PAIRS = (("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),)
# A ControlNet is on or off by the number of the step.
_KEPT = ("control_guidance_start", "control_guidance_end")
# The layers that SD 3 skips, and when, by the number of the step.
_SKIPPED = (
    "skip_guidance_layers",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_stop",
    "skip_layer_guidance_start",
)

TABLE = {
    family.stock: family
    for family in (
        Family(
            "StableDiffusionPipeline",
            _STATES,
            _PLAIN_PAIR,
            images=True,
            trained=True,
            sized=True,
            counted=True,
            callbacks=_STATES,
        ),
        Family(
            "StableDiffusionXLPipeline",
            _POOLED,
            _POOLED_PAIRS,
            images=True,
            fixed=("denoising_end",),
            trained=True,
            sized=True,
            counted=True,
            callbacks=_STATES | {"add_text_embeds": "pooled_prompt_embeds", "add_time_ids": size_ids},
        ),
        Family(
            "StableDiffusion3Pipeline",
            _POOLED,
            _POOLED_PAIRS,
            images=True,
            fixed=_SKIPPED,
            trained=True,
            sized=True,
            counted=True,
            callbacks=_POOLED,
        ),
        Family(
            "PixArtAlphaPipeline",
            _MASKED,
            _MASKED_FIRST,
            trained=True,
            sized=True,
            counted=True,
            callbacks=_STATES,
        ),
        Family(
            "FluxPipeline",
            _POOLED,
            (("prompt_embeds", "pooled_prompt_embeds", None),),
            embedded=True,
            images=True,
            fixed=("true_cfg_scale",),
            trained=True,
            counted=True,
        ),
        Family("Flux2Pipeline", _STATES, (("prompt_embeds", None),), embedded=True),
        Family("Flux2KleinPipeline", _STATES, (("prompt_embeds", None), ("negative_prompt_embeds", None))),
        Family(
            "QwenImagePipeline",
            _STATES | {"prompt_embeds_mask": "prompt_embeds_mask"},
            (("prompt_embeds", "prompt_embeds_mask"), ("negative_prompt_embeds", "negative_prompt_embeds_mask")),
            guidance="true_cfg_scale",
            asks=True,
        ),
        Family("ZImagePipeline", _STATES, _PLAIN_PAIR, defaults={"cfg_truncation": None}),
        Family(
            "ChromaPipeline",
            _MASKED,
            (
                (
                    "prompt_embeds",
                    None,
                    "prompt_attention_mask",
                    "negative_prompt_embeds",
                    None,
                    "negative_prompt_attention_mask",
                ),
            ),
        ),
        Family("Lumina2Pipeline", _MASKED, _MASKED_FIRST, fixed=("cfg_trunc_ratio",)),
        Family("SanaPipeline", _MASKED, _MASKED_FIRST),
        Family("PixArtSigmaPipeline", _MASKED, _MASKED_FIRST, counted=True),
        Family("AuraFlowPipeline", _MASKED, _MASKED_FIRST, counted=True),
        Family("CogView4Pipeline", _STATES, _PLAIN_PAIR),
        Family(
            "HunyuanDiTPipeline",
            _MASKED | {"prompt_embeds_2": "prompt_embeds_2", "prompt_embeds_2_mask": "prompt_attention_mask_2"},
            tuple(
                tuple(
                    name + end
                    for name in (
                        "prompt_embeds",
                        "negative_prompt_embeds",
                        "prompt_attention_mask",
                        "negative_prompt_attention_mask",
                    )
                )
                for end in ("", "_2")
            ),
        ),
        Family(
            "StableDiffusionControlNetPipeline",
            _STATES,
            _PLAIN_PAIR,
            control="image",
            images=True,
            fixed=_KEPT,
            counted=True,
        ),
        Family(
            "StableDiffusionXLControlNetPipeline",
            _POOLED,
            _POOLED_PAIRS,
            control="image",
            images=True,
            fixed=(*_KEPT, "denoising_end"),
            counted=True,
        ),
        Family(
            "StableDiffusion3ControlNetPipeline",
            _POOLED,
            _POOLED_PAIRS,
            control="control_image",
            posterior="global",
            images=True,
            fixed=(*_KEPT, "controlnet_pooled_projections"),
            counted=True,
        ),
        Family(
            "FluxControlNetPipeline",
            _POOLED,
            (("prompt_embeds", "pooled_prompt_embeds", None),),
            embedded=True,
            control="control_image",
            posterior="generator",
            images=True,
            fixed=(*_KEPT, "true_cfg_scale"),
            counted=True,
        ),
        Family("WanPipeline", _STATES, _PLAIN_PAIR, output="frames"),
        Family("LTXPipeline", _MASKED, _MASKED_FIRST, output="frames"),
        Family(
            "StableAudioPipeline",
            _STATES | {"prompt_embeds_mask": "attention_mask"},
            implicit=True,
            encode=stable_audio.encode,
            output="audios",
        ),
    )
}


@functools.cache
def shared_class(stock: Hashable) -> type:
    """Return the shared-sampling class of a stock class in the table, or of a subclass of one."""
    cls = cast(Any, stock)
    return segmented(next(TABLE[base.__name__] for base in cls.__mro__ if base.__name__ in TABLE), cls)
