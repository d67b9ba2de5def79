"""A plain Hugging Face checkpoint, as ``save_pretrained`` writes it."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.exporting.base import ConsumerOutput, ExportJob, ExportTarget, Outputs
from toolkit.exporting.completeness import check_towers, checkpoint_folder, unread_tensors
from toolkit.exporting.manifest import installed_version
from toolkit.exporting.older_fields import write_older_fields
from toolkit.exporting.unread import copy_unread
from toolkit.loading import add_files, auto_class, pooling_class, pooling_files, processor_files, runner_of
from toolkit.loading.model import quiet_transformers
from toolkit.loading.source import CONFIG
from toolkit.quantised import dense_state, quantised_weights

SHARD = "5GB"
"""Size of a safetensors file; more weights are sharded, with an index."""


class HuggingFace(ExportTarget, name="hf"):
    """safetensors, config, generation config, tokenizer, processor, pooling; no patch's attention is in the config.

    Tensors have the names that the checkpoint has. Those that the model's class does not read (multi-token prediction
    layers), files of the processor and of pooling are copied from it. Every token at which the
    engine stops is in the generation config. Quantised weights are dense in it, of the values that they stand for.
    """

    takes_quantised = True

    def check(self, job: ExportJob) -> None:
        check_whole_model(job, self.target)

    def write(self, job: ExportJob, folder: Path) -> None:
        write_checkpoint(job, folder)
        source = checkpoint_folder(job.model)
        if source is not None:
            copy_unread(unread_tensors(job.model, source), source, folder)

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        return ConsumerOutput(
            f"transformers {installed_version('transformers')}", stock_outputs(folder, prompts, max_tokens)
        )


def check_whole_model(job: ExportJob, target: str) -> None:
    """Raise ToolkitError for adapters beside the weights, and for a model without the towers of its checkpoint."""
    names = list(getattr(job.model, "peft_config", {}))
    if names:
        raise ToolkitError(
            f"An export to {target!r} holds one set of weights, and model has the adapters {', '.join(names)} beside "
            "them; merge them first (model.merge_and_unload()), or export to 'peft'."
        )
    source = checkpoint_folder(job.model)
    if source is not None:
        check_towers(job.model, source)


def check_causal(job: ExportJob, target: str) -> None:
    """Raise ToolkitError for a model that predicts no next token."""
    if not type(job.model).__name__.endswith("ForCausalLM"):
        raise ToolkitError(f"An export to {target!r} holds causal language models, got a {type(job.model).__name__}.")


def write_checkpoint(job: ExportJob, folder: Path) -> None:
    """Fill ``folder`` with the model, its tokenizer and the files of its processor and its pooling."""
    model = job.model
    state = dense_state(model) if any(quantised_weights(model)) else None
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=SHARD, state_dict=state)
    write_older_fields(folder / CONFIG)
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    if generation is not None:
        ends = eos_token_ids(model, job.tokenizer)
        if ends:
            generation.eos_token_id = ends[0] if len(ends) == 1 else ends
        generation.save_pretrained(folder)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(folder)
    source = checkpoint_folder(model)
    add_files(processor_files(source) | pooling_files(source), folder)


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token at which the engine stops: of the generation config, of the config and the tokenizer's own."""
    sources = (getattr(model, "generation_config", None), model.config, model.config.get_text_config(), tokenizer)
    found: list[int] = []
    for source in sources:
        given = getattr(source, "eos_token_id", None)
        found += [given] if isinstance(given, int) else list(given or ())
    return list(dict.fromkeys(found))


def stock_outputs(path: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> Outputs:
    """What stock transformers generates from the checkpoint at ``path``: greedy, eager attention, prompt by prompt.

    Of a model that generates nothing, ``pooled_outputs``.
    """
    model = stock_model(path, attn_implementation="eager")
    return generate_greedily(model, prompts, max_tokens) if model.can_generate() else pooled_outputs(model, prompts)


def pooled_outputs(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The logits of each prompt, or its last token's; of a model without a head the last token's hidden state."""
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        values = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
        found.append(values.reshape(-1, values.shape[-1])[-1].tolist())
    return found


def stock_model(path: str | Path, **options: Any) -> Any:
    """The model in a folder as stock transformers opens it, for evaluation.

    Args:
        options: of ``from_pretrained``.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    opener = pooling_class(config) if runner_of(config, False) == "pooling" else auto_class(config)
    with quiet_transformers():
        return opener.from_pretrained(path, local_files_only=True, **options).eval()


def generate_greedily(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """``max_tokens`` greedy tokens of transformers' ``generate`` for each prompt, beyond end-of-text tokens too."""
    import torch

    outputs = []
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=0,
            )
            outputs.append(generated[0, len(prompt) :].tolist())
    finally:
        model.generation_config.eos_token_id = ends
    return outputs
