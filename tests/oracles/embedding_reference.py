"""A quantized embedding in compressed-tensors and in transformers; runs in the compressed-tensors environment, which has no quantkit.

    embedding_reference.py ARTIFACT IDS OUT        IDS is JSON, a list of token ids

OUT.safetensors: ``decompressed [V, hidden]``, the embedding's parts through the library's compressor of the format that its config group
states, with scales widened to float32. Where transformers loads the artifact, unasked and in float32, also the ``logits [T, V]`` and the
embedding and head that it has then: ``loaded`` and ``head``. OUT.json: the modules that the library's matching gives the embedding's
scheme, the formats, what transformers complained of, or why it refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-not-found]
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config  # type: ignore[import-not-found]
from ct_reference import read
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


@torch.no_grad()
def main(artifact: str, ids: str, out: str) -> None:
    torch.set_num_threads(1)
    tokens = torch.tensor([json.loads(Path(ids).read_text())])
    config = AutoConfig.from_pretrained(artifact)
    stated = config.quantization_config
    del config.quantization_config
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    apply_quantization_config(bare, QuantizationConfig.model_validate(dict(stated)), show_progress=False)
    schemes = {name: module.quantization_scheme for name, module in bare.named_modules() if hasattr(module, "quantization_scheme")}
    name = next(name for name, module in bare.named_modules() if module is bare.get_input_embeddings())
    parts = read(Path(artifact))[name]
    parts["weight_scale"] = parts["weight_scale"].float()
    compressor = BaseCompressor.get_value_from_registry(schemes[name].format)
    made = {"decompressed": compressor.decompress(parts, schemes[name])["weight"].contiguous()}
    same = sorted(other for other, scheme in schemes.items() if scheme.weights == schemes[name].weights)
    facts = {"name": name, "format": str(schemes[name].format), "same_scheme": same, "quantized": len(schemes)}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, output_loading_info=True)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        facts["complaints"] = {kind: sorted(map(str, info[kind])) for kind in kinds}
        made["logits"] = model.eval()(tokens).logits[0].contiguous()  # which decompresses the model
        made["loaded"] = model.get_input_embeddings().weight.clone()
        made["head"] = model.get_output_embeddings().weight.clone()
    except (AttributeError, RuntimeError) as exc:
        facts["refused"] = str(exc)
    save_file(made, f"{out}.safetensors")
    Path(f"{out}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
