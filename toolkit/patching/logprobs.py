"""Log-probabilities of sequences under a patched model: the training forward."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.head import loss_only
from toolkit.ops.linear_logprob import deferred
from toolkit.ops.take_rows import take_rows
from toolkit.patching.adapters import check_rows, inner_model, vocabulary_size
from toolkit.patching.forward import patched_model, ragged_forward
from toolkit.patching.multimodal import MediaSequence, expand, media_batch
from toolkit.patching.record import report_of
from toolkit.state.batch import RaggedBatch
from toolkit.state.rotary_regimes import RotaryRegimes


def choose_rotary_lengths(
    models: nn.Module | Sequence[nn.Module], lengths: Sequence[int], given: Sequence[int | None] | None = None
) -> list[int] | None:
    """``RaggedBatch.from_sequences``'s ``rotary_lengths`` for sequences of ``lengths`` tokens; None if not needed.

    Args:
        models: a patched model, or its wrapper; or several that run the same batch.
        given: the lengths by which the tables are made, as declared or of a ``Completion``; None for their own.

    Raises:
        ToolkitError: a given length below the sequence's own with other tables.
    """
    if given is not None:
        _check_one_each("rotary_lengths", given, len(lengths))
    models = [models] if isinstance(models, nn.Module) else models
    reports = [report_of(inner_model(patched_model(inner_model(model)))) for model in models]
    found = [report.rotary_regimes() for report in reports if report is not None]
    regimes = RotaryRegimes.merged(filter(None, found))
    return None if regimes is None else regimes.of_lengths([None] * len(lengths) if given is None else given, lengths)


def token_logprobs(
    model: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor],
    share: bool = True,
    last: Sequence[int] | None = None,
    routing: Sequence[Tensor] | None = None,
    rotary_lengths: Sequence[int | None] | None = None,
    images: Sequence[Mapping[str, Any] | None] | None = None,
    selection: Sequence[Tensor] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[Tensor]:
    """Log-probability (nats, full vocabulary) of every token of every sequence given the tokens before it.

    This is the training forward, and differentiable. All sequences are one batch.

    Args:
        model: a patched model, or its wrapper (data parallel, DeepSpeed's engine).
        sequences: token ids of each sequence.
        share: compute common prefixes once.
        last: return only the last ``last[i]`` tokens of sequence i; the head skips the others (a prompt's, say). What
            is before them is the prompt, for a model whose layers see a prompt and a window of what was written after.
        routing: experts [tokens, MoE layers, K] of the tokens of sequence i, in place of the routers' choice
            (``Completion.routed_experts``). The last token may be missing. Routers must be patched.
        rotary_lengths: of each sequence the length by which its rotary tables are made, where they depend on it
            (LongRoPE, dynamic NTK): ``Completion.rotary_length``. None is the sequence's own length.
        images: of each sequence the outputs of the model's processor for it, or for its beginning (a prompt): input_ids
            [1, n] with which it begins, pixel values and the rest; None for none. Each distinct image goes through the
            tower once, forward and backward, however many sequences have it.
        selection: positions [tokens, layers with an indexer, keys] that the tokens of sequence i attend, in place of
            the indexers' choice (``Completion.selected_keys``); negative ones are none. The last token may be missing.
        adapters: of each sequence the name of the LoRA or DoRA adapter in the model that acts on it, in the place of
            the active one; None for that. Many adapters are one batch, and an adapter's gradients are those that its
            sequences give alone.

    Returns:
        One tensor per sequence, [tokens - 1] or [last[i]].

    Raises:
        ToolkitError: a sequence that is no list of token ids, a token id outside the vocabulary, ``last[i]`` larger
            than the number of predictions, a rotary length below the sequence's own with other tables, ``last``,
            ``rotary_lengths`` or ``images`` without one entry per sequence, or images that the model does not take, or
            for which a ragged batch is not proven (``toolkit.patching.multimodal.expand``), and a routing or selection
            that does not fit the sequences or the model.
    """
    read = deferred.token_logprobs
    return sequence_readings(model, sequences, read, share, last, routing, rotary_lengths, images, selection, adapters)[
        0
    ]


def sequence_readings(
    model: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor],
    read: "ReadLogits",
    share: bool = True,
    last: Sequence[int] | None = None,
    routing: Sequence[Tensor] | None = None,
    rotary_lengths: Sequence[int | None] | None = None,
    images: Sequence[Mapping[str, Any] | None] | None = None,
    selection: Sequence[Tensor] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> tuple[list[Tensor], ...]:
    """What ``read`` returns for the logits before every token: a list with a tensor per sequence, of each output.

    ``token_logprobs``, which has the arguments and errors, reads log-probabilities. Of sequences without a token there
    is one output, of empty tensors.
    """
    device = next(model.parameters()).device
    vocabulary = vocabulary_size(patched_model(model))
    given: list[MediaSequence | None] = [None] * len(sequences)
    if images is not None:
        _check_one_each("images", images, len(sequences))
        given = [expand(model, outputs, one) if outputs else None for one, outputs in zip(sequences, images)]
    tokens = [
        _token_ids(index, sequence if media is None else media.tokens, vocabulary)
        for index, (sequence, media) in enumerate(zip(sequences, given))
    ]
    _check_counted(patched_model(inner_model(model)), tokens)
    lengths = [max(sequence.numel() - 1, 0) for sequence in tokens]
    if last is not None:
        _check_one_each("last", last, len(tokens))
        for index, (count, available) in enumerate(zip(last, lengths)):
            if not 0 <= count <= available:
                raise ToolkitError(
                    f"last[{index}] must be >= 0 and <= {available}, the sequence's length - 1, got {count}."
                )
        lengths = list(last)
    if not any(sequence.numel() for sequence in tokens):
        return ([torch.zeros(0, device=device) for _ in tokens],)
    # Where nothing is asked for, the empty results still have a graph: gradients of 0, as of any masked loss.
    # The last token of a sequence predicts nothing here, but stays in: it costs little.
    chosen = choose_rotary_lengths(model, [len(sequence) for sequence in tokens], rotary_lengths)
    prompts = None
    report = report_of(inner_model(patched_model(inner_model(model))))
    if last is not None and report is not None and report.keeps_prompts:
        prompts = [len(sequence) - count for sequence, count in zip(tokens, last)]
    chosen_adapters = _adapters(model, adapters, len(tokens))
    if any(given):
        if chosen_adapters is not None:
            raise ToolkitError("adapters must be None with images, got some.")
        parts = [media or one for one, media in zip(tokens, given)]
        batch = media_batch(model, parts, share, routing, chosen, selection, prompts)
    else:
        batch = RaggedBatch.from_sequences(
            tokens,
            device,
            share,
            routing,
            chosen,
            selection=selection,
            prompt_lengths=prompts,
            adapters=chosen_adapters,
        )
    return tuple(list(values.split(lengths)) for values in predictions(model, batch, tokens, lengths, read))


def target_logprobs(
    model: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor],
    targets: Sequence[Sequence[int] | Tensor],
    adapters: Sequence[str | None] | None = None,
    share: bool = True,
    after_rows: Callable[[Tensor], None] | None = None,
) -> list[Tensor]:
    """Log-probability (nats, full vocabulary) of a target after every token of every sequence.

    Where ``targets[i]`` is ``sequences[i]`` shifted by one token, these are the values of ``token_logprobs``, bitwise.
    Differentiable. All sequences are one batch.

    Args:
        model: a patched model, or its wrapper.
        sequences: token ids of each sequence, at least one token in each.
        targets: of each token the one whose log-probability is asked for, after it.
        adapters: as for ``token_logprobs``.
        share: compute common prefixes once.
        after_rows: is called with the log-probabilities of every 128 rows of a head that does not learn, which are then
            computed apart, so that other work may come between them. Values and gradients are bitwise identical.

    Returns:
        One tensor per sequence, [tokens].

    Raises:
        ToolkitError: as ``token_logprobs``, and for targets that are not one per token.
    """
    vocabulary = vocabulary_size(patched_model(model))
    tokens = [_token_ids(index, one, vocabulary) for index, one in enumerate(sequences)]
    wanted = [_token_ids(index, one, vocabulary) for index, one in enumerate(targets)]
    _check_one_each("targets", wanted, len(tokens))
    for index, (one, target) in enumerate(zip(tokens, wanted)):
        if len(one) != len(target) or not len(one):
            raise ToolkitError(f"targets[{index}] must have one per token ({len(one)}, >= 1), got {len(target)}.")
    _check_counted(patched_model(inner_model(model)), tokens)
    lengths = [len(one) for one in tokens]
    device = next(model.parameters()).device
    batch = RaggedBatch.from_sequences(
        tokens,
        device,
        share,
        rotary_lengths=choose_rotary_lengths(model, lengths),
        adapters=_adapters(model, adapters, len(tokens)),
    )
    rows, cut = torch.arange(sum(lengths)), torch.cat(wanted)
    if after_rows is None:
        found = _read_at(model, batch, rows, cut, deferred.token_logprobs)[0]
    else:
        with loss_only():
            found = _read_at(model, batch, rows, cut, partial(_by_rows, after_rows))[0]
    return list(found.split(lengths))


_ROWS_AT_ONCE = 128


def _by_rows(seen: Callable[[Tensor], None], logits: Tensor, targets: Tensor) -> tuple[Tensor]:
    found: list[Tensor] = []
    parts = deferred.split_rows(logits, _ROWS_AT_ONCE)
    for part, wanted in zip(parts, targets.split([part.shape[0] for part in parts]), strict=True):
        found.append(deferred.token_logprobs(part, wanted)[0])
        seen(found[-1])
    return (torch.cat(found),)


def _adapters(model: nn.Module, given: Sequence[str | None] | None, count: int) -> list[str | None] | None:
    """The adapter of each sequence; None where what is active acts on all."""
    if given is None:
        return None
    _check_one_each("adapters", given, count)
    if not any(given):
        return None
    inner = inner_model(patched_model(inner_model(model)))
    report = report_of(inner)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
    if torch.is_grad_enabled() and inner.training and checkpointing and not (report and "layer" in report.roles()):
        raise ToolkitError(
            "adapters must be None under gradient checkpointing where role 'layer' is not patched: the backward would "
            "run layers again without their batch."
        )
    return check_rows(inner, given)


def _token_ids(index: int, given: Any, vocabulary: int) -> Tensor:
    """One sequence as int64 on the CPU. A conversion would cut fractions off without a word."""
    try:
        tokens = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # text, None, ids of more than 64 bits
        tokens = torch.zeros(())
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    ids = tokens.to("cpu", torch.int64)
    if ids.dim() != 1 or (ids.numel() and not (whole and 0 <= int(ids.min()) <= int(ids.max()) < vocabulary)):
        raise ToolkitError(f"sequence {index} must be a list of token ids from 0 to {vocabulary - 1}.")
    return ids


def _check_counted(model: nn.Module, sequences: Sequence[Tensor]) -> None:
    report = report_of(inner_model(model))
    token = None if report is None else report.ragged.uncounted_token
    for index, sequence in enumerate(sequences):
        if token is not None and bool((sequence == token).any()):
            raise ToolkitError(
                f"sequence {index} must not contain token {token}, got one: {type(model).__name__} takes it for "
                "padding and gives it no position, which a ragged batch would."
            )


def _check_one_each(name: str, given: Sequence[Any], count: int) -> None:
    if len(given) != count:
        raise ToolkitError(f"{name} must have one entry per sequence ({count}), got {len(given)}.")


# Of logits [..., V] and targets [...]: tensors [...], the first of which is the log-probability of the target.
ReadLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def predictions(
    model: nn.Module,
    batch: RaggedBatch,
    sequences: Sequence[Tensor],
    counts: Sequence[int],
    read: ReadLogits = deferred.token_logprobs,
) -> tuple[Tensor, ...]:
    """What ``read`` returns for the logits of the last ``counts[i]`` tokens of each sequence: [sum(counts)].

    A prediction that several samples share (the same row, the same next token) is computed once. A row with several
    next tokens is one row of the head per next token.

    Args:
        batch: ``RaggedBatch.from_sequences(sequences)``.
    """
    ends = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0).tolist()
    # A token is predicted by the row before it.
    predicting = torch.cat([torch.arange(end - 1 - count, end - 1) for end, count in zip(ends, counts)])
    targets = torch.cat([sequence[len(sequence) - count :] for sequence, count in zip(sequences, counts)])
    return _read_at(model, batch, predicting, targets, read)


def _read_at(
    model: nn.Module, batch: RaggedBatch, predicting: Tensor, targets: Tensor, read: ReadLogits
) -> tuple[Tensor, ...]:
    """What ``read`` returns for ``targets`` [N] under the logits of the tokens ``predicting`` [N] of all sequences."""
    device = batch.tokens.device
    rows = predicting if batch.sample_rows is None else batch.sample_rows.cpu()[predicting]
    if batch.sample_rows is None:
        return read(ragged_forward(model, batch, rows.to(device)), targets.to(device))
    pairs, sample_of = torch.stack([rows, targets], 1).unique(dim=0, return_inverse=True)
    distinct, row_of = pairs[:, 0].unique_consecutive(return_inverse=True)
    logits = ragged_forward(model, batch, distinct.to(device))
    if len(distinct) < len(pairs):
        logits = deferred.take_logits(logits, row_of.to(device))
    index = sample_of.to(device)
    return tuple(take_rows(values, index) for values in read(logits, pairs[:, 1].to(device)))
