"""A model with two MoE layers that stands for a patched one, and the data it is trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.modules.moe_experts import MoeExperts
from toolkit.moe import ExpertLayout
from toolkit.patching.claim import replace_forward

EXPERTS, WIDTH, TOKENS, STEPS = 4, 8, 12, 6


class MoeLayer(nn.Module):
    """Softmax routing to two of four gated experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(EXPERTS, 12, WIDTH) * 0.3)
        self.experts.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 6) * 0.3)
        replace_forward(self.experts, MoeExperts("up", "down", ExpertLayout("silu")).make_forward())()

    def forward(self, x: Tensor) -> Tensor:
        topk_weights, topk_ids = self.router(x).softmax(-1).topk(2)
        return x + self.experts(x, topk_ids, topk_weights)


def small_model() -> nn.Sequential:
    """The same weights every time."""
    torch.manual_seed(3)
    return nn.Sequential(MoeLayer(), nn.Linear(WIDTH, WIDTH), MoeLayer(), nn.Linear(WIDTH, 1))


def batch(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a step's tokens, the same over all ranks for any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(TOKENS, 1, generator=generator)
    share = TOKENS // size
    return x[rank * share : (rank + 1) * share], y[rank * share : (rank + 1) * share]


def loss_of(model: nn.Module, step: int, rank: int, size: int) -> Tensor:
    x, y = batch(step, rank, size)
    return F.mse_loss(model(x), y)


def train_alone(clip: float) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of plain torch on one process."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, step, 0, 1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses, {name: value.detach().clone() for name, value in model.state_dict().items()}
