"""An engine's figures in the text format of Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

from quantkit.runtime.engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(stats: EngineStats) -> str:
    """Every figure with its type and meaning; counters are since the start."""
    figures = (
        ("requests_running", "gauge", "Requests that are being computed.", stats.running),
        ("requests_waiting", "gauge", "Requests that wait for a seat or for memory.", stats.waiting),
        ("kv_cache_tokens_used", "gauge", "Tokens of the blocks that running requests hold.", stats.kv_tokens_used),
        ("kv_cache_tokens_kept", "gauge", "Tokens of free blocks that another request may begin with.", stats.kv_tokens_kept),
        ("kv_cache_tokens", "gauge", "Tokens of all blocks.", stats.kv_tokens_total),
        ("prompt_tokens_total", "counter", "Prompt tokens of requests that were begun.", stats.prompt_tokens),
        ("generated_tokens_total", "counter", "Tokens that were sampled.", stats.generated_tokens),
        ("steps_total", "counter", "Passes of the model.", stats.steps),
        ("prefix_cache_queries_total", "counter", "Prompt tokens that were looked up among the blocks.", stats.prefix_tokens_looked_up),
        ("prefix_cache_hits_total", "counter", "Prompt tokens found there, which were not computed.", stats.prefix_tokens_found),
        ("preemptions_total", "counter", "Running requests that gave their memory back for a while.", stats.preemptions),
    )
    lines = []
    for name, kind, meaning, value in figures:
        lines += [f"# HELP quantkit_{name} {meaning}", f"# TYPE quantkit_{name} {kind}", f"quantkit_{name} {value}"]
    return "\n".join(lines) + "\n"
