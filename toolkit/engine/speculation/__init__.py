"""Speculative decoding: tokens that may come next are drafted, and verified in one step as rows of one batch.

A row's bits do not depend on the batch, and a sample depends on (seed, position, logits) only. So the engine samples
behind every drafted token with that row's own randomness, and accepts while the sample equals the draft. Tokens and
log-probabilities are those of plain decoding, bit for bit, at any temperature; a draft only decides how many come out
of a step.
"""
