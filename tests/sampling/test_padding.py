"""Batches padded to a few sizes: few graphs for torch.compile, the same images, and what padding cost is told apart."""

import pytest
import tiny
import tiny_families
import torch
from tiny_families import rows

from sage.errors import ConfigurationError, UnsupportedError
from sage.sampling.continuous import Continuous
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

STEPS = 3
# Batches of another size round differently.
CLOSE = {"rtol": 0, "atol": 3e-5}
CALL = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0}
PROMPTS = [*tiny.PROMPTS, "red cats", "a blue tree"]
# Packs of one to four blocks, each of another size.
PLAN = Plan.shared([[0, 1, 2], [3, 4], [5], [6]], STEPS, 0.5)


class Graphs:
    """A backend of torch.compile that runs what it is given as it is, and notes for how many rows it was built."""

    def __init__(self):
        self.rows = []
        torch._dynamo.reset()

    def __call__(self, graph, inputs):
        self.rows += [len(value) for value in inputs if value.shape[1:] == (4, 8, 8)]  # the latents
        return graph.forward


def stable_diffusion(folder):
    return SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", folder))


def test_padded_batches_give_the_same_images_and_count_the_padding_apart(tmp_path):
    pipe, seen = stable_diffusion(tmp_path), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    plain = pipe(PROMPTS, plan=PLAN, seed=0, batch_size=4, **CALL)
    unpadded = sum(seen)
    seen.clear()
    found = pipe(PROMPTS, plan=PLAN, seed=0, batch_size=(4, 1), **CALL)
    torch.testing.assert_close(found.images, plain.images, **CLOSE)
    assert set(seen) <= {2 * 1, 2 * 4}
    assert found.cost.network_evaluations == found.cost.formula == plain.cost.network_evaluations == unpadded
    assert found.cost.padding == sum(seen) - unpadded > 0 == plain.cost.padding


def test_a_batch_of_a_given_size_is_not_padded(tmp_path):
    pipe = stable_diffusion(tmp_path)
    found = pipe(PROMPTS[:4], share_ratio=0, seed=0, batch_size=(1, 2, 4), **CALL)
    plain = pipe(PROMPTS[:4], share_ratio=0, seed=0, batch_size=4, **CALL)
    assert torch.equal(found.images, plain.images) and found.cost.padding == 0


def test_full_batches_come_first(tmp_path):
    """Seven are four, and three in a batch of four: less padding than two nearly equal batches of other sizes."""
    pipe, seen = stable_diffusion(tmp_path), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]) // 2))
    found = pipe(PROMPTS[:5], share_ratio=0, seed=0, batch_size=(1, 4), **CALL)
    assert seen == [4] * STEPS + [1] * STEPS and found.cost.padding == 0


@pytest.mark.parametrize("sizes", [(), (0, 2), (2, 1.5), "24", 2.0])
def test_sizes_that_are_none_are_refused(sizes, tmp_path):
    with pytest.raises(ConfigurationError, match="batch_size"):
        stable_diffusion(tmp_path)(PROMPTS, seed=0, batch_size=sizes, **CALL)


def test_continuous_batching_refuses_sizes(tmp_path):
    pipe = stable_diffusion(tmp_path)
    with pytest.raises(UnsupportedError, match=r"not padded to \(1, 4\)"):
        Continuous(pipe, 4).admit(pipe.stream(PROMPTS[:2], seed=0, batch_size=(1, 4), **CALL))


@pytest.mark.slow
# Importing PyTorch's compiler warns about its own code.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_torch_compile_builds_a_graph_for_each_size_and_no_more(tmp_path):
    pipe, graphs = stable_diffusion(tmp_path), Graphs()
    expected = pipe(PROMPTS, plan=PLAN, seed=0, batch_size=4, **CALL).images
    pipe.unet.compile(backend=graphs, dynamic=False, fullgraph=True)
    found = pipe(PROMPTS, plan=PLAN, seed=0, batch_size=(1, 4), **CALL)
    pipe(PROMPTS[:5], share_ratio=0, seed=0, batch_size=(1, 4), **CALL)
    assert graphs.rows == [2 * 4, 2 * 1]
    torch.testing.assert_close(found.images, expected, **CLOSE)
    pipe(PROMPTS[:3], share_ratio=0, seed=0, batch_size=4, **CALL)
    assert graphs.rows == [2 * 4, 2 * 1, 2 * 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_transformer_of_the_segment_driver_is_counted_and_padded(in_place):
    family, graphs = tiny_families.tiny("FluxPipeline"), []
    embeddings = family.embed(3)
    pipe = SharedSamplingPipeline.from_pipe(family.pipe)
    call = family.call | {"num_inference_steps": STEPS, "output_type": "latent", "share_ratio": 0}
    expected = pipe(**embeddings, **call, seed=[5, 6, 7], batch_size=2).images

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if in_place:
        pipe.transformer.compile(backend=backend, dynamic=False)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, dynamic=False)
    pipe(**rows(embeddings, [0, 1]), **call, seed=[5, 6], batch_size=(2,))
    built = len(graphs)
    found = pipe(**embeddings, **call, seed=[5, 6, 7], batch_size=(2,))
    assert len(graphs) == built > 0
    assert found.cost.network_evaluations == found.cost.formula == 3 * STEPS and found.cost.padding == STEPS
    torch.testing.assert_close(found.images, expected, **CLOSE)
