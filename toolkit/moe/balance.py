"""Load balancing of experts: auxiliary losses of routers, updates of expert biases, and metrics of the load.

T tokens, L MoE layers, E experts, K experts per token. multiplicity [T]: how many unshared samples a token stands for;
every sum over tokens is weighted by it, so a batch of prefix trees counts as its unshared samples. No token is dropped:
there is no capacity factor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.rowwise import compute_dtype
from toolkit.ops.targets import mean_over


def load_balancing_loss(
    logits: Sequence[Tensor], topk_ids: Sequence[Tensor], multiplicity: Tensor | None = None
) -> Tensor:
    """The load balancing loss ``E sum_e f_e P_e``, a scalar in float32 (float64 for float64).

    Over the tokens t of all layers l, with N = L sum_t m_t: ``f_e = sum_lt m_t [t goes to e] / N`` (constant) and
    ``P_e = sum_lt m_t softmax(logits_lt)_e / N``. Layers given together are pooled, and f sums to K, so even loads
    give K; no tokens give 0.

    Args:
        logits: [T, E] of each layer; the loss is differentiable in them.
        topk_ids: [T, K] of each layer, the routing.
        multiplicity: [T] or None for ones.

    Raises:
        ToolkitError: where layers differ in their number of experts.

    Source: Fedus et al., "Switch Transformers", 2021, equations 4 to 6; transformers' ``load_balancing_loss_func``.
    """
    experts = {layer.shape[1] for layer in logits}
    if len(experts) != 1:
        raise ToolkitError(f"The load balancing loss needs layers with equally many experts, got {sorted(experts)}.")
    (count,) = experts
    probabilities = [layer.to(compute_dtype(layer)).softmax(-1) for layer in logits]
    total = sum(_mass(layer, multiplicity) for layer in logits)
    load = mean_over(torch.stack([expert_load(one, count, multiplicity) for one in topk_ids]).sum(0), total)
    mean = mean_over(torch.stack([(p * _column(p, multiplicity)).sum(0) for p in probabilities]).sum(0), total)
    return count * (load.to(mean.dtype) * mean).sum()


def router_z_loss(logits: Sequence[Tensor], multiplicity: Tensor | None = None) -> Tensor:
    """The z-loss, the mean over layers and tokens of ``logsumexp(logits)^2``, which keeps a router's logits small.

    Arguments and dtype as for ``load_balancing_loss``. Source: Zoph et al., "ST-MoE", 2022, equation 5.
    """
    squares = [layer.to(compute_dtype(layer)).logsumexp(-1).square() for layer in logits]
    total = sum(_mass(layer, multiplicity) for layer in logits)
    weighted = torch.stack([(one * _column(one[:, None], multiplicity)[:, 0]).sum() for one in squares])
    return mean_over(weighted.sum(), total)


def expert_load(topk_ids: Tensor, num_experts: int, multiplicity: Tensor | None = None) -> Tensor:
    """[E] float64: how many tokens went to each expert by topk_ids [T, K]; ``num_experts`` marks a skipped pair."""
    weight = _column(topk_ids, multiplicity).to(torch.float64).expand(topk_ids.shape)
    # Integers in float64: exact in any order of additions.
    load = torch.zeros(num_experts + 1, dtype=torch.float64, device=topk_ids.device)
    return load.scatter_add_(0, topk_ids.flatten(), weight.flatten())[:num_experts]


@torch.no_grad()
def update_expert_bias(expert_bias: Tensor, load: Tensor, rate: float) -> None:
    """``expert_bias_e += rate sign(mean load - load_e)``, in place: overloaded experts are selected less.

    Args:
        expert_bias: E numbers, in any shape.
        load: [E].
        rate: the step.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024; DeepSeek-V3 trains with it.
    """
    expert_bias.add_((load.mean() - load).sign().to(expert_bias.dtype).view(expert_bias.shape), alpha=rate)


def load_metrics(loads: Sequence[Tensor]) -> dict[str, float]:
    """Metrics of the balance of the loads [E] of each layer.

    ``expert_load_max``: the largest load over the mean of its layer, the maximum over layers (1 is even, E / K the
    worst). ``expert_load_entropy``: the entropy of the load over ln E, the mean over layers (1 is even).
    """
    shares = [mean_over(load, load.sum()) for load in loads]
    entropies = [-torch.special.xlogy(share, share).sum() / math.log(max(len(share), 2)) for share in shares]
    return {
        "expert_load_max": max(float(share.amax()) * len(share) for share in shares),
        "expert_load_entropy": float(torch.stack(entropies).mean()),
    }


class RouterStatistics:
    """Statistics of routers over some forwards: an observer for ``toolkit.moe.observer.observing``.

    Args:
        losses: keep logits, with their graph, until ``take_losses``. Loads are always counted, until ``take_loads``.

    ``expert_biases`` holds the expert bias of each layer whose router has one.
    """

    def __init__(self, losses: bool = True) -> None:
        self.losses = losses
        self.expert_biases: dict[int, Tensor] = {}
        self._loads: dict[int, Tensor] = {}
        self._observed: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __call__(
        self, layer: int, logits: Tensor, topk_ids: Tensor, multiplicity: Tensor | None, expert_bias: Tensor | None
    ) -> None:
        """Called by routers.

        Raises:
            ToolkitError: inside a reentrant checkpoint, which hides the logits' graph, and for a second forward before
                the losses of the first were taken.
        """
        if self.losses and layer in self._observed:
            raise ToolkitError(f"The router of layer {layer} ran twice; call take_losses() after every forward.")
        if self.losses and not torch.is_grad_enabled():
            raise ToolkitError(
                "Losses of routers need gradients; use activation checkpointing with use_reentrant=False, or none."
            )
        if expert_bias is not None:
            self.expert_biases[layer] = expert_bias
        load = expert_load(topk_ids, logits.shape[1], multiplicity)
        self._loads[layer] = self._loads[layer] + load if layer in self._loads else load
        if self.losses:
            self._observed[layer] = logits, topk_ids, multiplicity

    def take_losses(self) -> tuple[Tensor, Tensor]:
        """(load balancing loss, z-loss) of the forward since the last call; the logits are released.

        The first is the mean of the layers' losses: in a pooled one, uneven layers can compensate each other.
        """
        observed, self._observed = list(self._observed.values()), {}
        if not observed:
            raise ToolkitError("Balancing needs patched routers, and no router of the model was observed.")
        logits, topk_ids, (multiplicity, *_) = (list(part) for part in zip(*observed))
        each = [load_balancing_loss([one], [ids], multiplicity) for one, ids in zip(logits, topk_ids)]
        return torch.stack(each).mean(), router_z_loss(logits, multiplicity)

    def take_loads(self) -> dict[int, Tensor]:
        """[E] the tokens of each expert, by layer, since the last call."""
        taken, self._loads = dict(sorted(self._loads.items())), {}
        return taken


def _column(like: Tensor, multiplicity: Tensor | None) -> Tensor:
    """[T, 1] the multiplicity of each row of ``like``."""
    if multiplicity is None:
        return torch.ones(len(like), 1, dtype=torch.int64, device=like.device)
    return multiplicity[:, None]


def _mass(rows: Tensor, multiplicity: Tensor | None) -> Tensor | int:
    """The number of unshared tokens that the rows stand for."""
    return len(rows) if multiplicity is None else multiplicity.sum()
