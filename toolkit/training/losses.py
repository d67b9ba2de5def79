"""Losses: a few lines of torch each on the log-probabilities of ``linear_logprob``.

All inputs are in nats; gradients are exact, because every statistic that a loss reads is differentiable. The values are
the ones that a rollout returns, so a policy's ratio to itself is exactly 1.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.ops import IGNORED
from toolkit.ops.linear_logprob.deferred import summed_cross_entropy, token_logprobs, token_statistics
from toolkit.ops.targets import mean_over


def next_token_loss(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0, dft: bool = False
) -> Tensor:
    """Mean cross-entropy over the predicted tokens, in nats.

    ``-(1 - s) log p(target) - s mean_v log p(v) + z_loss lse^2`` with s the label smoothing (Szegedy et al., 2016) and
    lse the log of the softmax's normaliser, which ``z_loss`` pulls to 0 (PaLM, 2022). With ``dft`` the first term is
    ``-p(target) log p(target)``, its first factor without gradient (Wu et al., 2025); it takes no label smoothing.
    logits: [T, V], dense or deferred; targets: [T] int64, rows with -100 count for nothing. 0 where none counts.
    """
    counted = targets != IGNORED
    if label_smoothing == z_loss == 0.0 and not dft:
        return mean_over(summed_cross_entropy(logits, targets), counted.sum())
    if label_smoothing > 0.0:
        logprob, lse, _, mean = token_statistics(logits, targets)
        loss = -(1.0 - label_smoothing) * logprob - label_smoothing * (mean - lse)
    else:
        logprob, lse = token_logprobs(logits, targets)
        loss = -logprob * logprob.detach().exp() if dft else -logprob
    if z_loss > 0.0:
        loss = loss + z_loss * lse.square()
    return mean_over(torch.where(counted, loss, 0.0).sum(), counted.sum())


Surrogate = Literal["clipped", "cispo", "sapo", "vespo"]
KLEstimator = Literal["k1", "k2", "k3"]


class PolicyLoss(NamedTuple):
    """One entry per token: the loss, and whether its ratio was outside of the trust region."""

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprob: Tensor,
    behaviour: Tensor,
    advantage: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    reference: Tensor | None = None,
    beta: float = 0.0,
    lengths: Sequence[int] | None = None,
    delta: float | None = None,
    surrogate: Surrogate = "clipped",
    summed: bool = False,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0),
    use_bias_correction_kl: bool = False,
    kl_estimator: KLEstimator = "k3",
    weights: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate of PPO (Schulman et al., 2017), which GRPO uses with group-normalised advantages.

    ``-min(r a, clip(r, 1 - epsilon, 1 + epsilon_high) a) + beta (e^d - d - 1)`` per token, with
    ``r = exp(logprob - behaviour)``, ``d = reference - logprob`` (an estimate of KL(policy | reference) that is never
    negative; Schulman, 2020).

    Args:
        logprob: [T], of the policy in training.
        behaviour: [T], the log-probability that the token was sampled with, without gradient.
        advantage: [T].
        reference: [T], of the reference policy.
        lengths: tokens of each completion; r is then the geometric mean over its completion (GSPO; Zheng et al., 2025).
        delta: bounds r in the first term, too.
        surrogate: the first term. cispo (MiniMax, 2025): ``-min(r, epsilon_high) a logprob``, the factor without
            gradient; ratios beyond the bound count as clipped. sapo (Gao et al., 2025): ``-4/t s(t (r - 1)) a`` with s
            the logistic function. vespo (Shen et al., 2026): ``-f(w) a logprob``, ``f(w) = e^(l - l w) w^k`` without
            gradient, w the product of the completion's ratios; needs ``lengths``, which change nothing else then.
        summed: with ``lengths``, r is the product over its completion (RLOO; Ahmadian et al., 2024).
        sapo_temperatures: t where the advantage is above 0, and elsewhere.
        vespo: k and l where the advantage is at least 0, and k and l elsewhere.
        use_bias_correction_kl: r weighs the divergence too (DeepSeek-V3.2, 2025).
        kl_estimator: of the divergence, see ``kl_estimate``; the formula above is k3.
        weights: [T] of the first term, without gradient.
    """
    difference = logprob - behaviour
    if lengths is not None and surrogate != "vespo":
        means = sequence_mean(difference, lengths)
        counts = [float(length) for length in lengths for _ in range(length)]
        difference = means * means.new_tensor(counts) if summed else means
    ratio = torch.exp(difference)
    if surrogate == "cispo":
        loss = -ratio.clamp(max=epsilon_high).detach() * advantage * logprob
        clipped = (ratio > epsilon_high) & (advantage > 0)
    elif surrogate == "sapo":
        above, elsewhere = sapo_temperatures
        temperature = torch.where(advantage > 0, ratio.new_tensor(above), ratio.new_tensor(elsewhere))
        loss = -torch.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature * advantage
        clipped = torch.zeros_like(advantage, dtype=torch.bool)
    elif surrogate == "vespo":
        assert lengths is not None
        loss = -_gamma_weights(difference.detach(), advantage, lengths, vespo) * advantage * logprob
        clipped = torch.zeros_like(advantage, dtype=torch.bool)
    else:
        bounded = ratio.clamp(1.0 - epsilon, 1.0 + epsilon_high)
        limited = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(limited * advantage, bounded * advantage)
        clipped = ratio * advantage > bounded * advantage
    if weights is not None:
        loss = loss * weights
    if reference is not None and beta:
        divergence = kl_estimate(logprob, reference, kl_estimator)
        loss = loss + beta * (divergence * ratio if use_bias_correction_kl else divergence)
    return PolicyLoss(loss, clipped.detach())


