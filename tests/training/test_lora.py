import functools

import sage.torchvision_ops  # noqa: F401

import lora_files
import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from test_denoiser import draw

from sage.errors import ConfigurationError, DataError, UnsupportedError
from sage.sampling import adapters
from sage.training import kohya, lora
from sage.training.denoiser import Denoiser

UNETS = ["stable_diffusion", "stable_diffusion_xl"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a random adapter of rank 4 and alpha 2; return its folder, the network that has it, and what that draws."""

    @functools.cache
    def save(family):
        folder = tmp_path_factory.mktemp(family)
        pipe = tiny.pipeline(family, folder)
        network = Denoiser(pipe).network
        lora.add(network, 4, seed=0, alpha=2)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, values in network.named_parameters():
                if "lora_B" in name:
                    values.copy_(torch.randn(values.shape, generator=random) / 4)
        lora.save(pipe, lora.trained(pipe), folder, lora.alpha_of(network))
        return folder, network, draw(pipe, family)

    return save


@pytest.mark.parametrize("family", [*UNETS, "stable_diffusion_3", "flux"])
def test_both_files_draw_the_same_in_stock_diffusers(family, saved, tmp_path):
    folder, _, ours = saved(family)
    names = [adapters.FILE, *([kohya.FILE] if family in UNETS else [])]
    assert sorted(path.name for path in folder.glob("*lora*")) == sorted(names)
    for name in names:
        stock = tiny.pipeline(family, tmp_path)
        assert np.abs(draw(stock, family) - ours).max() > 1e-2
        stock.load_lora_weights(folder, weight_name=name)
        np.testing.assert_allclose(draw(stock, family), ours, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("stable_diffusion", "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("stable_diffusion", "mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"),
        # As sd-scripts names them: the tiny network has one layer a block, so its second block begins at 3.
        ("stable_diffusion_xl", "input_blocks_3_1_transformer_blocks_0_attn1_to_q"),
        ("stable_diffusion_xl", "middle_block_1_transformer_blocks_0_ff_net_0_proj"),
    ],
)
def test_modules_have_kohyas_names(family, module, saved):
    found = load_file(saved(family)[0] / kohya.FILE)
    assert found[f"lora_unet_{module}.lora_down.weight"].shape[0] == 4
    assert found[f"lora_unet_{module}.lora_up.weight"].shape[1] == 4
    assert found[f"lora_unet_{module}.alpha"] == 2
    assert {name.rpartition(".lora_")[0] or name.removesuffix(".alpha") for name in found} == {
        name.removesuffix(".alpha") for name in found if name.endswith(".alpha")
    }


def test_alpha_scales_what_an_adapter_adds():
    outputs = {}
    for alpha in (None, 1, 2, 8):
        network = tiny.unet()
        lora.add(network, 2, seed=0, alpha=alpha)
        with torch.no_grad():
            for name, values in network.named_parameters():
                if "mid_block" in name and "attn1.to_q.lora_B" in name:
                    values.fill_(0.5)
        adapted = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        features = torch.ones(1, adapted.in_features)
        outputs[alpha] = (adapted(features) - adapted.base_layer(features)).detach()
    assert outputs[2].abs().max() > 1e-3
    torch.testing.assert_close(outputs[None], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[2] / 2)
    torch.testing.assert_close(outputs[8], outputs[2] * 4)


def test_targets_choose_the_layers(tmp_path):
    network = tiny.unet()
    lora.add(network, 2, seed=0, targets=["attn2.to_k", "attn2.to_v"])
    trained = {name for name, values in network.named_parameters() if values.requires_grad}
    assert trained and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in trained)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("to_qq", "'to_qq' is no linear attention layer of UNet2DConditionModel: it has no layer of this name"),
        ("conv_in", "conv_in is Conv2d"),
        ("time_emb_proj", "time_emb_proj is Linear"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named(target, said):
    with pytest.raises(ConfigurationError, match=said):
        lora.add(tiny.unet(), 2, seed=0, targets=["to_q", target])


@pytest.mark.parametrize(
    ("family", "name"), [(UNETS[0], adapters.FILE), (UNETS[1], kohya.FILE), ("stable_diffusion_3", adapters.FILE)]
)
def test_training_goes_on_with_an_earlier_adapter(family, name, saved, tmp_path):
    folder, before, ours = saved(family)
    pipe = tiny.pipeline(family, tmp_path)
    denoiser = Denoiser(pipe)
    lora.resume(pipe, folder / name, 4, 2)
    np.testing.assert_allclose(draw(pipe, family), ours, atol=1e-4)
    wanted = {name for name, values in before.named_parameters() if values.requires_grad}
    assert {name for name, values in denoiser.network.named_parameters() if values.requires_grad} == wanted
    torch.testing.assert_close(lora.layers(denoiser.network), lora.layers(before))
    assert lora.alpha_of(denoiser.network) == 2


@pytest.mark.parametrize(("rank", "alpha"), [(2, None), (4, None), (4, 4)])
def test_an_earlier_adapter_of_another_shape_is_refused(rank, alpha, saved, tmp_path):
    folder = saved("stable_diffusion")[0]
    pipe = tiny.pipeline("stable_diffusion", tmp_path)
    with pytest.raises(
        ConfigurationError, match=f"has rank 4 with alpha 2, but rank {rank} with alpha {alpha or rank}"
    ):
        lora.resume(pipe, folder / adapters.FILE, rank, alpha)


def test_an_earlier_adapter_that_does_not_fit_is_named(tmp_path):
    stock = tiny.pipeline("stable_diffusion", tmp_path)
    path = lora_files.save(stock, tmp_path, seed=0, text=True)
    with pytest.raises(ConfigurationError, match="adapts text_encoder, unet, but unet is to be trained"):
        lora.resume(stock, path, 2)
    stock.unload_lora_weights()
    stock.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv_in"]))
    stock.save_lora_weights(tmp_path / "outside", unet_lora_layers=get_peft_model_state_dict(stock.unet))
    stock.unload_lora_weights()
    with pytest.raises(ConfigurationError, match="adapts conv_in, but of a U-Net only attention blocks"):
        lora.resume(stock, tmp_path / "outside", 2)
    with pytest.raises(DataError, match="there is no"):
        lora.resume(tiny.pipeline("stable_diffusion", tmp_path), tmp_path / "nothing.safetensors", 2)


# Text encoders

ENCODERS = {
    "stable_diffusion": ["text_encoder"],
    "stable_diffusion_xl": ["text_encoder", "text_encoder_2"],
    "stable_diffusion_3": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder"],
}


def with_texts(pipe, alpha=2):
    """Give a pipeline's network and CLIPs random adapters; return the CLIPs."""
    encoders = lora.trainable_encoders(pipe)
    lora.add(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, 4, seed=0, alpha=alpha)
    lora.add_to_texts(encoders, 4, 0, alpha=alpha)
    random = torch.Generator().manual_seed(0)
    for encoder in encoders.values():
        for name, values in encoder.named_parameters():
            if "lora_B" in name:
                values.data.copy_(torch.randn(values.shape, generator=random))
    return encoders


@pytest.mark.parametrize("family", ENCODERS)
def test_adapters_of_text_encoders_draw_the_same_in_stock_diffusers(family, tmp_path):
    pipe = tiny.pipeline(family, tmp_path)
    before = draw(pipe, family)
    assert list(with_texts(pipe)) == ENCODERS[family]
    ours = draw(pipe, family)
    assert np.abs(ours - before).max() > 1e-3
    lora.save(pipe, lora.trained(pipe), tmp_path / "saved", 2)
    for name in [adapters.FILE, *([kohya.FILE] if family in UNETS else [])]:
        stock = tiny.pipeline(family, tmp_path)
        stock.load_lora_weights(tmp_path / "saved", weight_name=name)
        np.testing.assert_allclose(draw(stock, family), ours, atol=1e-4, err_msg=name)
    lora.fuse(pipe, trained=True)
    np.testing.assert_allclose(draw(pipe, family), ours, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "prefixes"), [("stable_diffusion", ["te"]), ("stable_diffusion_xl", ["te1", "te2"])]
)
def test_text_encoders_have_kohyas_names(family, prefixes, tmp_path):
    pipe = tiny.pipeline(family, tmp_path)
    with_texts(pipe)
    lora.save(pipe, lora.trained(pipe), tmp_path / "saved", 2)
    found = load_file(tmp_path / "saved" / kohya.FILE)
    for prefix in prefixes:
        for layer in ("self_attn_q_proj", "mlp_fc1"):
            module = f"lora_{prefix}_text_model_encoder_layers_1_{layer}"
            assert found[f"{module}.lora_down.weight"].shape[0] == 4 and found[f"{module}.alpha"] == 2


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("file", [adapters.FILE, kohya.FILE])
def test_training_goes_on_with_earlier_adapters_of_text_encoders(family, file, tmp_path):
    if file == kohya.FILE and family not in UNETS:
        return
    pipe = tiny.pipeline(family, tmp_path)
    with_texts(pipe)
    parts = lora.trained(pipe)
    lora.save(pipe, parts, tmp_path / "saved", 2)
    again = tiny.pipeline(family, tmp_path)
    with pytest.raises(ConfigurationError, match=r"set finetune.adapter.text_encoders as in the file"):
        lora.resume(tiny.pipeline(family, tmp_path), tmp_path / "saved" / file, 4, 2)
    lora.resume(again, tmp_path / "saved" / file, 4, 2, texts=True)
    torch.testing.assert_close(lora.trained(again), parts)
    for name in ENCODERS[family]:
        trained = {weight for weight, values in getattr(again, name).named_parameters() if values.requires_grad}
        assert trained and all("lora_" in weight for weight in trained)


def test_text_encoders_that_take_no_adapter_are_named(tmp_path):
    with pytest.raises(UnsupportedError, match=r"needs a CLIP .* the text encoders are T5EncoderModel; leave text_enc"):
        lora.trainable_encoders(tiny.pipeline("pixart_alpha", tmp_path))
