"""A patch proves the same under any arithmetic that the user has set around it."""

import copy
from contextlib import contextmanager

import pytest
import torch

import toolkit
from toolkit.patching import find_claims, ragged_check
from toolkit.patching.float32_arithmetic import float32_arithmetic
from toolkit.testing.models import random_model


@contextmanager
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture(scope="module")
def roles(model):
    report = toolkit.patch(copy.deepcopy(model))
    assert report.ragged.reason is None
    return report.roles()


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        bfloat16_by_default,
        torch.inference_mode,
        torch.no_grad,
    ],
    ids=["autocast", "default dtype", "inference mode", "no gradients"],
)
def test_a_patch_is_the_same(model, roles, around):
    copied = copy.deepcopy(model)
    with around():
        before = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        report = toolkit.patch(copied)
        assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()) == before
    assert report.roles() == roles
    assert report.ragged.reason is None


def test_tf32_is_off_and_comes_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with float32_arithmetic(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_ragged_check_is_in_float32(model, monkeypatch):
    seen = []
    monkeypatch.setattr(ragged_check, "_checked", lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    report = find_claims(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ragged_check.check_ragged(model, report, None)
    assert seen == [False]
