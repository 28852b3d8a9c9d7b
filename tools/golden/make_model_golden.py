#!/usr/bin/env python3
"""Makes test/golden/models: small random models of every family and what transformers and torch compute with them.

Values come from transformers' models in double precision (norms too, see exact_norms), so that a comparison in f32 sees
the rounding of one side only; the script checks that the same models in plain f32 agree with them, and prints by how
much. Formats and names: tools/golden/README.md.
"""
import argparse
import json
import math
import shutil
import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

from divergences import OBJECTIVES, loss_terms, margins

REAL_VOCABULARY = 97
MASK = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
SAFE_MARGIN = 1e-4  # distance of a running sum from alpha, of the k-th largest logit from the next
PROJECTIONS = 4  # sign vectors a parameter's gradient is multiplied with

# --- models: name → (configuration, how it is stored). Sizes are odd on purpose: no power of two hides an error.
MODELS = {
    "qwen2_tied": {
        "config": dict(model_type="qwen2", vocab_size=104, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                       num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
                       max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}),
        "dtype": "float32", "style": 5, "head_std": 0.35,
    },
    "qwen2_untied": {
        "config": dict(model_type="qwen2", vocab_size=97, hidden_size=40, intermediate_size=44, num_hidden_layers=2,
                       num_attention_heads=5, num_key_value_heads=1, tie_word_embeddings=False, rms_norm_eps=1e-6,
                       max_position_embeddings=64,
                       rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        "dtype": "float32", "style": 4, "head_std": 0.4, "shard_bytes": 20000,
    },
    "qwen3": {
        "config": dict(model_type="qwen3", vocab_size=131, hidden_size=28, intermediate_size=36, num_hidden_layers=2,
                       num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
                       rms_norm_eps=1e-6, max_position_embeddings=64,
                       rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        "dtype": "float32", "style": 5, "head_std": 0.3,
    },
    "llama_scaled": {
        "config": dict(model_type="llama", vocab_size=112, hidden_size=36, intermediate_size=40, num_hidden_layers=4,
                       num_attention_heads=3, num_key_value_heads=1, head_dim=12, tie_word_embeddings=False,
                       rms_norm_eps=1e-5, max_position_embeddings=512,
                       rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                                        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 64}),
        "dtype": "bfloat16", "style": 4, "head_std": 0.3,
    },
    "llama_tied": {
        "config": dict(model_type="llama", vocab_size=99, hidden_size=24, intermediate_size=56, num_hidden_layers=2,
                       num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True, rms_norm_eps=1e-5,
                       max_position_embeddings=128,
                       rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0,
                                        "low_freq_factor": 1.0, "high_freq_factor": 3.0,
                                        "original_max_position_embeddings": 96}),
        "dtype": "float32", "style": 5, "head_std": 0.35,
    },
    "mistral": {
        "config": dict(model_type="mistral", vocab_size=128, hidden_size=30, intermediate_size=44, num_hidden_layers=3,
                       num_attention_heads=5, num_key_value_heads=1, head_dim=6, tie_word_embeddings=False,
                       rms_norm_eps=1e-5, max_position_embeddings=64, sliding_window=5,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        "dtype": "float16", "style": 5, "head_std": 0.3,
    },
}

# Every model is a student once and a teacher once; families and paddings of the vocabulary differ within a case.
CASES = [("qwen2_tied", "qwen2_untied"), ("qwen2_untied", "qwen3"), ("qwen3", "llama_scaled"),
         ("llama_scaled", "mistral"), ("mistral", "llama_tied"), ("llama_tied", "qwen2_tied")]

# Token counts and prompt lengths of the samples. A prompt of 0 supervises every token; the last sample of the first
# micro-batch is all prompt and has no supervised position.
SAMPLES = [(17, 6), (2, 1), (37, 0), (9, 8), (5, 5), (11, 3), (31, 12), (3, 2), (7, 1), (13, 9), (24, 5), (4, 2)]
MICRO_BATCHES = [[0, 1, 2, 3, 4], [5, 6, 7]]

TRAINING = dict(steps=30, per_device=2, accumulation=2, warmup=5, schedule="cosine", weight_decay=0.1, beta1=0.9,
                beta2=0.95, epsilon=1e-8)
# Per case: (objective, distill_weight, temperature, teacher_temperature, topk, topk_mode, learning_rate, max_grad_norm)
TRAINING_RUNS = [("forward_kl", 0.5, 1.0, 1.0, 0, "renormalize", 3e-3, 2.0),
                 ("reverse_kl", 0.7, 2.0, 1.0, 0, "renormalize", 2e-3, 1.75),
                 ("js_divergence", 0.5, 1.0, 1.5, 0, "renormalize", 3e-3, 1.3),
                 ("skewed_forward_kl", 0.3, 1.0, 1.0, 20, "tail", 1e-3, 3.7),
                 ("skewed_reverse_kl", 1.0, 1.0, 1.0, 10, "renormalize", 1e-3, 0.6),
                 ("forward_kl", 0.0, 1.0, 1.0, 0, "renormalize", 3e-3, 2.4)]


