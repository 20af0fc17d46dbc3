"""Blocks of ggml: what a GGUF file stores."""
