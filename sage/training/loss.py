"""L_SAGE, the loss that teaches a diffusion model to share its early steps: a function for each term, then their sum.

The SAGE paper (arXiv 2509.15865) names the parts, soft-target alignment and dual-phase consistency, without formulas;
the formulas below are this project's reading of them.

    L = w_diffusion L_diffusion + w_shared L_shared + w_branch L_branch + w_consistency L_consistency

Notation, in addition to `sage.diffusion`
    n, N       a member of a group, and the number of members    t*      branch time: shared phase t > t*, then branch
    z_n, c_n   clean latents and condition of a member           c_bar   condition of the group, the mean of c_n
    z_bar      the mean of z_n                                   m       a random member of the group
    f, b       the trained network, and the frozen base; both predict in their own prediction type
    y(x_0)     the network output from which x_0 is predicted at x_t

Every term is the squared error of f, averaged over an item's elements: one value per item, not reduced over items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sage import diffusion
from sage.diffusion import NoiseSchedule, spread
from sage.sampling.conditions import Condition, select

SoftTarget = Literal["mean", "posterior"]
BranchStart = Literal["sampled", "mixture", "plain"]
Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t, t, condition) to the network output, of the shape of x_t."""


@dataclass(frozen=True)
class Query:
    """One batch of network inputs with its regression target: x_t (n, ...), t (n,), a condition, target like x_t."""

    x_t: Tensor
    t: Tensor
    condition: Condition
    target: Tensor

    def select(self, items: slice) -> "Query":
        """Return these items."""
        return Query(self.x_t[items], self.t[items], select(self.condition, items), self.target[items])


def diffusion_query(schedule: NoiseSchedule, z: Tensor, c: Condition, t: Tensor, eps: Tensor) -> Query:
    """Plain diffusion: x_t = alpha_t z + sigma_t eps under c, with target y(z) (Ho et al., 2020)."""
    alpha, sigma = schedule.at(t)
    target = diffusion.target(schedule.kind, z, eps, alpha, sigma)
    return Query(diffusion.add_noise(z, eps, alpha, sigma), t, c, target)


