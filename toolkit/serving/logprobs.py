"""Log-probabilities as OpenAI's chats and Responses write them."""

from collections.abc import Sequence

from toolkit.engine import Completion, Delta
from toolkit.serving.errors import Json
from toolkit.serving.texts import Texts


def finite(logprob: float) -> float:
    """JSON has neither infinities nor NaN; the API writes the impossible as -9999."""
    return max(-9999.0, logprob)  # in this order NaN is -9999 too


def _entry(texts: Texts, token: int, logprob: float) -> Json:
    text, raw = texts.of_token(token)
    return {"token": text, "logprob": finite(logprob), "bytes": raw}


def token_logprobs(texts: Texts, tokens: Completion | Delta, top: int, sampling: bool = False) -> list[Json]:
    """An entry for each token: its text, log-probability, bytes, and ``top`` alternatives, the most probable first.

    With ``sampling`` also ``sampling_logprob``, under the distribution that the token was sampled from.
    """
    found = []
    tops: Sequence[dict[int, float]] | None = tokens.top_logprobs
    for at, token in enumerate(tokens.token_ids):
        most_probable = list(tops[at].items())[:top] if tops and top else []
        others = [_entry(texts, *pair) for pair in most_probable]
        sampled = {"sampling_logprob": finite(tokens.sampling_logprobs[at])} if sampling else {}
        found.append({**_entry(texts, token, tokens.logprobs[at]), **sampled, "top_logprobs": others})
    return found