def _gamma_weights(
    difference: Tensor, advantage: Tensor, lengths: Sequence[int], vespo: tuple[float, float, float, float]
) -> Tensor:
    """[T] ``f(w)`` of ``policy_loss``, with log w bounded by log 1e-8 and 20 as in TRL."""
    bounds = math.log(1e-8), 20.0
    sums = [part.clamp(-20.0, 20.0).sum().clamp(*bounds).expand(len(part)) for part in difference.split(list(lengths))]
    logs = torch.cat([difference[:0], *sums])
    k, rate = (torch.where(advantage >= 0, logs.new_tensor(vespo[at]), logs.new_tensor(vespo[at + 2])) for at in (0, 1))
    return torch.exp(rate + k * logs - rate * logs.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def off_policy_mask(
    logprob: Tensor, rollout: Tensor, advantage: Tensor, lengths: Sequence[int], threshold: float
) -> Tensor:
    """[T] 1, or 0 for the tokens of completions with a negative advantage that the policy has left (DeepSeek-V3.2).

    It has where the mean of ``rollout - logprob`` over a completion is above ``threshold``.
    """
    distance = sequence_mean(rollout - logprob.detach(), lengths)
    return ((advantage >= 0) | (distance <= threshold)).to(logprob.dtype)


def kl_estimate(logprob: Tensor, reference: Tensor, kind: KLEstimator) -> Tensor:
    """Estimates of KL(policy | reference) for each sampled token (Schulman, 2020), with d = logprob - reference.

    k1: d. k2: d^2 / 2. k3: ``e^-d - 1 + d``. k1 and k3 are unbiased, k2 and k3 never negative.
    """
    difference = logprob - reference
    if kind == "k1":
        return difference
    return 0.5 * difference.square() if kind == "k2" else divergence_estimate(-difference)


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """[T] ``sum_{k >= t} gamma^(k - t) r_k`` of a completion's rewards."""
    if gamma == 1.0:
        return rewards.flip(0).cumsum(0).flip(0)
    found, total = [], rewards.new_zeros(())
    for reward in rewards.flip(0):
        total = reward + gamma * total
        found.append(total)
    return torch.stack(found[::-1]) if found else rewards


def divergence_estimate(difference: Tensor) -> Tensor:
    """``e^d - d - 1``, never negative: with ``d = log q - log p`` its mean over tokens sampled from p is KL(p | q)."""
    return torch.expm1(difference) - difference


def sequence_mean(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T] values of completions of these lengths, one after the other: each replaced by its completion's mean."""
    return torch.cat([values[:0], *(part.mean().expand(len(part)) for part in values.split(list(lengths)))])


def group_advantages(rewards: Tensor, *, scaled: bool = True, eps: float = 1e-4) -> Tensor:
    """[G, n] rewards of n completions of each prompt: ``(r - mean) / (std + eps)`` per group (GRPO; Shao et al., 2024).

    std is that of a sample (n - 1). Not ``scaled``: ``r - mean`` alone (Dr. GRPO; Liu et al., 2025). Exactly 0 where
    all of a group's rewards are equal, as in a group of one. A completion whose reward is NaN has none: its advantage
    is 0, and mean and std are those of the others.
    """
    scored = ~rewards.isnan()
    if not scored.all():
        advantages = torch.zeros_like(rewards)
        for row, kept in zip(range(len(rewards)), scored):
            if kept.any():
                advantages[row, kept] = group_advantages(rewards[row, kept][None], scaled=scaled, eps=eps)[0]
        return advantages
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centred = (rewards - rewards.mean(1, keepdim=True)).masked_fill(equal, 0.0)
    if not scaled:
        return centred
    return centred / (rewards.std(1, keepdim=True, unbiased=rewards.shape[1] > 1) + eps)


def sum_of_normalised(rewards: Tensor, weights: Sequence[float], eps: float = 1e-4) -> Tensor:
    """[G, n] ``sum_f w_f (r_f - mean_f) / (std_f + eps)`` with mean and std (n - 1) of each group (GDPO).

    Args:
        rewards: [F, G, n] of each function; NaN where one does not apply, which is then left out of mean, std and sum.
        weights: of each function.

    A function that applies to one completion of a group says nothing of it. NaN where no function applies.
    """
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True)
    centred = rewards - rewards.nansum(-1, keepdim=True) / count
    deviation = (centred.square().nansum(-1, keepdim=True) / (count - 1)).sqrt()
    normalised = torch.where(known & (count > 1), centred / (deviation + eps), 0.0)
    total = (normalised * rewards.new_tensor(list(weights))[:, None, None]).sum(0)
    return total.masked_fill(~known.any(0), torch.nan)


