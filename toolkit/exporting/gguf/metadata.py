"""The sizes and settings of a model as keys of a GGUF file."""

from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError
from toolkit.exporting.gguf.families import Family
from toolkit.exporting.gguf.rotary import write_rotary

if TYPE_CHECKING:
    from gguf import GGUFWriter


def head_size_of(config: Any) -> int:
    """Columns of a query head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_metadata(writer: "GGUFWriter", config: Any, family: Family, feed_forward: int) -> None:
    """Add what llama.cpp needs to build the model.

    Args:
        feed_forward: hidden size of its MLPs, from the tensors.
    """
    head_size = head_size_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(float(getattr(config, "rms_norm_eps", None) or config.norm_eps))
    write_rotary(writer, config, head_size)
    if family.arch == "lfm2":
        attends = [kind == "full_attention" for kind in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads if one else 0 for one in attends])
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
    if family.arch == "qwen3next":
        writer.add_full_attention_interval(attention_interval(config))
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if family.arch in ("qwen3moe", "qwen3next"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        period = window_period(config)
        if period != 6:
            writer.add_sliding_window_pattern(period)


def window_period(config: Any) -> int:
    """n where every n-th layer sees everything and the others have a window; 6 where fewer layers all have one.

    Raises:
        ToolkitError: layers that alternate in another way.
    """
    return _period(config, "sliding_attention", 6)


def attention_interval(config: Any) -> int:
    """n where every n-th layer has attention and the others a recurrence.

    Raises:
        ToolkitError: layers that alternate in another way.
    """
    return _period(config, "linear_attention", len(config.layer_types) + 1)


def _period(config: Any, other: str, longest: int) -> int:
    """n where every n-th layer is full_attention and the rest ``other``; ``longest`` where none is."""
    kinds = list(config.layer_types)
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else longest
    if kinds != ["full_attention" if (layer + 1) % period == 0 else other for layer in range(len(kinds))]:
        raise ToolkitError(
            f"layer_types must repeat with one full_attention at the end of each period for llama.cpp, got {kinds}."
        )
    return period
