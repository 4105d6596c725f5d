"""L_SAGE, which teaches a diffusion model to share its early steps: a function for each term, then their sum.

SAGE (arXiv 2509.15865) names its parts, soft-target alignment and dual-phase consistency; the formulas are this
project's reading of them.

    L = w_diffusion L_diffusion + w_shared L_shared + w_branch L_branch + w_consistency L_consistency

Notation, besides that of `sage.diffusion`
    n, N       one member of a group, and how many there are     t*      branch time: shared above it, alone from it on
    z_n, c_n   clean latents and text states of a member         c_bar   the group's condition, the mean of c_n
    z_bar      the mean of z_n                                   m       a random member of the group
    f, b       the network, and the frozen base that it came from; both answer in their own prediction type
    y(x_0)     the answer that means x_0 at x_t

Every term is the mean squared error of f over an item's elements, one value an item, not reduced.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sage import diffusion
from sage.diffusion import PredictionType, spread

SoftTarget = Literal["mean", "posterior"]
BranchStart = Literal["sampled", "mixture", "plain"]
Condition = Mapping[str, Tensor]
"""What the network knows of the text, by name, each of shape (n, ...)."""
Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t, t, condition) to the answer, of the shape of x_t."""


@dataclass(frozen=True)
class Process:
    """What x_t means and what the network predicts of it: alpha and sigma of shape (T,), and the prediction type."""

    kind: PredictionType
    alphas: Tensor
    sigmas: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at timesteps of shape (n,)."""
        return self.alphas[t], self.sigmas[t]

    def answer(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """Return y(x_0), the answer that means x_0 at x_t; finite at alpha_t = 0, needs sigma_t > 0."""
        alpha, sigma = self.at(t)
        return diffusion.target(self.kind, x_0, diffusion.implied_noise(x_t, x_0, alpha, sigma), alpha, sigma)


@dataclass(frozen=True)
class Query:
    """What the network is asked, x_t (n, ...) with t (n,) and a condition, and its answer, like x_t."""

    x_t: Tensor
    t: Tensor
    condition: Condition
    answer: Tensor

    def taken(self, items: slice) -> "Query":
        """Return some of the items."""
        return Query(self.x_t[items], self.t[items], taken(self.condition, items), self.answer[items])


def taken(condition: Condition, rows: Tensor | slice) -> Condition:
    """Return some rows of a condition."""
    return {name: values[rows] for name, values in condition.items()}


def branch_time(share_ratio: Tensor, timesteps: int) -> Tensor:
    """Return t*, the timestep at which a sampler with trailing spacing stands after this share of its steps.

    Share ratio 0 gives T - 1, the start, where nothing is shared.
    """
    return ((1 - share_ratio) * timesteps).round().long().clamp(1, timesteps) - 1


def diffusion_query(process: Process, z: Tensor, c: Condition, t: Tensor, eps: Tensor) -> Query:
    """Plain diffusion: x_t = alpha_t z + sigma_t eps under c; the answer means z (Ho et al., 2020)."""
    alpha, sigma = process.at(t)
    return Query(diffusion.add_noise(z, eps, alpha, sigma), t, c, diffusion.target(process.kind, z, eps, alpha, sigma))


def member_weights(soft: SoftTarget, x_t: Tensor, z: Tensor, present: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return w of shape (n, N), what each member counts in the soft target; absent members count nothing.

    posterior: w_n = softmax_n(-|x_t - alpha z_n|^2 / (2 sigma^2)), the chance that x_t came from z_n;
    mean: w_n = 1/N. `z` is (n, N, ...), padded, and `present` (n, N) tells members from padding.
    """
    if soft == "mean":
        return present / present.sum(1, keepdim=True)
    distance = (x_t[:, None] - spread(alpha, z) * z).flatten(2).square().sum(2)
    logits = -distance / (2 * sigma[:, None].square())
    return logits.masked_fill(~present, -torch.inf).softmax(1)


def shared_query(
    process: Process,
    soft: SoftTarget,
    z_m: Tensor,
    z: Tensor,
    present: Tensor,
    c_bar: Condition,
    t: Tensor,
    eps: Tensor,
) -> Query:
    """Shared phase, t > t*: x_t = alpha_t z_m + sigma_t eps under c_bar; the answer means sum_n w_n z_n.

    With the posterior's weights that is what an optimal denoiser of the group's mixture returns. Design, section 5.
    """
    alpha, sigma = process.at(t)
    x_t = diffusion.add_noise(z_m, eps, alpha, sigma)
    weights = member_weights(soft, x_t, z, present, alpha, sigma)
    soft_target = torch.einsum("nm,nm...->n...", weights, z)
    return Query(x_t, t, c_bar, process.answer(x_t, soft_target, t))


