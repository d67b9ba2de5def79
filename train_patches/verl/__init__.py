"""verl (0.9) with this project's engine as its rollout, and its patched model as the actor.

verl takes other code in by importing modules that it is given the names of:

``plugin``   registers the rollout ``toolkit`` (``VERL_USE_EXTERNAL_MODULES=train_patches.verl.plugin``)
``rollout``  the server, its replica and the adapter that brings weights
``actor``    patches the actor (``actor_rollout_ref.model.external_lib=train_patches.verl.actor``)
``check``    log-probabilities of training and of rollout must be equal, or the run ends
"""
