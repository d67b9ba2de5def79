"""Responses of ``/v1/chat/completions``."""

from collections.abc import Mapping, Sequence

from toolkit.engine import Completion, Delta
from toolkit.serving.errors import Json
from toolkit.serving.openai.responses import CompletionResponse, finite, top_of


class ChatResponse(CompletionResponse):
    """Responses of ``/v1/chat/completions``."""

    id_prefix, object_type, chunk_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def role_chunks(self, choices: int) -> list[Json]:
        return [_chat_delta(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def choice(self, index: int, completion: Completion) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self.logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **self.token_ids(completion, None),
        }

    def deltas(self, index: int, delta: Delta) -> list[Json]:
        chunks = []
        tokens_shown = self.top is not None or self.asked.return_token_ids
        if delta.text or (tokens_shown and delta.token_ids):
            chunk = _chat_delta(index, {"content": delta.text}, self.logprobs(delta))
            chunks.append({**chunk, **self.token_ids(delta, None)})
        if delta.finished:
            ending = {
                "finish_reason": delta.finished.finish_reason,
                "stop_reason": delta.finished.stop_reason,
            }
            chunks.append({**_chat_delta(index, {}), **ending})
        return chunks

    def beside(self, finished: Sequence[Completion]) -> Json:
        return {**self.prompt_logprobs(finished[0]), **self._prompt_token_ids(finished[0].prompt_token_ids)}

    def _prompt_token_ids(self, tokens: Sequence[int]) -> Json:
        return {"prompt_token_ids": list(tokens)} if self.asked.return_token_ids else {}

    def chunk(self, choices: list[Json], used: Json | None = None, show_usage: bool = False) -> Json:
        chunk = super().chunk(choices, used, show_usage)
        if self._begun:
            return chunk
        prompt = self.prompts[0]
        return {
            **chunk,
            **self._prompt_token_ids(prompt["input_ids"][0].tolist() if isinstance(prompt, Mapping) else prompt),
        }

    def logprobs(self, tokens: Completion | Delta) -> Json | None:
        if self.top is None:
            return None
        content = []
        for at, token in enumerate(tokens.token_ids):
            others = [self._entry(*pair) for pair in top_of(tokens.top_logprobs, at, self.top)]
            content.append({**self._entry(token, tokens.logprobs[at]), "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text, raw = self.texts.of_token(token)
        name = self.name(token) if self.asked.return_tokens_as_token_ids else text
        return {"token": name, "logprob": finite(logprob), "bytes": raw}


def _chat_delta(index: int, delta: Json, logprobs: Json | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