@torch.no_grad()
def shared_prediction(
    process: Process, network: Network, c_bar: Condition, eps: Tensor, steps: int, sampler_steps: int
) -> Tensor:
    """Return the x_0 that f predicts at the last of the first `steps` of `sampler_steps` steps, all under c_bar.

    The sampler is deterministic (DDIM, Song et al., 2021), unguided and with trailing spacing; eps (n, ...) is the
    noise that it begins with. Costs `steps` evaluations an item. Raises ValueError below one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} shared steps predict nothing; give at least 1")
    x_t = x_0 = eps
    for step in range(steps):
        ratios = (torch.full((len(eps),), k / sampler_steps) for k in (step, step + 1))
        t, after = (branch_time(ratio, len(process.alphas)) for ratio in ratios)
        level = process.at(t)
        x_0 = diffusion.predicted_sample(process.kind, network(x_t, t, c_bar).to(x_t), x_t, *level)
        x_t = diffusion.add_noise(x_0, diffusion.implied_noise(x_t, x_0, *level), *process.at(after))
    return x_0


def mixture_start(
    process: Process, soft: SoftTarget, z_m: Tensor, z: Tensor, present: Tensor, t_star: Tensor, eps: Tensor
) -> Tensor:
    """Return x_t* of shape (n, ...), where a group's shared latent would stand if f met its soft target exactly.

    It is what a deterministic sampler reaches from pure noise eps by following the shared phase's own soft target.
    mean: the prediction is z_bar at every t, so the sampler stays on x_t = alpha_t z_bar + sigma_t eps. (A noised
    member, which the shared phase is trained on, lies off this path by alpha_t (z_m - z_bar).)
    posterior: the predictions are those of the mixture of the members, whose marginals the sampler keeps (Song et al.,
    2021), so x_t* is distributed as alpha_t* z_m + sigma_t* eps with a random member m. That takes many steps: a few
    end nearer to the mean.
    """
    alpha, sigma = process.at(t_star)
    origin = torch.einsum("nm,nm...->n...", present / present.sum(1, keepdim=True), z) if soft == "mean" else z_m
    return diffusion.add_noise(origin, eps, alpha, sigma)


def branch_query(process: Process, z_n: Tensor, c_n: Condition, t: Tensor, x_star: Tensor, t_star: Tensor) -> Query:
    """Branch phase, t <= t*: x_t on the path from x_t* to z_n under c_n; the answer means z_n.

    The path is a bridge: eps_n = (x_t* - alpha_t* z_n) / sigma_t* is the noise that a deterministic sampler sees when
    it predicts z_n at x_t*, and x_t = alpha_t z_n + sigma_t eps_n are what it then passes. Design, section 5.

    Whatever the pairs of x_t* and z_n, the flow that answers with their mean carries the distribution of x_t* into that
    of z_n (Lipman et al., 2023; Albergo and Vanden-Eijnden, 2023). So where x_t* are drawn as in sampling, branches end
    among the pictures of c_n, however far off the shared phase ends.
    """
    return diffusion_query(process, z_n, c_n, t, diffusion.implied_noise(x_star, z_n, *process.at(t_star)))


def anchor(base: Network, query: Query) -> Tensor:
    """Consistency in the branch phase: b(x_t, c_n), near which f(x_t, c_n) stays on ordinarily noised latents.

    Taken at every t of the plain diffusion items, whose f is at hand, so that it also holds independent sampling.
    """
    with torch.no_grad():
        return base(query.x_t, query.t, query.condition)


def shared_anchor(base: Network, query: Query, c: Condition, item: Tensor) -> Tensor:
    """Consistency in the shared phase: (1/N) sum_n b(x_t, c_n), near which f(x_t, c_bar) stays.

    `c` holds the members of all items one after another, k rows, and `item` (k,) the item that each belongs to; costs
    k evaluations of the base.
    """
    with torch.no_grad():
        answers = base(query.x_t[item], query.t[item], c)
    item = item.to(answers.device)
    total = answers.new_zeros(query.x_t.shape).index_add_(0, item, answers)
    return total / spread(item.bincount(minlength=len(total)), total)


def min_snr(process: Process, t: Tensor, gamma: float) -> Tensor:
    """Return the weight of the squared error at timesteps (n,): min(SNR, gamma) on x_0 (Hang et al., 2023).

    An error of the answer is one of x_0 times sigma / alpha (eps), sigma (v and flow) or 1, so the weights are
    min(SNR, gamma) / SNR, sigma^2 min(SNR, gamma) and min(SNR, gamma), with SNR = (alpha / sigma)^2.
    """
    alpha, sigma = process.at(t)
    snr = (alpha / sigma).square()
    if process.kind == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) * (1 if process.kind == "sample" else sigma.square())


def terms(
    network: Network,
    queries: Mapping[str, Query],
    anchors: Mapping[str, Tensor],
    weight: Callable[[Tensor], Tensor] = torch.ones_like,
) -> dict[str, Tensor]:
    """Return each term's values, one an item: those of the queries by their names, and "consistency" of the anchors.

    `anchors` are the base's answers to queries of the same names. `weight` of timesteps (n,) multiplies an item's
    values, such as `min_snr`. All queries are one evaluation of the network.
    """
    asked = list(queries.values())
    outputs = network(
        torch.cat([query.x_t for query in asked]),
        torch.cat([query.t for query in asked]),
        {name: torch.cat([query.condition[name] for query in asked]) for name in asked[0].condition},
    )
    output = dict(zip(queries, torch.split(outputs, [len(query.t) for query in asked]), strict=True))
    weights = {name: weight(query.t).to(outputs) for name, query in queries.items()}
    values = {name: weights[name] * _error(output[name], query.answer) for name, query in queries.items()}
    if anchors:
        parts = [weights[name] * _error(output[name], answers) for name, answers in anchors.items()]
        values["consistency"] = torch.cat(parts)
    return values


def total(means: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return L, the weighted sum of the terms' means."""
    return torch.stack([weights[name] * mean for name, mean in means.items()]).sum()


def _error(output: Tensor, answer: Tensor) -> Tensor:
    return (output - answer.to(output)).square().flatten(1).mean(1)
