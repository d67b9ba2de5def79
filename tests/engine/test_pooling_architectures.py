"""Every class of transformers that classifies text, and its part without a head: right, or refused in one sentence."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.models.auto import modeling_auto

from toolkit.engine.pooling import PoolingEngine, PoolingInput, PoolingParams
from toolkit.errors import ToolkitError
from toolkit.patching.attention_configs import eager_modules
from toolkit.testing.architectures import small_config
from toolkit.testing.models import from_config

OPENERS = {
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
# Small models of these need more than sizes, or a package that is not there.
UNBUILT = {"esm", "esmc", "funnel", "layoutlmv2"}
# No ragged batch: encoders with decoders, attention with biases, hashes or sparse patterns, inputs beside tokens.
REFUSED = {
    "bart", "big_bird", "bigbird_pegasus", "bros", "canine", "convbert", "deberta", "deberta-v2", "doge", "flaubert",
    "fnet", "ibert", "layoutlm", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mbart", "megatron-bert",
    "minimax", "mobilebert", "mpnet", "mra", "mt5", "mvp", "nystromformer", "perceiver", "plbart", "reformer",
    "rembert", "roformer", "squeezebert", "t5", "t5gemma", "t5gemma2", "tapas", "umt5", "xlm", "xlnet", "yoso",
}  # fmt: skip
TYPES = sorted({name for mapping in OPENERS.values() for name in mapping} - UNBUILT)


def small(model_type, opener):
    """As encoders, those that may be either."""
    encoder = getattr(AutoConfig.for_model(model_type), "is_decoder", None) is False
    model = from_config(small_config(model_type, **({"is_decoder": False} if encoder else {})), opener=opener)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def outputs(model, texts):
    """Hidden states or logits of each text alone."""
    found = [model(input_ids=torch.tensor([ids])) for ids in texts]
    return [(one.logits if hasattr(one, "logits") else one.last_hidden_state)[0] for one in found]


def distance(found, expected):
    """Relative, of all texts together: the logits of one may cancel, and leave roundings alone."""
    got, other = (torch.cat([one.flatten().double() for one in each]) for each in (found, expected))
    return float((got - other).norm() / other.norm())


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", TYPES)
def test_results_are_those_of_transformers_or_the_model_is_refused(model_type):
    source = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 190, (count,), generator=source).tolist() for count in (40, 1, 7, 23, 60, 2)]
    inputs, raw = [PoolingInput(ids) for ids in texts], PoolingParams(use_activation=False)
    for opener in (AutoModel, *(one for one, mapping in OPENERS.items() if model_type in mapping)):
        plain = small(model_type, opener)
        config = {"pooling_type": "ALL", "normalize": False}
        try:
            engine = PoolingEngine(copy.deepcopy(plain), pooler_config=config)
        except ToolkitError:
            assert model_type in REFUSED
            continue
        assert model_type not in REFUSED
        found = [one.data for one in engine.pool(inputs, raw)]
        alone = outputs(plain, texts)
        assert [one.shape for one in found] == [one.shape for one in alone]
        if distance(found, alone) > 1e-5:  # as close to float64 as transformers itself is
            with eager_modules(plain):  # torch's grouped GEMM has no float64
                exact = outputs(plain.double(), texts)
            assert distance(found, exact) <= max(1e-5, 2 * distance(alone, exact))
        for ids, one in zip(texts, found, strict=True):
            assert torch.equal(engine.pool([PoolingInput(ids)], raw)[0].data, one)
