"""Training: data, tokenizer, model, objective, loop, checkpoints, metrics and held-out evaluation."""
