from benchmarks.arms import recipes
from sage.config import load_params


def test_every_recipe_is_a_configuration_that_differs_from_the_shipped_one():
    params = load_params()
    settings = {name: recipe.settings(params.finetune) for name, recipe in recipes(params).items() if recipe}
    assert settings.pop("SAGE as shipped") == params.finetune
    found = [configuration.model_dump_json() for configuration in settings.values()]
    assert len(set(found)) == len(found)
    assert params.finetune.model_dump_json() not in found


def test_every_term_that_has_a_weight_is_left_out_once_and_the_others_tried():
    params = load_params()
    known, weights = recipes(params), params.finetune.weights.model_dump()
    for term, weight in weights.items():
        recipe = known[f"without {term}" if weight else f"with {term}"]
        assert recipe is not None
        tried = recipe.settings(params.finetune).weights.model_dump()
        assert bool(tried[term]) != bool(weight)
        assert {name: value for name, value in tried.items() if name != term} == {
            name: value for name, value in weights.items() if name != term
        }
