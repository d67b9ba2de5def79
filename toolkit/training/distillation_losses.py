"""Losses against a teacher's distribution, one value per token in nats. Names are those of TRL's ``SDFTConfig``."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from toolkit.ops.linear_logprob.deferred import token_logprobs
from toolkit.training.losses import generalized_jsd, with_tail

Mode = Literal["full_logits", "topk_logits", "teacher_topk_logits", "sampled_token"]


class Comparison(NamedTuple):
    """How a student's distribution is compared with a teacher's.

    Args:
        mode: full_logits: over the vocabulary. topk_logits: over the student's ``top_k`` most probable tokens.
            teacher_topk_logits: over the teacher's. sampled_token: of the sampled token alone.
        beta: of ``generalized_jsd``; sampled_token has none.
        top_k: tokens.
        add_tail: all other tokens are one outcome more; otherwise those of the top-k are normalised among themselves.
        temperature: both logits are divided by it.
    """

    mode: Mode
    beta: float
    top_k: int = 0
    add_tail: bool = True
    temperature: float = 1.0


def distillation_loss(student: Tensor, teacher: Tensor, how: Comparison, tokens: Tensor) -> Tensor:
    """[R] divergences of the student's next-token distributions from the teacher's.

    The top-k tokens are constants: no gradient says which they are. ``sampled_token`` is ``(log q - log p) log q`` of
    the sampled token, the first factor without gradient: of tokens sampled from q its gradient is that of KL(q | p) in
    expectation.

    Args:
        student: [R, V] logits, dense or deferred.
        teacher: [R, V] logits, without gradient.
        how: see there.
        tokens: [R] int64, the sampled ones.
    """
    teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    if how.temperature != 1.0:
        student, teacher = student / how.temperature, teacher / how.temperature
    theirs = teacher.log_softmax(-1)
    if how.mode == "sampled_token":
        own, _ = token_logprobs(student, tokens)
        return (own - theirs.gather(1, tokens[:, None])[:, 0].to(own.dtype)).detach() * own
    if how.mode == "full_logits":
        own = _log_softmax(student)
        return generalized_jsd(theirs.to(own.dtype), own, how.beta)
    if how.mode == "teacher_topk_logits":
        best = theirs.topk(how.top_k, -1).indices
        own, _ = token_logprobs(student, best)
    else:
        every = _log_softmax(student)
        best = every.detach().topk(how.top_k, -1).indices
        own = every.gather(1, best)
    theirs = theirs.gather(1, best).to(own.dtype)
    among = with_tail if how.add_tail else _renormalised
    return generalized_jsd(among(theirs), among(own), how.beta)


def _log_softmax(logits: Tensor) -> Tensor:
    found: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return found


def _renormalised(logprobs: Tensor) -> Tensor:
    """[..., C] log-probabilities of candidates as those among themselves."""
    return logprobs.log_softmax(-1)
