"""quantkit: quantize, prove, shard and serve language models."""

__version__ = "0.1.0"
