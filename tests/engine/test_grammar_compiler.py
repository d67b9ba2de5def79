"""Who waits for a grammar that is being compiled: those that want the same one, and nobody else."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine.grammar import StructuredOutputsParams
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.errors import ToolkitError

SECONDS = 60
SLOW, OTHER = StructuredOutputsParams(choice=["a", "b"]), StructuredOutputsParams(choice=["c"])


class Held(GrammarCompiler):
    """Compiles ``SLOW`` once ``go`` is set, and fails then if it is to."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(make_tokenizer("byte_level"), 352, frozenset([2]))
        self.begun, self.go, self.fails = threading.Event(), threading.Event(), fails
        self.started = 0

    def _start(self, params):
        self.started += 1
        if params == SLOW:
            self.begun.set()
            assert self.go.wait(SECONDS)
            if self.fails:
                raise ToolkitError("it does not compile.")
        return super()._start(params)


@pytest.mark.parametrize("fails", [False, True])
def test_a_slow_grammar_holds_back_its_own_requests_alone(fails: bool) -> None:
    compiler = Held(fails)
    with ThreadPoolExecutor(3) as threads:
        try:
            first = threads.submit(compiler.compile, SLOW)
            assert compiler.begun.wait(SECONDS)
            waiting = threads.submit(compiler.compile, SLOW)
            other = threads.submit(compiler.compile, OTHER).result(SECONDS)
            assert compiler.compile(OTHER) is other
            assert not first.done()
            assert not waiting.done()
        finally:
            compiler.go.set()
        if fails:
            assert [str(one.exception(SECONDS)) for one in (first, waiting)] == ["it does not compile."] * 2
        else:
            assert first.result(SECONDS) is waiting.result(SECONDS) is compiler.compile(SLOW)
    compiled = compiler.started
    compiler.fails = False
    compiler.compile(SLOW)
    assert compiler.started == compiled + fails  # what failed is tried again


def test_one_thread_of_many_compiles() -> None:
    compiler = Held()
    compiler.go.set()
    ready = threading.Barrier(8)

    def ask():
        ready.wait(SECONDS)
        return compiler.compile(SLOW)

    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(ask) for _ in range(8)]
    assert len({id(one.result()) for one in found}) == 1
    assert compiler.started == 1
