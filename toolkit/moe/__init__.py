"""MoE layers: expert weights, dispatchers, and the forward that training and decoding share."""

from toolkit.moe.dispatchers import LOCAL, Dispatcher, ExpertParallelDispatcher, LocalDispatcher
from toolkit.moe.forward import moe_forward
from toolkit.moe.weights import ExpertAdapters, ExpertLayout, ExpertWeights
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan

__all__ = [
    "LOCAL",
    "DispatchPlan",
    "Dispatcher",
    "ExpertAdapters",
    "ExpertLayout",
    "ExpertParallelDispatcher",
    "ExpertWeights",
    "LocalDispatcher",
    "dispatch_plan",
    "moe_forward",
]
