"""What an engine counts."""

from toolkit.engine.media import EncoderCache
from toolkit.engine.scheduler import Scheduler
from toolkit.engine.speculation.speculation import Speculation


def engine_stats(
    scheduler: Scheduler, encoder_cache: EncoderCache, speculation: Speculation | None, **totals: float
) -> dict[str, float]:
    """Gauges and totals under vLLM's names.

    Returns:
        num_requests_running, num_requests_waiting: sequences.
        kv_cache_usage_perc: share of the blocks in use, 0 to 1.
        num_blocks, num_used_blocks, num_free_blocks, num_cached_blocks: over all groups of layers.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up in the prefix cache, and found there.
        num_preemptions, num_swaps: sequences preempted, and those of them that were swapped out.
        encoder_cache_hits, num_encoded: pictures that were found encoded, and that were encoded.
        kv_restored_tokens: prompt tokens whose offloaded state came back (they are prefix_cache_hits, too).
        kv_host_blocks, kv_host_bytes, kv_host_hits, kv_host_evictions: blocks in host memory and their bytes, blocks
            that were read back, and those that made room; with kv_host_space or kv_disk_space.
        kv_disk_blocks, kv_disk_bytes, kv_disk_hits, kv_disk_evictions, kv_disk_failures: likewise on disk, and blocks
            that could not be written or were damaged.
        spec_decode_num_drafts, spec_decode_num_draft_tokens, spec_decode_num_accepted_tokens: with speculation.
        totals: as given.
    """
    allocators = scheduler.block_manager.allocators
    total, free = sum(one.num_blocks for one in allocators), sum(one.num_free_blocks for one in allocators)
    return {
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": len(scheduler.waiting),
        "kv_cache_usage_perc": (total - free) / total if total else 0.0,
        "num_blocks": total,
        "num_used_blocks": total - free,
        "num_free_blocks": free,
        "num_cached_blocks": sum(one.num_cached_blocks for one in allocators),
        "prefix_cache_queries": scheduler.prefix_cache_queries,
        "prefix_cache_hits": scheduler.prefix_cache_hits,
        "encoder_cache_hits": encoder_cache.hits,
        "num_encoded": encoder_cache.num_encoded,
        "num_preemptions": scheduler.num_preemptions,
        "num_swaps": scheduler.swap.count if scheduler.swap is not None else 0,
        **(scheduler.offloading.stats() if scheduler.offloading is not None else {}),
        **totals,
        **(speculation.stats() if speculation is not None else {}),
    }
