"""TRL's AsyncGRPOTrainer with ``toolkit serve`` in the place of vLLM, and with the engine's training forward.

``transfer``  weights as folders that the server reads
``worker``    TRL's rollout worker, which says by which weights each sample was made
``forward``   TRL's packed rows as prefix trees: log-probabilities with the server's bits
``trainer``   the trainer of these parts

``toolkit serve MODEL --enable-admin-endpoints`` is the server: TRL's client sends no keys.
"""

from train_patches.trl_async.trainer import async_grpo_trainer
from train_patches.trl_async.transfer import FolderWeightTransfer

__all__ = ["FolderWeightTransfer", "async_grpo_trainer"]
