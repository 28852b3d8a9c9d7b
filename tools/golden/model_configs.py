#!/usr/bin/env python3
"""Writes test/golden/model_configs.json: what transformers makes of configuration files, old and new.

Made with transformers 5.23 and torch 2.15:  python3 tools/golden/model_configs.py
"""
import json
import pathlib

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
    "use_cache": True, "vocab_size": 128256}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000}


def new_form(config):
    """The same configuration as transformers 5 saves it."""
    return json.loads(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_json_string(use_diff=True))


def small(model_type, **fields):
    return {"model_type": model_type, "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, **fields}


LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
CASES = {
    **{f"{t} defaults": {"model_type": t} for t in ("qwen2", "qwen3", "llama", "mistral")},
    "qwen2.5 0.5B": QWEN25_05B, "qwen2.5 0.5B, new": new_form(QWEN25_05B),
    "qwen3 0.6B": QWEN3_06B, "qwen3 0.6B, new": new_form(QWEN3_06B),
    "llama 3.2 1B": LLAMA32_1B, "llama 3.2 1B, new": new_form(LLAMA32_1B),
    "mistral 7B v0.1": MISTRAL_7B, "mistral 7B v0.1, new": new_form(MISTRAL_7B),
    "mistral 7B v0.3": {**MISTRAL_7B, "sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768},
    "qwen2 with head_dim": small("qwen2", head_dim=10),
    "qwen2, every layer with a window": small("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen2, no layer reaches the window": small("qwen2", use_sliding_window=True, sliding_window=7),
    "qwen2, layer_types full": small("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=0,
                                     layer_types=["full_attention"] * 2),
    "qwen3, layer_types sliding": small("qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=2,
                                        layer_types=["sliding_attention"] * 2),
    "qwen3, window size without use": small("qwen3", sliding_window=9, max_window_layers=0),
    "llama, kv heads null": small("llama", num_key_value_heads=None, head_dim=None),
    "llama, tied": small("llama", tie_word_embeddings=True, rms_norm_eps=1e-5, initializer_range=0.04),
    "llama, a window means nothing": small("llama", sliding_window=5),
    "llama, theta in rope_parameters wins": small("llama", rope_theta=3.0,
                                                  rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    "llama, rope_scaling wins": small("llama", rope_theta=7e3, rope_scaling={"type": "default"},
                                      rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    "llama, empty rope_scaling": small("llama", rope_theta=7e3, rope_scaling={}),
    "llama, rope type by its old name": small("llama", rope_theta=7e3, max_position_embeddings=4096, rope_scaling={
        "type": "llama3", "original_max_position_embeddings": 512, **LLAMA3}),
    "llama, original positions by default": small("llama", max_position_embeddings=4096,
                                                  rope_scaling={"rope_type": "llama3", **LLAMA3}),
    "llama, original positions outside": small(
        "llama", max_position_embeddings=4096, original_max_position_embeddings=256,
        rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": 512, **LLAMA3}),
    "mistral, head_dim": small("mistral", head_dim=8, sliding_window=3),
}


def window(config):
    if config.model_type == "mistral":
        return config.sliding_window or 0
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    assert len(kinds) == 1
    return config.sliding_window if kinds == {"sliding_attention"} else 0


def expected(fields):
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    rope = config.rope_parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = {name: list(p.shape) for name, p in model.named_parameters()}
    shown = {name: shape for name, shape in parameters.items() if "layers." not in name or "layers.1." in name}
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = [rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor",
                                     "original_max_position_embeddings")]
    return {
        "vocabulary": config.vocab_size, "hidden": config.hidden_size, "feed_forward": config.intermediate_size,
        "layers": config.num_hidden_layers, "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads, "head_dim": model.model.layers[0].self_attn.head_dim,
        "norm_eps": config.rms_norm_eps, "tied_head": config.tie_word_embeddings, "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling, "sliding_window": window(config), "max_positions": config.max_position_embeddings,
        "initializer_range": config.initializer_range, "parameters": len(parameters), "some_parameters": shown}


def main():
    out = [{"name": name, "config": fields, "expected": expected(fields)} for name, fields in CASES.items()]
    path = pathlib.Path(__file__).resolve().parents[2] / "test/golden/model_configs.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in out) + "\n]\n")
    print(f"{path}: {len(out)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
