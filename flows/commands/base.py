"""`sage base`: get a model from a hub once and pin its commit, so that stages depend on it and need no network."""

from collections.abc import Callable

from flows.preflight import check_trainable
from sage.errors import ConfigurationError
from sage.sampling import hub, saved


def pin(name: str, write: Callable[[str], None]) -> None:
    """Download a model, write its pin, and write how to use it.

    Raises ConfigurationError for what is no name on a hub, DataError if the model cannot be had, and UnsupportedError
    if it cannot be fine-tuned.
    """
    model = hub.named(name)
    if model is None:
        raise ConfigurationError(f"{name} is a file or folder here; name it in params.yaml: base: {name}")
    check_trainable(name)
    if saved.cached(model) is None:
        write(f"getting {model} from the hub; if this is interrupted, the next call goes on")
    # Its folder in the cache has the name of the commit.
    pinned = hub.pin(hub.Model(model.name, saved.fetch(model).name))
    write(f"wrote {pinned}; commit it to git")
    write(f"in params.yaml: base: {pinned}")
    write(f"for one experiment: dvc exp run -S base={pinned}")
