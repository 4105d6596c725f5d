import numpy as np
import tiny
from prepared_files import NOWHERE

from benchmarks import knee, trials
from benchmarks.arms import WHOLE, recipes
from sage.config import load_params
from sage.data.dataset import Example


def test_every_recipe_is_a_configuration_of_its_own():
    params = load_params()
    settings = [recipe.settings(params.finetune) for recipe in recipes(params).values() if recipe]
    assert settings.count(params.finetune) == 1
    assert len({configuration.model_dump_json() for configuration in settings}) == len(settings)


def test_every_term_is_left_out_once_and_nothing_else_with_it():
    params = load_params()
    every = [recipe.settings(params.finetune) for recipe in recipes(params).values() if recipe]
    whole = params.finetune.model_copy(update={"weights": params.finetune.weights.model_copy(update=WHOLE)})
    for term, weight in WHOLE.items():
        changed = whole.weights.model_copy(update={term: 0.1 if weight == 0 else 0.0})
        assert every.count(whole.model_copy(update={"weights": changed})) == 1, term


def test_benchmarks_draw_with_the_scheduler_of_the_parameters(tmp_path):
    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    shipped = load_params()
    examples = [Example(text, NOWHERE, text, "") for text in ("red cat", "blue dog")]

    def drawn(scheduler):
        drawing = shipped.generate.model_copy(update={"scheduler": scheduler})
        work = trials.Trials.__new__(trials.Trials)
        work.params, work.base = shipped.model_copy(update={"generate": drawing}), tmp_path / "model"
        work.examples, work.texts, work.groups = examples, [example.text for example in examples], [[0], [1]]
        return np.stack(work.draw(trials.Point(None, 4), 0)), np.stack(
            knee.sample(tmp_path / "model", examples, 4, shipped.generate.guidance_scale, scheduler)
        )

    for own, other in zip(drawn(None), drawn("EulerDiscreteScheduler"), strict=True):
        assert not np.array_equal(own, other)


def test_the_modules_that_kept_results_depend_on_are_there():
    assert all(trials._code(*trials.TRAINS, *trials.DRAWS).values())