def importance_weight(train: Tensor, rollout: Tensor, cap: float) -> Tensor:
    """``min(exp(train - rollout), cap)``, without gradient: truncated importance sampling (Yao et al., 2025).

    Log-probabilities of the same tokens under the same weights, by the training forward and by the rollout.
    """
    return torch.exp(train - rollout).clamp_max(cap).detach()


def with_tail(logprobs: Tensor) -> Tensor:
    """[..., C] log-probabilities of distinct candidates and that of all other tokens together: [..., C + 1]."""
    seen = logprobs.logsumexp(-1, keepdim=True).clamp_max(-torch.finfo(logprobs.dtype).eps)
    return torch.cat([logprobs, torch.log(-torch.expm1(seen))], -1)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """``sum_c p_c (log p_c - log q_c)`` over the last dimension: forward KL from teacher p to student q, in nats.

    Log-probabilities of the same outcomes, [..., C]: the teacher's top-k tokens (``top_ids`` of ``linear_logprob``)
    as targets of the student, both through ``with_tail``. Swap the two for the reverse direction.
    """
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def generalized_jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    """The generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2024), bounded for 0 < beta < 1.

    ``beta KL(p | m) + (1 - beta) KL(q | m)`` with ``m = beta p + (1 - beta) q``, p the teacher's distribution and q the
    student's. 0 stands for KL(p | q), 1 for KL(q | p), as in TRL. Inputs as for ``kl_divergence``.
    """
    if beta == 0.0:
        return kl_divergence(teacher, student)
    if beta == 1.0:
        return kl_divergence(student, teacher)
    parts = torch.tensor([beta, 1.0 - beta], dtype=student.dtype, device=student.device).log()
    mean = torch.logaddexp(teacher + parts[0], student + parts[1])
    return beta * kl_divergence(teacher, mean) + (1.0 - beta) * kl_divergence(student, mean)
