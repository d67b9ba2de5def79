"""Conversations of several turns: the engine samples the model's, an environment answers, tokens are only ever added.

A turn's prompt is all tokens before it, as they were sampled or given: nothing is tokenised twice. Its pages are in the
prefix cache, so a turn computes what is new alone. All turns of a conversation declare the same length to the engine,
and so have the same rotary tables.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from toolkit.chat import render
from toolkit.chat.template import ChatTemplateError
from toolkit.chat.tokens import encode
from toolkit.engine import SamplingParams
from toolkit.engine.outputs import Completion
from toolkit.errors import ToolkitError, first_line
from toolkit.training.background_loop import LOOP
from toolkit.training.corpus import digest
from toolkit.training.environments.base import Environment, Messages, State, within
from toolkit.training.progress import count_shown

if TYPE_CHECKING:
    from toolkit.training.prompts import Prompts
    from toolkit.training.rollout import Rollout

_PROBE = "Kq4zTurn"
"""Stands for the model's turn where the template is asked what follows one."""


_LOOK_FOR_SIGNALS = 0.2
"""Seconds between looks at whether a signal came, while nothing but the environment is waited for."""


@dataclass(slots=True)
class Conversation(Completion):
    """All that follows a prompt, over several turns.

    Beside ``Completion``: ``token_ids`` has the environment's tokens too, ``logprobs`` those of sampled tokens alone,
    ``text`` is what was said, ``routed_experts`` and ``selected_keys`` are of all tokens but the last one.

    Args:
        sampled: for each of ``token_ids`` whether the model sampled it.
        messages: that follow the prompt; of a prompt that is a text, a text.
        state: of the environment.
        turns: of the model.
    """

    sampled: list[bool] = field(default_factory=list)
    messages: Messages = field(default_factory=list)
    state: State = field(default_factory=dict)
    turns: int = 0