def member_weights(soft: SoftTarget, x_t: Tensor, z: Tensor, present: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return w of shape (n, N), the weight of each member in the soft target; padding weighs 0.

    soft          "posterior": w_n = softmax_n(-|x_t - alpha z_n|^2 / (2 sigma^2)), the probability that x_t came from
                  z_n; "mean": w_n = 1/N
    x_t           noised latents (n, ...)
    z, present    latents of the members, padded to (n, N, ...), and the mask of members (n, N)
    alpha, sigma  noise levels (n,)
    """
    if soft == "mean":
        return present / present.sum(1, keepdim=True)
    distance = (x_t[:, None] - spread(alpha, z) * z).flatten(2).square().sum(2)
    logits = -distance / (2 * sigma[:, None].square())
    return logits.masked_fill(~present, -torch.inf).softmax(1)


def shared_query(
    schedule: NoiseSchedule,
    soft: SoftTarget,
    z_m: Tensor,
    z: Tensor,
    present: Tensor,
    c_bar: Condition,
    t: Tensor,
    eps: Tensor,
) -> Query:
    """Shared phase, t > t*: x_t = alpha_t z_m + sigma_t eps under c_bar, with target y(sum_n w_n z_n).

    With the posterior weights this is the prediction of an optimal denoiser for the mixture of the members.

    schedule  noise schedule of the network          z, present  latents of the members (n, N, ...), mask (n, N)
    soft      weights of the members                 c_bar       condition of the group
    z_m       latents of one random member (n, ...)  t, eps      timesteps (n,), noise (n, ...)
    """
    alpha, sigma = schedule.at(t)
    x_t = diffusion.add_noise(z_m, eps, alpha, sigma)
    weights = member_weights(soft, x_t, z, present, alpha, sigma)
    soft_target = torch.einsum("nm,nm...->n...", weights, z)
    return Query(x_t, t, c_bar, schedule.target(x_t, soft_target, t))


def mixture_start(
    schedule: NoiseSchedule, soft: SoftTarget, z_m: Tensor, z: Tensor, present: Tensor, t_star: Tensor, eps: Tensor
) -> Tensor:
    """Return x_t* of shape (n, ...), the shared latent at the branch if f met its soft target exactly.

    A deterministic sampler whose predictions are the soft target reaches it from pure noise eps.
    mean: the prediction is z_bar at every t, so the sampler stays on x_t = alpha_t z_bar + sigma_t eps. (The inputs of
    the shared phase, noised members, lie off this path by alpha_t (z_m - z_bar).)
    posterior: an optimal denoiser of the mixture of the members makes these predictions, and the sampler keeps the
    marginals of the mixture (Song et al., 2021), so x_t* is distributed as alpha_t* z_m + sigma_t* eps with a random
    member m. That holds for many steps; after few steps the sampler ends nearer to the mean.

    schedule  noise schedule                         z, present   latents of the members (n, N, ...), mask (n, N)
    soft      weights of the members                 t_star, eps  branch times (n,), noise (n, ...)
    z_m       latents of one random member (n, ...)
    """
    alpha, sigma = schedule.at(t_star)
    origin = torch.einsum("nm,nm...->n...", present / present.sum(1, keepdim=True), z) if soft == "mean" else z_m
    return diffusion.add_noise(origin, eps, alpha, sigma)


def branch_query(
    schedule: NoiseSchedule, z_n: Tensor, c_n: Condition, t: Tensor, x_star: Tensor, t_star: Tensor
) -> Query:
    """Branch phase, t <= t*: x_t on the path from x_t* to z_n under c_n, with target y(z_n).

    The path is a bridge: eps_n = (x_t* - alpha_t* z_n) / sigma_t* is the noise that a deterministic sampler sees when
    it predicts z_n at x_t*, and it then passes through x_t = alpha_t z_n + sigma_t eps_n.

    For any pairing of x_t* and z_n, the flow that predicts their conditional mean transports the distribution of x_t*
    to the distribution of z_n (Lipman et al., 2023; Albergo and Vanden-Eijnden, 2023). So if x_t* is drawn as in
    sampling, branches end at images of c_n, even if the shared phase ends far from them.

    schedule  noise schedule                         t               timesteps (n,)
    z_n, c_n  latents (n, ...), conditions           x_star, t_star  shared latents (n, ...), branch times (n,)
    """
    return diffusion_query(schedule, z_n, c_n, t, diffusion.implied_noise(x_star, z_n, *schedule.at(t_star)))


def anchor(base: Network, query: Query) -> Tensor:
    """Consistency in the branch phase: b(x_t, c_n), the target for f(x_t, c_n) on ordinarily noised latents.

    It uses the plain diffusion items, for which f is computed anyway. They have every t, so it also protects
    independent sampling.
    """
    with torch.no_grad():
        return base(query.x_t, query.t, query.condition)


def shared_anchor(base: Network, query: Query, c: Condition, item: Tensor) -> Tensor:
    """Consistency in the shared phase: (1/N) sum_n b(x_t, c_n), the target for f(x_t, c_bar).

    `c` holds the conditions of all items' members, k rows, and `item` (k,) the item of each row. It costs k evaluations
    of the base.
    """
    with torch.no_grad():
        outputs = base(query.x_t[item], query.t[item], c)
    item = item.to(outputs.device)
    total = outputs.new_zeros(query.x_t.shape).index_add_(0, item, outputs)
    return total / spread(item.bincount(minlength=len(total)), total)


def min_snr(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """Return the weight of the squared error at timesteps (n,): min(SNR, gamma) on x_0 (Hang et al., 2023).

    An output error e is an error in x_0 of e sigma / alpha for eps-prediction, e sigma for v and flow, and e for x_0,
    so the weights are min(SNR, gamma) / SNR, sigma^2 min(SNR, gamma) and min(SNR, gamma), with SNR = (alpha / sigma)^2.
    """
    alpha, sigma = schedule.at(t)
    snr = (alpha / sigma).square()
    if schedule.kind == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) * (1 if schedule.kind == "sample" else sigma.square())


def terms(
    network: Network,
    queries: Mapping[str, Query],
    anchors: Mapping[str, Tensor],
    weight: Callable[[Tensor], Tensor] = torch.ones_like,
) -> dict[str, Tensor]:
    """Return each term's values, one per item: the queries by their names, and "consistency" for the anchors.

    `anchors` are targets from the base for the queries of the same names. `weight` maps timesteps (n,) to factors of
    the items' values, for example `min_snr`. All queries go through the network in one call.
    """
    asked = list(queries.values())
    outputs = network(
        torch.cat([query.x_t for query in asked]),
        torch.cat([query.t for query in asked]),
        {name: torch.cat([query.condition[name] for query in asked]) for name in asked[0].condition},
    )
    output = dict(zip(queries, torch.split(outputs, [len(query.t) for query in asked]), strict=True))
    weights = {name: weight(query.t).to(outputs) for name, query in queries.items()}
    values = {name: weights[name] * _error(output[name], query.target) for name, query in queries.items()}
    if anchors:
        parts = [weights[name] * _error(output[name], outputs) for name, outputs in anchors.items()]
        values["consistency"] = torch.cat(parts)
    return values


def total(means: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return L, the weighted sum of the terms' means."""
    return torch.stack([weights[name] * mean for name, mean in means.items()]).sum()


def _error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target.to(output)).square().flatten(1).mean(1)
