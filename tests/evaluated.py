"""metrics/evaluate.json as a small evaluation would write it, to be changed and damaged by tests."""

import copy

SET = {"digest": "d" * 64, "generated": "m" * 64, "n_real": 4, "n_prompts": 4, "seeds": [0, 1]}
N = 8


def figure(value, low=None, high=None, n=N, **more):
    return {"value": value, "low": low, "high": high, "n": n} | more


def share(value, low, high):
    return {"relative": {"value": value, "low": low, "high": high}}


def results():
    """An evaluation on forty groups whose figures agree with each other; nothing was gated yet."""
    return {
        "features": "efficientnet_lite0",
        "alignment": "a judge",
        "confidence": 0.95,
        "resamples": 1000,
        "set": copy.deepcopy(SET),
        "saving": 0.25,
        "arms": {
            "independent": {
                "kernel_distance": figure(0.20, 0.19, 0.21),
                "alignment": figure(0.50, 0.49, 0.51),
                "nfe_per_image": figure(16.0, 16.0, 16.0),
            },
            "sage": {
                "kernel_distance": figure(0.21, 0.20, 0.22),
                "alignment": figure(0.49, 0.48, 0.50),
                "nfe_per_image": figure(12.0, 12.0, 12.0),
            },
        },
        "real": {"alignment": figure(0.8, 0.79, 0.81, 4)},
        "floor": {"kernel_distance": figure(0.01, 0.0, 0.02, 4)},
        "worse_by": {
            "independent": {
                "kernel_distance": figure(0.01, 0.002, 0.018, **share(0.05, 0.01, 0.09)),
                "alignment": figure(0.01, 0.0, 0.02, **share(0.02, 0.0, 0.04)),
                "nfe_per_image": figure(-4.0, -4.0, -4.0, **share(-0.25, -0.25, -0.25)),
            }
        },
        "by_similarity": [part("single prompts", 10), part("tightest third", 30)],
        "gates": [],
        "passed": False,
    }


def part(name, groups):
    return {
        "part": name,
        "similarity": [0.8, 0.9],
        "groups": groups,
        "prompts": 2 * groups,
        "saving": 0.25,
        "arms": {},
    }


def verdict(metric, reference="independent", passed=True, reason="", limit=0.1):
    """One entry of "gates"."""
    ends = {"value": 0.05, "low": 0.01, "high": 0.09}
    named = {"metric": metric, "reference": reference, "limit": limit, "relative": True}
    return named | ends | {"passed": passed, "reason": reason}


del_ = object()


def changed(*path, to):
    """Return `results` with one thing changed, or without it if `to` is `del_`."""
    found = results()
    place = found
    for key in path[:-1]:
        place = place[key]
    if to is del_:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return found
