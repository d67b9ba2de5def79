"""What the layers of a forward call on a ragged batch: one protocol for dense and paged forwards.

Shapes: T new tokens, C channels, Hq query heads, H heads, D key width, V value width, K experts or selected keys.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state.batch import RaggedBatch
from toolkit.state.pools import Pools
from toolkit.state.replay import RoutingReplay, SelectionReplay
from toolkit.state.rotary_regimes import RotaryRegimes
from toolkit.state.rounding import rounded


class AttentionSettings(NamedTuple):
    """The mathematics of one attention layer, in the order of ``toolkit.ops.attention``'s arguments.

    Args:
        scale: factor of the scores.
        window: tokens that a query sees, itself included; 0 for all.
        softcap: bound of the scores; 0 for none.
        sinks: [Hq] an extra logit per head, which takes part in the softmax's denominator alone (gpt-oss, 2025).
        modifier: a file of ``toolkit/ops/attention/modifiers``; "" for none.
        parameters: [Hq, n] numbers of the modifier.
        kv_dtype: "int8" where pages hold keys and values in eight bits; "" for the model's dtype.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    modifier: str = ""
    parameters: Tensor | None = None
    kv_dtype: str = ""

    @property
    def of_op(self) -> tuple[float, int, float, Tensor | None, str, Tensor | None]:
        """The arguments of ``toolkit.ops.attention`` alone."""
        return self[:-1]

    def kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., D] as pages hold them."""
        return (rounded(k), rounded(v)) if self.kv_dtype else (k, v)


class ForwardContext(ABC):
    """One forward over ``batch``: its layers call these methods with the rows of the new tokens.

    ``DenseContext`` keeps nothing and brings gradients to all inputs (training, ordinary calls); ``PagedContext`` reads
    and writes the blocks of a ``StatePool`` (the engine). A context lives for one forward, its backward included.

    Attributes:
        batch: the tokens, and where each one's past lies.
        replay: the experts that tokens are to take in the place of the routers' choice; None to let routers choose.
        rows: indices of the tokens whose logits alone the head computes; None for all.
        selections: the keys that sparse attention layers selected or were given, and those that they are to take in the
            place of their choice.
        chunked: whether recurrences take a chunk of tokens at a time, as in numerics mode fast on CUDA, and their rows
            in the model's dtype.
    """

    def __init__(self, batch: RaggedBatch) -> None:
        self.batch = batch
        self.chunked = False
        self.replay = None if batch.routing is None else RoutingReplay(batch.routing)
        self.rows: Tensor | None = None
        self._ahead: Tensor | None = None
        self.selections = SelectionReplay(batch.selection)

    def rotary_lengths(self, regimes: RotaryRegimes) -> Tensor:
        """[T] the length by which each row's rotary tables are made, for a module whose tables have ``regimes``.

        Raises:
            ToolkitError: the batch does not say so.
        """
        if self.batch.rotary_lengths is None:
            raise ToolkitError(
                "rotary_lengths of the batch must be given for a model whose rotary tables depend on the length of the "
                "sequence, got None."
            )
        return self.batch.rotary_lengths

    def seen_ahead(self, layer: int) -> Tensor | None:
        """[T, 2] spans for the op, None where ``layer`` sees no token ahead: of each row in a span its own position and
        the span's end. What comes before is up to the layer's window.
        """
        batch = self.batch
        if batch.spans is None or (batch.span_layers is not None and layer not in batch.span_layers):
            return None
        if self._ahead is None:
            past = torch.cat([batch.kv_lengths - batch.query_offsets[1:], batch.kv_lengths.new_zeros(1)])
            position = torch.arange(len(batch.spans), device=past.device) + past[batch.sequence_ids]
            first, end = batch.spans.unbind(1)
            self._ahead = torch.stack([torch.where(first < end, position, first), end], 1)
        return self._ahead

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """Causal attention [T, Hq, V] of the new tokens over their own sequences.

        Args:
            layer: index of the layer.
            q: [T, Hq, D].
            k: [T, H, D].
            v: [T, H, V].
            settings: scale, window and the rest.
        """

    def attend_bidirectional(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        """``attend`` of a layer whose tokens see those after them too, of the whole sequence or of a window.

        With a window W token i sees token j where |i - j| < W. Tokens that come later must be in the batch: a sequence
        that is still being written has none of them.
        """
        raise ToolkitError(
            f"tokens that see those after them are not served by {type(self).__name__}; run the sequence as a whole."
        )

    def attend_biased(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, bias: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``attend`` with a bias [T, Hq, R] of each query's scores by distance, see ``state.relative_bias``.

        Of ``settings`` scale and window are read. sinks: [T, Hq] an extra logit for each query; None for none.
        """
        raise ToolkitError(f"biases by distance are not served by {type(self).__name__}; run the whole sequence.")

    def attend_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, window: int
    ) -> Tensor:
        """``attend`` of a layer whose tokens see the whole prompt, and ``window`` of those behind it, itself included.

        Of ``settings`` the scale and the sinks are read.
        """
        raise ToolkitError(
            f"windows behind prompts are not served by {type(self).__name__}; run the sequence as a whole."
        )

    def attend_latent(self, layer: int, q: Tensor, latents: Tensor, value_width: int, *, scale: float) -> Tensor:
        """``attend`` of latents [T, 1, D], which are the keys and, by their first columns, the values."""
        return self.attend(layer, q, latents, latents[..., :value_width], AttentionSettings(scale))

    def check_nothing_ahead(self, layer: int) -> None:
        """Raise ToolkitError where ``layer``, which selects its keys, is to see tokens ahead."""
        if self.seen_ahead(layer) is not None:
            raise ToolkitError(f"spans of a batch must be None in a layer with sparse attention, got some in {layer}.")

    def select(self, layer: int, q: Tensor, k: Tensor, weights: Tensor, topk: int, *, scale: float) -> Tensor:
        """[T, K] positions of the keys that the new tokens are to attend: ``select_keys`` along their own sequences.

        Args:
            layer: index of the layer.
            q: [T, H, D] queries of the layer's indexer.
            k: [T, D] keys of the new tokens, one for all of its heads.
            weights: [T, H].
            topk: keys to select.
            scale: of the products.
        """
        raise ToolkitError(f"sparse attention is not served by {type(self).__name__}; run the sequence as a whole.")

    def select_pools(self, layer: int, q: Tensor, rows: Tensor, weights: Tensor, pools: Pools) -> Tensor:
        """[T, K] positions of the keys that the new tokens are to attend, selected pool by pool (``state.pools``).

        Args:
            layer: index of the layer.
            q: [T, H, D] queries of the layer's indexer.
            rows: [T, W] what the indexer keeps of the new tokens.
            weights: [T, H].
            pools: how it pools them.
        """
        raise ToolkitError(f"sparse attention is not served by {type(self).__name__}; run the sequence as a whole.")

    def attend_selected(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, settings: AttentionSettings
    ) -> Tensor:
        """Attention [T, Hq, V] of the new tokens over the keys at ``selected`` positions [T, K] of each one's sequence.

        Of ``settings`` the scale and the sinks are read; the other arguments as in ``attend``.
        """
        raise ToolkitError(f"sparse attention is not served by {type(self).__name__}; run the sequence as a whole.")

    def attend_selected_latent(
        self, layer: int, q: Tensor, latents: Tensor, value_width: int, selected: Tensor, settings: AttentionSettings
    ) -> Tensor:
        """``attend_selected`` of latents [T, 1, D], which are the keys and, by their first columns, the values."""
        return self.attend_selected(layer, q, latents, latents[..., :value_width], selected, settings)

    @abstractmethod
    def scan(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *, scale: float, delta: bool,
        rates: Tensor | None = None, part: int = 0,
    ) -> Tensor:  # fmt: skip
        """``linear_recurrence`` of the new tokens along their own sequences: [T, H, V].

        Args:
            part: which of the layer's scans it is, where a layer has several.
        """

    @abstractmethod
    def convolve(
        self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        part: int = 0,
    ) -> Tensor:  # fmt: skip
        """``causal_conv`` of the new tokens' channels [T, C] along their own sequences; weight [C, width].

        Args:
            part: which of the layer's convolutions it is, where a layer has several.
        """

    @abstractmethod
    def record_routing(self, layer: int, ids: Tensor) -> None:
        """Keep the experts ids [T, K] that the new tokens go to in a layer of experts, where the state does."""

    @property
    def keeps_hidden(self) -> bool:
        """Whether the last hidden states of the new tokens are kept."""
        return False

    def record_hidden(self, hidden: Tensor) -> None:  # noqa: B027
        """Keep the last hidden states [T, H] of the new tokens, where the state does (``keeps_hidden``)."""
