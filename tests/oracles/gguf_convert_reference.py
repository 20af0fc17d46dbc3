"""llama.cpp's own conversion of Hugging Face models, and what llama.cpp computes from files.

gguf_convert_reference.py convert LLAMA_CPP OUT MODEL...
    OUT/MODEL.gguf in float32, without a vocabulary, by the converter of the source tree LLAMA_CPP; OUT/failed.json has the models that it
    does not convert, with its words. Needs torch and transformers.
gguf_convert_reference.py logits IDS LENGTHS OUT FILE...
    OUT gets, as JSON, for each file the natural logarithms of the probabilities of the next token after the first LENGTHS (a JSON list)
    of IDS, or the reason why it was not loaded. Runs in the llama-cpp environment, whose xllamacpp is llama.cpp in this process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(llama_cpp: Path, out: Path, models: list[Path]) -> None:
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import ModelBase, get_model_class

    failed = {}
    for model in models:
        kind = get_model_class(ModelBase.load_hparams(model, False)["architectures"][0])
        kind.set_vocab = lambda self: None  # tokenizers are another test's
        try:
            kind(model, gguf.LlamaFileType.ALL_F32, out / f"{model.name}.gguf").write()
        except Exception as exc:  # noqa: BLE001
            failed[model.name] = f"{type(exc).__name__}: {exc}"
    (out / "failed.json").write_text(json.dumps(failed))


def logits(ids: Path, lengths: Path, out: Path, files: list[str]) -> None:
    import xllamacpp

    tokens, found = json.loads(ids.read_text()), {}
    for file in files:
        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = len(tokens), 1, 0, 0
        params.warmup = params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            server = xllamacpp.Server(params)
        except Exception as exc:  # noqa: BLE001
            found[file] = str(exc)
            continue
        steps = []
        for length in json.loads(lengths.read_text()):
            request = {"prompt": tokens[:length], "n_predict": 1, "temperature": 0.0, "cache_prompt": False, "logprobs": 1 << 20}
            (token,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
            steps.append([one["logprob"] for one in sorted(token["top_logprobs"], key=lambda one: one["id"])])
        found[file] = steps
        del server
    out.write_text(json.dumps(found))


def main() -> None:
    mode, *arguments = sys.argv[1:]
    if mode == "convert":
        convert(Path(arguments[0]), Path(arguments[1]), [Path(one) for one in arguments[2:]])
    else:
        logits(*map(Path, arguments[:3]), arguments[3:])


if __name__ == "__main__":
    main()
