from benchmarks.arms import WHOLE, recipes
from sage.config import load_params


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
