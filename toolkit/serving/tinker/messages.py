"""Tinker's protobuf messages, by the modules of the installed client."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.engine import Completion
from toolkit.errors import ToolkitError
from toolkit.live import Example, ForwardBackwardResult
from toolkit.sentences import shown

PROTOBUF = "application/x-protobuf"
MAX_INFLATED = 64 * 2**20
"""Most bytes of a compressed body when it is not."""
NO_TOKEN, NO_LOGPROB = 0, -99999.0
"""What stands in cells of top-k tables that have nothing."""


def messages() -> Any:
    """The module ``tinker_public_pb2``. Raises ToolkitError where the client is not installed."""
    try:
        from tinker.proto import tinker_public_pb2
    except ImportError as error:
        raise ToolkitError(f"--train needs the package '{error.name}'; install train-infer-toolkit[live].") from None
    return tinker_public_pb2


def inflated(raw: bytes, encoding: str) -> bytes:
    """A body as it was before its ``content-encoding``. Raises ToolkitError for one that is not zstd."""
    if encoding in ("", "identity"):
        return raw
    if encoding != "zstd":
        raise ToolkitError(f"content-encoding must be zstd or left out, got {shown(encoding)}.")
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
            body = reader.read(MAX_INFLATED + 1)
    except zstandard.ZstdError as error:
        raise ToolkitError(f"The request body must be zstd ({error}).") from None
    if len(body) > MAX_INFLATED:
        raise ToolkitError(f"The request body must have <= {MAX_INFLATED} bytes without its compression, got more.")
    return bytes(body)


class ForwardBackward:
    """A body of ``forward_backward``.

    Args:
        raw: the message.

    Raises:
        ToolkitError: it is no such message, or has what is not served.
    """

    def __init__(self, raw: bytes) -> None:
        message = messages().ForwardBackwardRequest()
        try:
            message.ParseFromString(raw)
        except Exception as error:  # DecodeError, of a module that this one does not import
            raise ToolkitError(f"The request body must be a ForwardBackwardRequest ({error}).") from None
        self.model_id, self.seq_id = str(message.model_id), int(message.seq_id)
        self.loss_fn, self.forward_only = str(message.loss_fn), bool(message.forward_only)
        self.config: Mapping[str, float | str] = dict(message.loss_fn_config)
        if message.loss_fn_config_v2:
            given = message.loss_fn_config_v2.items()
            self.config = {key: getattr(one, one.WhichOneof("value") or "text") for key, one in given}
        self._data = message.data

    def examples(self) -> list[Example]:
        """Its data."""
        return [_example(f"data[{index}]", datum) for index, datum in enumerate(self._data)]


def _example(where: str, datum: Any) -> Example:
    tokens = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise ToolkitError(f"{where}.model_input must be encoded_text, got {kind}.")
        tokens.append(np.frombuffer(chunk.encoded_text.tokens, np.int32))
    ids = torch.from_numpy(np.concatenate(tokens).astype(np.int64)) if tokens else torch.zeros(0, dtype=torch.int64)
    inputs = {name: _tensor(f"{where}.{name}", one) for name, one in datum.loss_fn_inputs.items()}
    if "target_tokens" not in inputs:
        raise ToolkitError(f"{where}.loss_fn_inputs must have target_tokens, got {', '.join(inputs) or 'none'}.")
    return Example(ids, inputs.pop("target_tokens").to(torch.int64), inputs)


def _tensor(where: str, message: Any) -> Tensor:
    pb = messages()
    kinds = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64, pb.DTYPE_INT32: np.int32}
    if message.dtype not in kinds or message.HasField("sparse_csr"):
        raise ToolkitError(f"{where} must be a dense tensor of float32, int64 or int32.")
    values = np.frombuffer(message.dense, kinds[message.dtype]).copy()
    shape = list(message.shape) or [len(values)]
    if int(np.prod(shape)) != len(values):
        raise ToolkitError(f"{where} must have as many numbers as its shape {shape} says, got {len(values)}.")
    return torch.from_numpy(values).view(*shape)


def forward_backward_output(result: ForwardBackwardResult) -> bytes:
    """The message of a result: log-probabilities of the examples, one after the other, and the sum of the losses."""
    pb = messages()
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    message.metrics["loss:sum"] = result.loss
    record = message.loss_fn_outputs.add()
    record.num_datums = len(result.logprobs)
    values = [one.numpy().astype(np.float32) for one in result.logprobs]
    field = record.fields["logprobs"]
    field.dtype, field.data = pb.DTYPE_FLOAT32, np.concatenate(values).tobytes()
    field.offsets = (4 * np.cumsum([0, *map(len, values)])).astype(np.int64).tobytes()
    return bytes(message.SerializeToString())


def sample_response(
    completions: Sequence[Completion], top: int, prompt_top: int | None, prompt_last: int | None
) -> bytes:
    """The message of a prompt's samples.

    Args:
        completions: in order.
        top: alternatives of each sampled token.
        prompt_top: of each token of the prompt; None for no log-probabilities of the prompt.
        prompt_last: how many of the last tokens of the prompt have them; None for all.
    """
    pb = messages()
    message = pb.SampleResponse(prompt_cache_hit_tokens=completions[0].num_cached_tokens or 0)
    for one in completions:
        stopped = one.finish_reason == "stop"
        sequence = message.sequences.add()
        sequence.stop_reason = pb.STOP_REASON_STOP if stopped else pb.STOP_REASON_LENGTH
        sequence.tokens = np.array(one.token_ids, np.int32).tobytes()
        sequence.logprobs = np.array(one.logprobs, np.float32).tobytes()
        if top:
            _fill(sequence.topk_sampled_logprobs, one.top_logprobs or [], top)
    values = completions[0].prompt_logprobs
    if prompt_top is not None and values is not None:
        tokens = completions[0].prompt_token_ids
        skipped = 0 if prompt_last is None else len(tokens) - prompt_last
        kept = [None if at < skipped else one for at, one in enumerate(values)]
        own = [np.nan if one is None else one[token] for token, one in zip(tokens, kept)]
        message.prompt_logprobs = np.array(own, np.float32).tobytes()
        if prompt_top:
            _fill(message.topk_prompt_logprobs, kept, prompt_top)
    return bytes(message.SerializeToString())


def _fill(message: Any, rows: Sequence[Mapping[int, float] | None], k: int) -> None:
    """A table of the k most probable tokens of each row."""
    ids = np.full((len(rows), k), NO_TOKEN, np.int32)
    logprobs = np.full((len(rows), k), NO_LOGPROB, np.float32)
    for at, row in enumerate(rows):
        best = sorted((row or {}).items(), key=lambda one: -one[1])[:k]
        for rank, (token, logprob) in enumerate(best):
            ids[at, rank], logprobs[at, rank] = token, logprob
    message.k, message.length = k, len(rows)
    message.token_ids, message.logprobs = ids.tobytes(), logprobs.tobytes()
