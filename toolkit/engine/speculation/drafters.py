"""The drafter that a configuration asks for."""

from toolkit.engine.backend import Backend
from toolkit.engine.config import EngineConfig
from toolkit.engine.speculation.config import SpeculativeConfig
from toolkit.engine.speculation.draft_model import DraftModel
from toolkit.engine.speculation.drafter import Drafter
from toolkit.engine.speculation.mtp import MtpDrafter
from toolkit.engine.speculation.ngram import NgramDrafter
from toolkit.engine.speculation.prediction import PredictionDrafter
from toolkit.engine.speculation.speculation import Speculation
from toolkit.engine.speculation.suffix import SuffixDrafter
from toolkit.engine.step.decode_graphs import CAPTURE_SIZES
from toolkit.errors import ToolkitError
from toolkit.state import StatePool


def new_speculation(
    config: EngineConfig, backend: Backend, pool: StatePool, running: int, max_model_len: int
) -> Speculation | None:
    """The speculation of an engine for ``running`` sequences over ``pool``; None where it is not configured."""
    chosen = config.speculation
    if chosen is None:
        return None
    if getattr(backend, "group", None) is not None:  # how much is drafted goes by the time that it takes
        raise ToolkitError("speculative_config must be None for a model that is split over ranks, got one.")
    drafter = _drafter(chosen, config, backend, pool, running, max_model_len)
    # Larger steps are not captured: next to those that are, a row more would cost far more than a row.
    return Speculation(chosen, drafter, backend.decode_size, min(config.max_num_batched_tokens, CAPTURE_SIZES[-1]))


def _drafter(
    chosen: SpeculativeConfig, config: EngineConfig, backend: Backend, pool: StatePool, running: int, max_model_len: int
) -> Drafter:
    if chosen.method == "prediction":
        return PredictionDrafter()
    if chosen.method == "ngram":
        return NgramDrafter(chosen.prompt_lookup_min, chosen.prompt_lookup_max)
    if chosen.method == "suffix":
        depth, tokens = chosen.suffix_decoding_max_tree_depth, chosen.suffix_decoding_max_cached_tokens
        return SuffixDrafter(chosen.prompt_lookup_min, depth, tokens)
    if chosen.method == "mtp":
        return MtpDrafter(config, backend, pool, running, max_model_len)
    return DraftModel(chosen.model, config, backend, running, max_model_len)
