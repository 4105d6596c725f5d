"""What the U-Net of Stable Diffusion XL reads of image sizes, for callbacks."""

from typing import Any

from torch import Tensor


def size_ids(pipe: Any) -> tuple[Tensor, Tensor]:
    """Return the size ids of a call without and with text, (1, 6) each, as the stock call makes them.

    pipe  the pipeline's copy for the call
    """
    arguments = pipe._segmented.arguments
    with_text = _ids(pipe, "", arguments)
    # As in diffusers, both sizes have to be given.
    both = arguments["negative_original_size"] is not None and arguments["negative_target_size"] is not None
    return _ids(pipe, "negative_", arguments) if both else with_text, with_text


def _ids(pipe: Any, prefix: str, arguments: dict[str, Any]) -> Tensor:
    size, names = (arguments["height"], arguments["width"]), ("original_size", "crops_coords_top_left", "target_size")
    pooled = pipe._segmented.example["pooled_prompt_embeds"]
    ids: Tensor = pipe._get_add_time_ids(
        *(tuple(arguments[prefix + name] or size) for name in names),
        dtype=pooled.dtype,
        text_encoder_projection_dim=pooled.shape[-1],
    )
    return ids.to(pooled.device)