def splitmix(x):
    x = (x + GOLDEN_GAMMA) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


SIGNS = {}


def signs(r, n):
    """Sign vector r, its first n elements: minus where the top bit of splitmix(splitmix(r) + i·gamma) is set."""
    have = SIGNS.setdefault(r, [])
    key = splitmix(r)
    for i in range(len(have), n):
        have.append(-1.0 if splitmix((key + i * GOLDEN_GAMMA) & MASK) >> 63 else 1.0)
    return torch.tensor(have[:n], dtype=torch.float64)


def fingerprint(tensors):
    """[parameters, 1 + PROJECTIONS]: 2-norm and projections of each tensor on the sign vectors."""
    rows = []
    for x in tensors:
        flat = x.detach().double().flatten()
        rows.append([flat.norm().item()] + [(flat @ signs(r, flat.numel())).item() for r in range(PROJECTIONS)])
    return torch.tensor(rows, dtype=torch.float64)


# --- making the folders


def randomise(model, head_std, generator):
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                p.copy_(head_std * noise)
            else:
                p.copy_(0.2 * noise)


def as_transformers_4(folder):
    """Rewrites config.json to the keys that transformers 4 wrote."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_folder(name, folder, generator):
    m = MODELS[name]
    fields = dict(m["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), bos_token_id=0, eos_token_id=1, **fields)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, m["head_std"], generator)
    model.to(getattr(torch, m["dtype"])).save_pretrained(folder, max_shard_size=m.get("shard_bytes", 10**9))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if m["style"] == 4:
        as_transformers_4(folder)


# --- computing with them


def exact_norms(model):
    """Transformers' RMS norms work in f32 whatever the model is; these work in the model's own precision."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)


def load(folder, dtype, through_bf16=False):
    """The model of a folder in dtype, its weights rounded to bf16 on the way where asked."""
    double = dtype == torch.float64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if double else dtype,
                                                 attn_implementation="sdpa" if double else "eager")
    if through_bf16:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.to(torch.bfloat16))
    if double:
        model.to(torch.float64)
        exact_norms(model)
    return model.eval()


def logits(model, sample):
    """[tokens, REAL_VOCABULARY] of one sequence on its own: packing is the other side's business."""
    return model(input_ids=torch.tensor([sample["tokens"]]), use_cache=False).logits[0, :, :REAL_VOCABULARY]


def supervised(sample):
    n, prompt = len(sample["tokens"]), sample["prompt_length"]
    positions = torch.arange(max(prompt - 1, 0), n - 1)
    return positions, torch.tensor(sample["tokens"])[positions + 1]


def global_loss(student, teacher_logits, samples, indices, spec):
    """(loss, unweighted means, smallest margins) over the supervised positions of these samples."""
    sums, count, smallest = {}, 0, {}
    for i in indices:
        positions, labels = supervised(samples[i])
        if len(positions) == 0:
            continue
        count += len(positions)
        s, t = logits(student, samples[i])[positions], teacher_logits[i][positions]
        for name, values in loss_terms(s.double(), t.double(), labels, spec).items():
            sums[name] = sums.get(name, 0) + values.sum()
        for name, value in margins(s.detach().double(), t.double(), spec).items():
            smallest[name] = min(value, smallest.get(name, math.inf))
    means = {name: value / count for name, value in sums.items()}
    w = spec["distill_weight"]
    return (1 - w) * means["cross_entropy"] + w * means["divergence"], means, smallest


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


def relative_gap(a, b):
    """Largest ‖a − b‖ / ‖b‖ over tensors."""
    return max(((x.double() - y.double()).norm() / y.double().norm()).item() for x, y in zip(a, b))


