"""The default grouping of a pipeline that is called without groups: the policy of the shipped `params.yaml`."""

from collections.abc import Sequence

from sage.errors import ConfigurationError
from sage.grouping.embedding import embed
from sage.grouping.groups import Groups
from sage.grouping.policy import ENCODER, Policy

DEFAULT = Policy(max_size=6, near_duplicate=0.999, threshold=0.5)


def group_prompts(prompts: Sequence[str] | None) -> Groups:
    """Return groups of similar prompts, a partition of their indices; copies of a prompt never share a group.

    Raises ConfigurationError if `prompts` is None: the pipeline was given prompt embeddings only.
    """
    if prompts is None:
        raise ConfigurationError(
            "prompt_embeds cannot be grouped; give groups=[[0, 1], ...], a plan, or share_ratio=0 for none"
        )
    embeddings = embed(prompts, ENCODER)
    return DEFAULT.form(prompts, embeddings, DEFAULT.choose_threshold(embeddings, share_ratio=0.0))
