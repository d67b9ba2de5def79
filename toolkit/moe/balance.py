"""Keeping experts evenly used: losses on routers, the correction of a choice's bias, and figures of the load.

T tokens, L layers of experts, E experts, K of them a token. multiplicity [T]: how many unshared samples a token stands
for; every sum over tokens is weighted by it, so shared prefixes count as their samples one by one. Nothing here
drops a token: there is no capacity.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.rowwise import compute_dtype


def load_balancing_loss(logits: Sequence[Tensor], ids: Sequence[Tensor], multiplicity: Tensor | None = None) -> Tensor:
    """``E sum_e f_e P_e`` with, over the tokens t of all layers l and N = L sum_t m_t,

    ``f_e = sum_lt m_t [t goes to e] / N`` (constant) and ``P_e = sum_lt m_t softmax(logits_lt)_e / N``.

    Fedus et al., "Switch Transformers", 2021, equations 4 to 6, as transformers' ``load_balancing_loss_func`` has it:
    layers given together are pooled, and f sums to K, so even loads give K. logits: [T, E] a layer; ids: [T, K] a
    layer, the choice. A scalar in float32 (float64 for float64), differentiable in the logits. Raises ToolkitError
    where layers differ in experts, for their loads are added up.
    """
    experts = {layer.shape[1] for layer in logits}
    if len(experts) != 1:
        raise ToolkitError(f"layers have {sorted(experts)} experts; the load balancing loss needs as many in each.")
    (count,) = experts
    probabilities = [layer.to(compute_dtype(layer)).softmax(-1) for layer in logits]
    total = sum(_mass(layer, multiplicity) for layer in logits)
    load = torch.stack([expert_load(one, count, multiplicity) for one in ids]).sum(0) / total
    mean = torch.stack([(p * _column(p, multiplicity)).sum(0) for p in probabilities]).sum(0) / total
    return count * (load.to(mean.dtype) * mean).sum()


def router_z_loss(logits: Sequence[Tensor], multiplicity: Tensor | None = None) -> Tensor:
    """The mean over layers and tokens of ``logsumexp(logits)^2``, which keeps a router's logits small.

    Zoph et al., "ST-MoE", 2022, equation 5. Arguments and result as for ``load_balancing_loss``.
    """
    squares = [layer.to(compute_dtype(layer)).logsumexp(-1).square() for layer in logits]
    total = sum(_mass(layer, multiplicity) for layer in logits)
    return torch.stack([(one * _column(one[:, None], multiplicity)[:, 0]).sum() for one in squares]).sum() / total


def expert_load(ids: Tensor, experts: int, multiplicity: Tensor | None = None) -> Tensor:
    """[E] float64: how many tokens went to each expert. ids: [T, K]; ``experts`` is for slots that were skipped."""
    weight = _column(ids, multiplicity).to(torch.float64).expand(ids.shape)
    # Whole numbers, exact in any order of additions.
    load = torch.zeros(experts + 1, dtype=torch.float64, device=ids.device)
    return load.scatter_add_(0, ids.flatten(), weight.flatten())[:experts]


@torch.no_grad()
def correct_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """``bias_e += rate sign(mean load - load_e)``, in place: overloaded experts become harder to choose.

    Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024, as DeepSeek-V3 trains with it. load: [E]. bias: as many
    numbers, in any shape.
    """
    bias.add_((load.mean() - load).sign().to(bias.dtype).view(bias.shape), alpha=rate)


def load_figures(loads: Sequence[Tensor]) -> dict[str, float]:
    """Of the loads [E] of each layer, how even they are.

    ``expert_load_max``: the largest load over the mean of its layer, of all layers (1 is even, E / K the worst).
    ``expert_load_entropy``: the entropy of the load as a share of ln E, the mean over layers (1 is even).
    """
    shares = [load / load.sum() for load in loads]
    entropies = [-torch.special.xlogy(share, share).sum() / math.log(max(len(share), 2)) for share in shares]
    return {
        "expert_load_max": max(float(share.amax()) * len(share) for share in shares),
        "expert_load_entropy": float(torch.stack(entropies).mean()),
    }


class RouterStatistics:
    """What routers did in some forwards: an observer for ``toolkit.moe.observer.observing``.

    losses: keep logits, with their graph, until ``take_losses``. Loads are counted in any case, until ``take_loads``.
    """

    def __init__(self, losses: bool = True) -> None:
        self.losses = losses
        self.corrections: dict[int, Tensor] = {}
        self._loads: dict[int, Tensor] = {}
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __call__(
        self, layer: int, logits: Tensor, ids: Tensor, multiplicity: Tensor | None, correction: Tensor | None
    ) -> None:
        """Called by routers.

        Raises ToolkitError inside a reentrant checkpoint, which hides the logits' graph, and for a second forward
        before the losses of the first were taken.
        """
        if self.losses and layer in self._seen:
            raise ToolkitError(f"the router of layer {layer} ran twice; take the losses of a forward before the next.")
        if self.losses and not torch.is_grad_enabled():
            raise ToolkitError(
                "a router ran without gradients while its losses are wanted; allowed is activation checkpointing with "
                "use_reentrant=False, or none."
            )
        if correction is not None:
            self.corrections[layer] = correction
        load = expert_load(ids, logits.shape[1], multiplicity)
        self._loads[layer] = self._loads[layer] + load if layer in self._loads else load
        if self.losses:
            self._seen[layer] = logits, ids, multiplicity

    def take_losses(self) -> tuple[Tensor, Tensor]:
        """(load balancing loss, z-loss) of the forward since the last call; the logits are let go.

        The first is the mean of each layer's own: pooled, layers may stay uneven that make up for each other.
        """
        seen, self._seen = list(self._seen.values()), {}
        if not seen:
            raise ToolkitError("no router of the model was seen; balancing needs routers that are patched.")
        logits, ids, (multiplicity, *_) = (list(part) for part in zip(*seen))
        each = [load_balancing_loss([one], [chosen], multiplicity) for one, chosen in zip(logits, ids)]
        return torch.stack(each).mean(), router_z_loss(logits, multiplicity)

    def take_loads(self) -> dict[int, Tensor]:
        """[E] tokens of each expert by layer, since the last call."""
        taken, self._loads = dict(sorted(self._loads.items())), {}
        return taken


def _column(like: Tensor, multiplicity: Tensor | None) -> Tensor:
    """[T, 1] the weight of each row of ``like``."""
    if multiplicity is None:
        return torch.ones(len(like), 1, dtype=torch.int64, device=like.device)
    return multiplicity[:, None]


def _mass(rows: Tensor, multiplicity: Tensor | None) -> Tensor | int:
    """Samples' tokens that the rows stand for."""
    return len(rows) if multiplicity is None else multiplicity.sum()