def variants(case):
    """Six objectives × (whole vocabulary, top-k renormalised, top-k with tail), parameters spread over them."""
    result = []
    for o, objective in enumerate(OBJECTIVES):
        for m, (mode, in_topk) in enumerate([("renormalize", False), ("renormalize", True), ("tail", True)]):
            i = case * 18 + o * 3 + m
            temperature, teacher_temperature = [(1, 1), (2, 1), (1.5, 0.75), (0.75, 1.25), (1, 2)][i % 5]
            result.append(dict(objective=objective, distill_weight=[0.5, 1.0, 0.25, 0.875][(i // 3) % 4],
                               temperature=temperature, teacher_temperature=teacher_temperature,
                               topk=[5, 12, 2, 40, 96, 200, 3][i % 7] if in_topk else 0, topk_mode=mode,
                               adaptive_alpha=[0.5, 0.375, 0.625][i % 3], skew_lambda=[0.125, 0.25, 0.5][i % 3]))
    return result


def with_safe_choices(spec, measure):
    """The first alpha and k from the given ones on at which no discontinuous choice is near to flipping."""
    candidates = [dict(spec, adaptive_alpha=spec["adaptive_alpha"] + a / 64, topk=spec["topk"] + k)
                  for k in (range(10) if spec["topk"] else [0])
                  for a in (range(20) if spec["objective"] == "adaptive_kl" else [0])]
    return next(c for c in candidates if all(margin > SAFE_MARGIN for margin in measure(c).values()))


class Case:
    """A student and its teacher in one precision."""

    def __init__(self, out, student, teacher, samples, dtype, through_bf16=False):
        self.samples = samples
        self.student = load(out / student, dtype, through_bf16)
        teacher_model = load(out / teacher, dtype, through_bf16)
        with torch.no_grad():
            self.teacher_logits = [logits(teacher_model, s) for s in samples]
        self.names = [name for name, _ in self.student.named_parameters()]

    def loss(self, spec, indices=sum(MICRO_BATCHES, [])):
        return global_loss(self.student, self.teacher_logits, self.samples, indices, spec)

    def evaluate(self, spec):
        loss, means, _ = self.loss(spec)
        values = {name: value.item() for name, value in means.items()}
        return dict(loss=loss.item(), **values), gradients(self.student, loss)


def measured_variant(spec, exact, plain, rounded, coarse):
    """The variant with what it gives, fingerprints of its gradients (exact, weights rounded to bf16, all in bf16), the
    exact gradients and the largest noise of the f32 ones."""
    with torch.no_grad():
        spec = with_safe_choices(spec, lambda candidate: exact.loss(candidate)[2])
    values, grads = exact.evaluate(spec)
    values32, grads32 = plain.evaluate(spec)
    noise = relative_gap(grads32, grads)
    loss_noise = abs(values32["loss"] - values["loss"]) / abs(values["loss"])
    assert noise < 1e-5 and loss_noise < 2e-6, (spec, noise, loss_noise)
    rounded_values, rounded_grads = rounded.evaluate(spec)
    _, coarse_grads = coarse.evaluate(spec)
    row = dict(spec, **values, bf16_cross_entropy=rounded_values["cross_entropy"],
               bf16_divergence=rounded_values["divergence"])
    return row, [fingerprint(g) for g in (grads, rounded_grads, coarse_grads)], grads, noise


def bf16_noise(specs, rounded_prints, coarse_prints):
    """Per parameter: how far gradients are from exact when transformers computes in bf16, as a part of the norm (root
    mean square over the numbers of a fingerprint and the variants on the whole vocabulary)."""
    whole = [i for i, spec in enumerate(specs) if spec["topk"] == 0]
    exact, coarse = torch.stack(rounded_prints)[whole], torch.stack(coarse_prints)[whole]
    return ((coarse - exact) / exact[..., :1]).square().mean((0, 2)).sqrt()


def train(case, run):
    """TRAINING["steps"] AdamW updates; loss, learning rate, gradient norm of each and the way the parameters moved."""
    objective, weight, tau, teacher_tau, topk, mode, lr, max_norm = run
    spec = dict(objective=objective, distill_weight=weight, temperature=tau, teacher_temperature=teacher_tau,
                topk=topk, topk_mode=mode, adaptive_alpha=0.5, skew_lambda=0.25)
    with torch.no_grad():
        spec = with_safe_choices(spec, lambda candidate: case.loss(candidate, range(len(case.samples)))[2])
    t, model = TRAINING, case.student
    before = [p.detach().clone() for p in model.parameters()]
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=t["weight_decay"]),
                                   dict(params=plain, weight_decay=0.0)], lr=lr, betas=(t["beta1"], t["beta2"]),
                                  eps=t["epsilon"])
    scheduler = get_scheduler(t["schedule"], optimizer, num_warmup_steps=t["warmup"], num_training_steps=t["steps"])
    batch = t["per_device"] * t["accumulation"]
    curve = dict(loss=[], cross_entropy=[], divergence=[], lr=[], grad_norm=[])
    for step in range(t["steps"]):
        first = step * batch % len(case.samples)
        optimizer.zero_grad()
        loss, means, _ = case.loss(spec, range(first, first + batch))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        curve["loss"].append(loss.item())
        curve["cross_entropy"].append(means["cross_entropy"].item())
        curve["divergence"].append(means["divergence"].item())
        curve["lr"].append(scheduler.get_last_lr()[0])
        curve["grad_norm"].append(norm.item())
        optimizer.step()
        scheduler.step()
    moved = [after.detach() - start for after, start in zip(model.parameters(), before)]
    return dict(spec, **TRAINING, learning_rate=lr, max_grad_norm=max_norm), curve, moved


