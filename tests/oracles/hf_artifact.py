"""Load an artifact as transformers' users do; runs in the gptqmodel environment, which has no quantkit.

    hf_artifact.py ARTIFACT TEXT TOKENS OUT

Writes OUT.json: what was loaded and how, the ids of TEXT, the prompt of a short chat. And OUT.safetensors: ``tokens``, the first
TOKENS ids of TEXT; the logits of the model ``as_stored``, in its own dtype, and in ``float32``, both with the CPU kernel that the
loader chose, which computes in bfloat16; ``dense``, the float32 logits when every packed linear multiplies by its own unpacked
weight; and that weight ``[K, N]``, in float16, under each linear's name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a zebra?"}]


def tokenizer_facts(tokenizer: Any, text: str) -> dict[str, Any]:
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) if tokenizer.chat_template else None
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "ids": tokenizer(text)["input_ids"],
        "chat": chat,
        "vocab_size": len(tokenizer),
        "eos_id": tokenizer.eos_token_id,
    }


def model_facts(model: Any, info: dict[str, Any]) -> dict[str, Any]:
    config, packed = model.config.quantization_config, packed_linears(model)
    return {
        "model_class": type(model).__name__,
        "dtype": str(model.dtype),
        "quantization_config": config if isinstance(config, dict) else config.to_dict(),
        "complaints": {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")},
        "kernels": sorted({type(module).__name__ for module in packed.values()}),
        "packed": sorted(packed),
        "plain": sorted(name for name, module in model.named_modules() if type(module) is torch.nn.Linear),
    }


def packed_linears(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}


def unpack(model: Any) -> dict[str, Tensor]:
    """Put a dense float32 linear in the place of each packed one that has not run yet; the weights ``[K, N]`` as float16.

    The loader holds scales in float16 and unpacks to float16. A float32 weight comes of the same codes with widened scales.
    """
    weights = {}
    for name, module in packed_linears(model).items():
        weights[name] = module.awq_weight_dequantize(device="cpu", dtype=torch.float16).contiguous()
        module.scales = module.scales.float()
        weight = module.awq_weight_dequantize(device="cpu", dtype=torch.float32)
        linear = torch.nn.Linear(weight.shape[0], weight.shape[1], bias=module.bias is not None)
        linear.weight.data = weight.T.contiguous()
        if module.bias is not None:
            linear.bias.data = module.bias.float()
        model.set_submodule(name, linear)
    return weights


@torch.no_grad()
def main(artifact: str, text: str, tokens: str, out: str) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    ids = torch.tensor([tokenizer(text)["input_ids"][: int(tokens)]])

    def load(**options: Any) -> tuple[Any, dict[str, Any]]:
        model, info = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True, **options)
        return model.eval(), info

    model, info = load()
    facts = {**model_facts(model, info), **tokenizer_facts(tokenizer, text)}
    results = {"tokens": ids[0], "as_stored": model(ids).logits[0].float()}
    results["float32"] = load(dtype=torch.float32)[0](ids).logits[0]
    model, _ = load(dtype=torch.float32)
    weights = unpack(model)
    results["dense"] = model(ids).logits[0]
    save_file({**weights, **results}, f"{out}.safetensors")
    Path(f"{out}.json").write_text(json.dumps(facts, indent=1, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
