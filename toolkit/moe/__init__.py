"""Mixtures of experts: one plan of which row goes where, for a training batch and a decode step alike."""

from toolkit.moe.exchange import ExpertParallel
from toolkit.moe.experts import ExpertAdapters, ExpertWeights, mix
from toolkit.ops.dispatch_plan import DispatchPlan, dispatch_plan

__all__ = ["DispatchPlan", "ExpertAdapters", "ExpertParallel", "ExpertWeights", "dispatch_plan", "mix"]