def trained(exact, plain, run):
    spec, curve, moved = train(exact, run)
    _, curve32, moved32 = train(plain, run)
    noise = {key: max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(curve32[key], curve[key])) for key in curve}
    clipped = sum(n > spec["max_grad_norm"] for n in curve["grad_norm"])
    assert 3 <= clipped <= spec["steps"] - 3, (run, clipped, curve["grad_norm"])
    assert noise["loss"] < 2e-5, (run, noise)
    print(f"  training: loss {curve['loss'][0]:.4f} -> {curve['loss'][-1]:.4f}, clipped {clipped} of {spec['steps']}, "
          f"f32 noise: loss {noise['loss']:.1e}, norm {noise['grad_norm']:.1e}, way {relative_gap(moved32, moved):.1e}")
    return dict(spec, **curve), moved


def make_case(out, index, samples):
    student, teacher = CASES[index]
    print(f"{student} <- {teacher}")
    exact = Case(out, student, teacher, samples, torch.float64)
    plain = Case(out, student, teacher, samples, torch.float32)
    rounded = Case(out, student, teacher, samples, torch.float64, through_bf16=True)
    coarse = Case(out, student, teacher, samples, torch.bfloat16)
    rows, prints, tensors, worst = [], [], {}, 0
    for v, spec in enumerate(variants(index)):
        row, fingerprints, grads, noise = measured_variant(spec, exact, plain, rounded, coarse)
        worst = max(worst, noise)
        rows.append(row)
        prints.append(fingerprints)
        if v == 3 * index:  # another objective in full for each case, on the whole vocabulary
            tensors.update({f"gradient/{n}": g.float().contiguous() for n, g in zip(exact.names, grads)})
    exact_prints, rounded_prints, coarse_prints = zip(*prints)
    noise16 = bf16_noise(rows, rounded_prints, coarse_prints)
    print(f"  {len(rows)} variants, largest noise of a gradient: f32 {worst:.1e}, bf16 {noise16.max():.1e}")
    training, moved = trained(exact, plain, TRAINING_RUNS[index])
    tensors.update(fingerprints=torch.stack(exact_prints).float(), bf16_noise=noise16.float(),
                   bf16_fingerprints=torch.stack(rounded_prints).float(),
                   training_fingerprint=fingerprint(moved).float())
    save_file(tensors, out / f"{student}.golden.safetensors")
    return dict(student=student, teacher=teacher, parameters=exact.names, full_gradient_variant=3 * index,
                variants=rows, training=training)


def make_logits(out, samples):
    """Logits of every model at all positions of the first micro-batch."""
    tensors = {}
    with torch.no_grad():
        for name in MODELS:
            per_dtype = []
            for dtype in (torch.float64, torch.float32):
                model = load(out / name, dtype)
                per_dtype.append(torch.cat([logits(model, samples[i]) for i in MICRO_BATCHES[0]]))
            noise = relative_gap(per_dtype[1:], per_dtype[:1])
            assert noise < 2e-6, (name, noise)
            print(f"{name}: logits of standard deviation {per_dtype[0].std():.2f}, f32 noise {noise:.1e}")
            tensors[name] = per_dtype[0].float()
    save_file(tensors, out / "logits.safetensors")


def lines(value, indent=0):
    """JSON with a list of objects as one line each and short lists on one line: readable in a diff."""
    pad = "  " * (indent + 1)
    if isinstance(value, dict) and indent < 1 or isinstance(value, dict) and "variants" in value:
        body = ",\n".join(f"{pad}{json.dumps(k)}: {lines(v, indent + 1)}" for k, v in value.items())
        return "{\n" + body + "\n" + "  " * indent + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        body = ",\n".join(pad + lines(v, indent + 1) for v in value)
        return "[\n" + body + "\n" + "  " * indent + "]"
    return json.dumps(value)


def main():
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "test/golden/models")
    out = parser.parse_args().out
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if out.exists():
        shutil.rmtree(out)
    generator = torch.Generator().manual_seed(20240607)
    for name in MODELS:
        make_folder(name, out / name, generator)
    samples = [dict(tokens=torch.randint(REAL_VOCABULARY, (n,), generator=generator).tolist(), prompt_length=prompt)
               for n, prompt in SAMPLES]
    make_logits(out, samples)
    cases = [make_case(out, i, samples) for i in range(len(CASES))]
    document = dict(made_by=f"transformers {transformers.__version__}, torch {torch.__version__}",
                    real_vocabulary=REAL_VOCABULARY, samples=samples, micro_batches=MICRO_BATCHES, cases=cases)
    (out / "cases.json").write_text(lines(document) + "\n")


if __name__ == "__main__":
    main()