class Conversations:
    """Holds the conversations of some problems.

    Args:
        rollout: whose engine generates.
        prompts: that the problems are of; its environment answers.
        max_turns: most turns of the model.
        seconds: after which no further turn of a step's conversations is asked for; None is no bound.
    """

    def __init__(self, rollout: "Rollout", prompts: "Prompts", max_turns: int, seconds: float | None = None) -> None:
        assert prompts.environment is not None
        self._seconds = seconds
        self._rollout, self._prompts, self._max_turns = rollout, prompts, max_turns
        self._environment: Environment = prompts.environment
        self._timeout = None if self._environment.bounds_itself else self._environment.timeout
        self._kept = self._environment.bind(prompts.tokenizer)
        self._after_turn = AfterTurn(prompts)
        self._ready: SimpleQueue[tuple[Conversation, Future[Any]]] = SimpleQueue()
        self._waiting = 0
        self._running: dict[tuple[int, int], Conversation] = {}

    def hold(
        self, problems: Sequence[Any], seeds: Sequence[int], n: int, temperature: float | None
    ) -> list[list[Conversation]]:
        """``n`` conversations of each problem, which depend on the weights, the environment and the seed alone.

        What the environment raises ends a conversation with ``finish_reason`` "error". A signal leaves the others
        unfinished.

        Raises:
            ToolkitError: a prompt that is too long, or a turn that failed in the engine.
        """
        self._temperature, self._begun = temperature, time.monotonic()
        groups = [[self._new(problem, at, index, seed) for index in range(n)]
                  for at, (problem, seed) in enumerate(zip(problems, seeds, strict=True))]  # fmt: skip
        for one in (one for group in groups for one in group):
            self._ask(one, self._environment.setup_state, one.state)
        while self._waiting:
            if (answered := self._next_response()) is None:
                return groups
            self._begin(*answered)
        for group, seed in zip(groups, seeds):
            self._first_turns([one for one in group if one.error is None], seed)
        engine, total, done = self._rollout.engine, len(problems) * n, 0
        progress = count_shown(total, "conversations held")
        try:
            while self._running or self._waiting:
                # Other conversations' turns are sampled while responses are awaited.
                while self._waiting and (not self._running or not self._ready.empty()):
                    if (answered := self._next_response()) is None:
                        break
                    self._continue(*answered)
                if self._rollout.stopping:
                    break
                for delta in engine.step():
                    if delta.finished is not None:
                        self._add_turn(self._running.pop((delta.request_id, delta.index)), delta.finished)
                        done = total - len(self._running) - self._waiting
                        progress.update(done)
                if 2 * done >= total:
                    self._rollout.note_blocks()
        finally:
            progress.close()
            for request, _ in self._running:
                engine.cancel(request)
        return groups

    def _new(self, problem: Any, at: int, index: int, seed: int) -> Conversation:
        prompt, columns = self._prompts.prompt(problem), self._prompts.columns(problem)
        state: State = {
            "answer": None, **columns, "columns": columns, "prompt": prompt, "problem": problem,
            "seed": digest(f"{seed}/{index}"), "turn": 0, "responses": [],
        }  # fmt: skip
        return Conversation(-1, at, index, [], [], [], [], "", "stop", state=state)

    def _ask(self, one: Conversation, method: Any, *given: Any) -> None:
        """Call a method of the environment on the loop's thread; ``_next_response`` has what it returns."""

        async def called() -> Any:
            return await within(None if method == self._response else self._timeout, method, *given)

        self._waiting += 1
        LOOP.submit(called()).add_done_callback(lambda future: self._ready.put((one, future)))

    def _next_response(self) -> tuple[Conversation, Any] | None:
        """The next conversation that has a response, and the response, None where the environment raised.

        None alone where a signal asks to stop before there is one.
        """
        while True:
            try:
                one, future = self._ready.get(timeout=_LOOK_FOR_SIGNALS)
                break
            except Empty:
                if self._rollout.stopping:
                    return None
        self._waiting -= 1
        error = future.exception()
        if error is None:
            return one, future.result()
        one.finish_reason, one.error = "error", f"{type(error).__name__}: {first_line(error)}"
        return one, None

    def _begin(self, one: Conversation, _: Any) -> None:
        if one.error is None:
            prompt = one.state["prompt"]
            one.prompt_token_ids = self._prompts.encode(prompt, one.state["problem"])
            one.messages = "" if isinstance(prompt, str) else []
            self._rollout.check_prompt(one.prompt_token_ids)

    def _first_turns(self, group: list[Conversation], seed: int) -> None:
        """One request where all have the same prompt, which is then computed once."""
        if group and all(one.prompt_token_ids == group[0].prompt_token_ids for one in group):
            request = self._rollout.engine.submit(group[0].prompt_token_ids, self._params(group[0], seed, len(group)))
            self._running.update({(request, index): one for index, one in enumerate(group)})
        else:
            for one in group:
                self._submit(one)

    def _submit(self, one: Conversation) -> None:
        seed = digest(f"{one.state['seed']}/{one.turns}")
        request = self._rollout.engine.submit([*one.prompt_token_ids, *one.token_ids], self._params(one, seed, 1))
        self._running[request, 0] = one

    def _params(self, one: Conversation, seed: int, n: int) -> SamplingParams:
        return self._rollout.params(
            seed, n, self._temperature, used=len(one.token_ids), kept_special_tokens=self._kept,
            include_stop_str_in_output=isinstance(one.messages, str),
        )  # fmt: skip

    def _add_turn(self, one: Conversation, turn: Completion) -> None:
        if turn.error is not None:
            raise ToolkitError(f"a rollout failed: {turn.error.rstrip('.')}.")
        one.request_id, one.rotary_length = turn.request_id, turn.rotary_length
        one.routed_experts, one.selected_keys = turn.routed_experts, turn.selected_keys
        one.token_ids += turn.token_ids
        one.logprobs += turn.logprobs
        one.sampling_logprobs += turn.sampling_logprobs
        one.weight_versions += turn.weight_versions
        one.sampled += [True] * len(turn.token_ids)
        one.text += turn.text
        one.turns += 1
        one.num_cached_tokens = (one.num_cached_tokens or 0) + (turn.num_cached_tokens or 0)
        one.state["turn"] = one.turns
        one.state["responses"].append(turn.text)
        if isinstance(one.messages, str):
            one.messages += turn.text
        else:
            one.messages.append(self._environment.parse(turn.text, one.state))
        one.finish_reason, one.stop_reason = turn.finish_reason, turn.stop_reason
        if turn.finish_reason != "stop" or one.turns >= self._max_turns:
            return
        if self._seconds is not None and time.monotonic() - self._begun > self._seconds:
            one.finish_reason = "timeout"
            return
        self._ask(one, self._response, one)

    async def _response(self, one: Conversation) -> Messages | None:
        """What follows a turn; None where the conversation is over."""
        said = one.state["prompt"] + one.messages
        if await within(self._timeout, self._environment.is_completed, said, one.state):
            return None
        response = await within(self._timeout, self._environment.env_response, said, one.state)
        if isinstance(response, tuple):
            response, changed = response
            one.state.update(changed)
        return _as_messages(response, isinstance(one.messages, str))

    def _continue(self, one: Conversation, response: Messages | None) -> None:
        """Add a response and ask for the next turn; one that leaves no room for a turn is left out."""
        if not response:
            return
        ids = self._after_turn.token_ids(response, one.messages, one.token_ids[-1], self._rollout.engine.eos)
        if len(one.token_ids) + len(ids) >= self._rollout.max_completion_length:
            one.finish_reason = "length"
            return
        one.token_ids += ids
        one.sampled += [False] * len(ids)
        one.messages += response  # type: ignore[operator]
        one.text += (
            response if isinstance(response, str) else "".join(f"\n[{m['role']}] {m['content']}\n" for m in response)
        )
        self._submit(one)


