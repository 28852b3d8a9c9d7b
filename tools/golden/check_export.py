#!/usr/bin/env python3
"""Loads exports in transformers: nothing missing, nothing unexpected, no warning, the same values and logits.

  python3 tools/golden/check_export.py build/release/test/io/export_test      every family, dtype and kind of head
  python3 tools/golden/check_export.py FOLDER                                 an export that is there already

Made with transformers 5.23 and torch 2.15.
"""
import io
import itertools
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

SIZES = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=4096)
FAMILIES = {
    "qwen2": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": dict(head_dim=8),
    "llama": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "mistral": dict(head_dim=8, sliding_window=5),
}


def load(folder):
    """The model, with everything that transformers or warnings had to say."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    transformers_logging.set_verbosity_warning()
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    logger.removeHandler(handler)
    complaints = [str(w.message) for w in caught] + said.getvalue().splitlines()
    complaints += [f"{kind}: {sorted(names)}" for kind, names in info.items() if names]
    assert not complaints, complaints
    return model.eval()


def check_folder(folder, dtype=None):
    model = load(folder)
    assert dtype is None or model.dtype == dtype, model.dtype
    if (pathlib.Path(folder) / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer("What does it mean?", return_tensors="pt").input_ids
        print(f"{folder}: {len(tokenizer)} tokens in the tokenizer, greedy continuation:",
              repr(tokenizer.decode(model.generate(tokens, max_new_tokens=12, do_sample=False)[0][tokens.shape[1]:])))
    print(f"{folder}: {AutoConfig.from_pretrained(folder).architectures}, {model.num_parameters()} parameters, "
          f"{model.dtype}: loads without complaint")
    return model


def check_family(binary, family, tied, dtype, scratch):
    torch.manual_seed(1)
    config = CONFIG_MAPPING[family](**SIZES, **FAMILIES[family], tie_word_embeddings=tied)
    source, target = (scratch / f"{family}-{tied}-{dtype}-{kind}" for kind in ("source", "export"))
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(source)
    original = load(source)
    name = str(dtype).removeprefix("torch.")
    subprocess.run([binary, "[by-hand]"], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "EXPORT_FROM": str(source), "EXPORT_TO": str(target), "EXPORT_DTYPE": name})
    shards = len(list(target.glob("*.safetensors")))
    assert shards > 1, "the test exports in small shards"
    exported = check_folder(target, dtype)
    before, after = original.state_dict(), exported.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    tokens = torch.arange(12)[None] % SIZES["vocab_size"]
    with torch.no_grad():
        assert torch.equal(original(tokens).logits, exported(tokens).logits)


def main():
    target = pathlib.Path(sys.argv[1])
    if target.is_dir():
        check_folder(str(target))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for case in itertools.product(FAMILIES, (False, True), (torch.float32, torch.bfloat16, torch.float16)):
            check_family(str(target), *case, pathlib.Path(scratch))
    print("all exports load without complaint and give the same logits")


if __name__ == "__main__":
    main()
