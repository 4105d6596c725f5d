"""Pipelines that no row names are shared if they are proved to be the stock pipeline, or refused with the reason."""

import diffusers
import pytest
import tiny
import tiny_families
import torch
from diffusers import CogView3PlusPipeline, DiffusionPipeline
from tiny_families import TEXTS

from sage.errors import ConfigurationError, UnsupportedError
from sage.sampling import proof
from sage.sampling.families import derived
from sage.sampling.families.table import TABLE

# Of diffusers 0.42: names that it deprecates in Chroma and Stable Audio, and Mochi's autocast on a CPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]
PROMPTS = ("red cat", "a tall tree")


def same(name: str) -> bool:
    """Return whether a row takes images, too, which the general rules refuse."""
    return name not in ("Flux2Pipeline", "Flux2KleinPipeline")


@pytest.mark.parametrize(
    "name", [name for name in TABLE if TABLE[name].encode is None and TABLE[name].control is None and same(name)]
)
def test_the_general_rules_find_the_rows_of_the_table(name):
    row, found = TABLE[name], derived.candidates(getattr(diffusers, name))[0]
    assert (found.inputs, found.encoded[: len(row.encoded)]) == (row.inputs, row.encoded)
    assert set(row.fixed) <= set(found.fixed)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_families_with_text_encoders_are_the_stock_pipeline(name):
    """From prompts to decoded images, with and without a negative prompt: the stock pipeline encodes, too."""
    family = tiny_families.reading(name)
    found = proof.prove(family.pipe, PROMPTS, **family.call)
    assert not found.reason and len(found.checks) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [tiny_families.bria, tiny_families.latte, tiny_families.lumina, tiny_families.mochi, tiny_families.ovis_image],
)
def test_an_unknown_pipeline_that_is_proved_is_shared(make):
    pipe, call = tiny_families.unknown(make)
    shared = proof.proved(pipe, PROMPTS, **call)
    out = shared(["red cat", "red dog"], groups=[[0, 1]], share_ratio=0.5, num_inference_steps=4, seed=0, **call)
    assert out.cost.network_evaluations == 12 and out.cost.saving == 0.25


@pytest.mark.slow
def test_options_that_were_not_proved_are_refused():
    pipe, call = tiny_families.unknown(tiny_families.bria)
    shared = proof.proved(pipe, PROMPTS, **call)
    with pytest.raises(UnsupportedError, match=r"clip_value=0.5 of BriaPipeline may depend on the number of the step"):
        shared(PROMPTS, num_inference_steps=4, clip_value=0.5, **call)


@pytest.mark.slow
def test_a_pipeline_that_segments_do_not_reproduce_is_refused():
    """CogView 3 replaces given negative embeddings by zeros, so its negative prompts would be lost."""
    pipe, call = tiny_families.unknown(tiny_families.cogview3)
    found = proof.prove(pipe, PROMPTS, **call)
    assert [check.passed for check in found.checks] == [True, True, True, False] and found.shared is None
    with pytest.raises(UnsupportedError, match=r"CogView3PlusPipeline cannot share sampling; .* differ by up to"):
        proof.proved(pipe, PROMPTS, **call)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionImg2ImgPipeline", "takes image, strength"),
        ("StableDiffusionXLInpaintPipeline", "takes image, mask_image"),
        ("FluxKontextPipeline", "takes image"),
        ("HunyuanDiTControlNetPipeline", "takes control_image"),
        ("LTX2Pipeline", r"calls audio_scheduler.step, self.scheduler.step, and segments need one"),
        ("StableDiffusionAttendAndExcitePipeline", "needs token_indices beside prompts"),
        ("AudioLDM2Pipeline", "attention_mask is the mask of no known embeddings|encode_prompt"),
    ],
)
def test_classes_that_cannot_be_driven_are_refused_with_their_reason(name, reason):
    with pytest.raises(UnsupportedError, match=f"{name} cannot share sampling: .*({reason})"):
        derived.candidates(getattr(diffusers, name))


def test_only_classes_of_diffusers_are_tried():
    own = type("Own", (DiffusionPipeline,), {"__call__": CogView3PlusPipeline.__call__})
    with pytest.raises(UnsupportedError, match="its call is not one of diffusers"):
        derived.candidates(own)


def test_a_pipeline_that_fails_by_itself_is_said_to(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path)
    pipe.unet.conv_in.weight.data = torch.zeros(1)
    found = proof.prove(pipe, PROMPTS)
    assert found.shared is None and found.reason.startswith("the stock pipeline runs: no, RuntimeError(")


def test_two_prompts_are_needed(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path)
    with pytest.raises(ConfigurationError, match="not two or more different prompts"):
        proof.prove(pipe, ["red cat", "red cat"])
    assert proof.prove(pipe, PROMPTS).reason == ""