class AfterTurn:
    """The tokens that follow a turn of the model, behind its last one: what ends it, messages, what opens the next."""

    def __init__(self, prompts: "Prompts") -> None:
        self._tokenizer = prompts.tokenizer
        assert prompts.environment is not None
        self._tools = [tool.for_template() for tool in prompts.environment.tools] or None
        self._variables = prompts.chat_template_kwargs

    def token_ids(self, response: Messages, said: Messages, last_token: int, eos: frozenset[int]) -> list[int]:
        """The tokens.

        Args:
            response: a text, or messages.
            said: what came before it, behind the prompt.
            last_token: of the turn; where it is one of ``eos``, the end of the turn is not repeated.
            eos: tokens that end a turn.

        Raises:
            ToolkitError: the chat template does not show a turn as it is.
        """
        if isinstance(response, str):
            return encode(self._tokenizer, response)
        last = said[-1] if said else {}
        calls = {"tool_calls": last["tool_calls"]} if isinstance(last, dict) and last.get("tool_calls") else {}
        # Without the calls first: nothing then stands between the turn's text and what ends it.
        for own in [{}, calls] if calls else [{}]:
            try:
                whole = self._tail([*response], own, True)
                alone = self._tail([], own, False)
            except ChatTemplateError:
                continue
            if whole is None or alone is None:
                continue
            begin = 0
            if own:
                ends = [at for at, token in enumerate(alone) if token in eos]
                begin = ends[-1] if ends else len(alone)
            ids = whole[begin:]
            return ids[1:] if last_token in eos and ids and ids[0] in eos else ids
        raise ToolkitError(
            "objective.chat_template must show a message of the assistant as it is, before what an environment "
            "answers, got a template that does not."
        )

    def _tail(self, response: Sequence[Mapping[str, Any]], own: Mapping[str, Any], opened: bool) -> list[int] | None:
        """The tokens behind a turn's text; None where the template shows another text."""
        turn = {"role": "assistant", "content": _PROBE, **own}
        text = render(
            self._tokenizer, [{"role": "user", "content": "."}, turn, *response], self._tools,
            add_generation_prompt=opened, chat_template_kwargs=self._variables,
        )  # fmt: skip
        return encode(self._tokenizer, text.partition(_PROBE)[2]) if text.count(_PROBE) == 1 else None


def _as_messages(response: Any, of_text: bool) -> Messages | None:
    """An environment's response as the conversation has it. Raises TypeError for anything else."""
    if not response:
        return None
    if isinstance(response, str):
        return response if of_text else [{"role": "user", "content": response}]
    found = [response] if isinstance(response, Mapping) else list(response)
    if not all(isinstance(one, Mapping) and "role" in one and "content" in one for one in found):
        raise TypeError(f"an environment's response must be a text or messages, got {response!r}")
    return "".join(str(one["content"]) for one in found) if of_text else [dict(one) for one in found]
