"""Rows for stock classes that the table does not name, read from their signature and source.

The rules are those by which the rows of the table were written: the results of `encode_prompt` are assigned to
variables with the names of the call's arguments, and the loop steps one scheduler. The source does not say how guidance
works, so there are several candidates, and `sage.sampling.proof` runs them against the stock pipeline.
"""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from sage.errors import UnsupportedError
from sage.sampling.pipeline import TEXTS
from sage.sampling.segments import DRIVEN, UNSUPPORTED, Family

# Arguments of pipelines that start from an image, a video or a sound instead of noise.
_STARTS = (
    "image", "images", "video", "mask_image", "strength", "reference_image", "reference_images", "control_image",
    "control_video", "image_embeds", "image_embeddings", "init_image", "initial_audio_waveforms",
)  # fmt: skip
# The options that a segment can pass on whatever the loop does with them; any other is left at its default.
_FREE = (
    "max_sequence_length", "num_frames", "video_length", "sigmas", "timesteps", "use_resolution_binning",
    "clean_caption", "eta",
)  # fmt: skip


def candidates(stock: Any) -> list[Family]:
    """Return the rows that a stock class may have, the likeliest first.

    Raises UnsupportedError, with the reason, if segments cannot drive it.
    """
    name = stock.__name__
    if not stock.__module__.startswith("diffusers."):
        raise UnsupportedError(f"{name} cannot share sampling: its call is not one of diffusers")
    parameters = inspect.signature(stock.__call__).parameters
    if starts := [argument for argument in _STARTS if argument in parameters]:
        raise UnsupportedError(
            f"{name} cannot share sampling: it takes {', '.join(starts)}, from which single images start or for which "
            "it draws noise of its own; only pipelines that start from text and noise alone can, and ControlNets of "
            "Stable Diffusion, SDXL, SD 3 and FLUX.1"
        )
    empty = inspect.Parameter.empty
    needed = [p.name for p in parameters.values() if p.default is empty and p.name not in ("self", "prompt", "kwargs")]
    if needed:
        raise UnsupportedError(f"{name} cannot share sampling: its call needs {', '.join(needed)} beside prompts")
    source = ast.parse(textwrap.dedent(inspect.getsource(stock.__call__)))
    _check_loop(name, source)
    encoded = _encoded(source, set(parameters))
    inputs = _inputs(name, encoded)
    taken = DRIVEN | UNSUPPORTED | {*TEXTS} | {prefix + key for key in inputs.values() for prefix in ("", "negative_")}
    scales = [scale for scale in ("guidance_scale", "true_cfg_scale") if scale in parameters]
    if not scales:
        raise UnsupportedError(f"{name} cannot share sampling: it takes no guidance scale under a known name")
    options = [option for option in parameters if option not in {*taken, *_FREE} and not option.endswith("_kwargs")]
    fixed = {scale: tuple(option for option in options if option != scale) for scale in scales}
    plain = Family(name, inputs, encoded, guidance=scales[0], fixed=fixed[scales[0]])
    return [
        plain,
        dataclasses.replace(plain, embedded=True),
        *(dataclasses.replace(plain, guidance=scale, fixed=fixed[scale], asks=True) for scale in reversed(scales)),
    ]


def _check_loop(name: str, source: ast.AST) -> None:
    """Raise UnsupportedError if the call does not step one scheduler from latents that it prepares."""
    called = {ast.unparse(node.func) for node in ast.walk(source) if isinstance(node, ast.Call)}
    stepped = {call for call in called if call.endswith("scheduler.step")}
    if stepped != {"self.scheduler.step"}:
        found = ", ".join(sorted(stepped)) or "no scheduler.step"
        raise UnsupportedError(f"{name} cannot share sampling: its loop calls {found}, and segments need one scheduler")
    if missing := [method for method in ("encode_prompt", "prepare_latents") if f"self.{method}" not in called]:
        raise UnsupportedError(f"{name} cannot share sampling: its call has no {' and no '.join(missing)}")


def _encoded(source: ast.AST, arguments: set[str]) -> tuple[tuple[str | None, ...], ...]:
    """Return, for each call of `encode_prompt`, the arguments that its results become."""
    found = []
    for node in sorted((n for n in ast.walk(source) if isinstance(n, ast.Assign)), key=lambda node: node.lineno):
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "self.encode_prompt":
            target = node.targets[0]
            names = [ast.unparse(item) for item in (target.elts if isinstance(target, ast.Tuple) else [target])]
            found.append(tuple(name if name in arguments else None for name in names))
    return tuple(found)


def _inputs(name: str, encoded: tuple[tuple[str | None, ...], ...]) -> dict[str, str]:
    """Return the arguments that hold the text, by the name of their condition; x_mask is the mask of x."""
    found = {}
    for argument in (item for call in encoded for item in call if item and not item.startswith("negative_")):
        if "mask" not in argument:
            found[argument] = argument
            continue
        states = argument.replace("attention_mask", "embeds").replace("embeds_mask", "embeds")
        if states not in found:
            raise UnsupportedError(f"{name} cannot share sampling: {argument} is the mask of no known embeddings")
        found[f"{states}_mask"] = argument
    if "prompt_embeds" not in found:
        raise UnsupportedError(f"{name} cannot share sampling: encode_prompt returns no prompt_embeds")
    return found
