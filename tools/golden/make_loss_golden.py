#!/usr/bin/env python3
"""Writes test/golden/loss.json: the loss of a few positions by torch.nn.functional in float64, gradients by autograd."""
import json
import pathlib

import torch
import torch.nn.functional as F

from divergences import OBJECTIVES, adaptive_weights, margins, outcomes

torch.manual_seed(20)
POSITIONS, VOCABULARY = 3, 11
# Multiples of 1/64: every number format but bf16 holds them exactly.
round_off = lambda x: (x * 64).round() / 64
student = round_off(2 * torch.randn(POSITIONS, VOCABULARY, dtype=torch.float64))
teacher = round_off(0.5 * student + 1.5 * torch.randn(POSITIONS, VOCABULARY, dtype=torch.float64))
labels = torch.tensor([4, 0, 10])
WEIGHT = 0.75


def kl(log_a, log_b):
    """Σ a (log a − log b), as torch has it: target first in meaning, second in place."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def divergence(log_p, log_q, spec):
    mixed = lambda share_of_q: torch.log(share_of_q * log_q.exp() + (1 - share_of_q) * log_p.exp())
    lam = spec["skew_lambda"]
    if spec["objective"] == "forward_kl":
        return kl(log_q, log_p)
    if spec["objective"] == "reverse_kl":
        return kl(log_p, log_q)
    if spec["objective"] == "adaptive_kl":
        head, tail, _ = adaptive_weights(log_p, log_q, spec["adaptive_alpha"])
        return head * kl(log_q, log_p) + tail * kl(log_p, log_q)
    if spec["objective"] == "skewed_forward_kl":
        return kl(log_q, mixed(lam))
    if spec["objective"] == "skewed_reverse_kl":
        return kl(log_p, mixed(1 - lam))
    return (kl(log_q, mixed(0.5)) + kl(log_p, mixed(0.5))) / 2


cases = []
for objective in OBJECTIVES:
    for topk, mode in [(0, "renormalize"), (4, "renormalize"), (4, "tail")]:
        for temperature, teacher_temperature in [(1.0, 1.0), (2.0, 0.75)]:
            spec = {
                "objective": objective, "topk": topk, "topk_mode": mode, "temperature": temperature,
                "teacher_temperature": teacher_temperature, "adaptive_alpha": 0.375, "skew_lambda": 0.125,
            }
            assert all(distance > 1e-4 for distance in margins(student, teacher, spec).values()), spec
            s = student.clone().requires_grad_()
            log_p, log_q = outcomes(s / temperature, teacher / (temperature * teacher_temperature), spec)
            distance = divergence(log_p, log_q, spec)
            cross_entropy = F.cross_entropy(s, labels, reduction="none")
            ((1 - WEIGHT) * cross_entropy + WEIGHT * distance).sum().backward()
            entropy = lambda logits: torch.distributions.Categorical(logits=logits).entropy().tolist()
            cases.append(spec | {
                "cross_entropy": cross_entropy.tolist(),
                "divergence": distance.tolist(),
                "student_entropy": entropy(student / temperature),
                "teacher_entropy": entropy(teacher / (temperature * teacher_temperature)),
                "gradient": s.grad.tolist(),
            })

out = pathlib.Path(__file__).parents[2] / "test" / "golden" / "loss.json"
golden = {"torch": torch.__version__, "distill_weight": WEIGHT, "student": student.tolist(), "teacher": teacher.tolist(),
          "labels": labels.tolist()}
lines = ",\n".join(json.dumps(case) for case in cases)
out.write_text(json.dumps(golden)[:-1] + ', "cases": [\n' + lines + "\n]}\n")
