#!/usr/bin/env python3
"""Ten distillation steps of test/golden/smollm2/distill.yaml in transformers and torch, f32 on the CPU.

Prints what `distill` should print for the same file: loss, its parts, gradient norm and learning rate of every step.

    tools/smollm2_folder.py OUT
    tools/golden/smollm2_losses.py OUT/teacher OUT/student
"""
import argparse
import json
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler, logging

from divergences import loss_terms

ROOT = Path(__file__).resolve().parents[2]


def encode(tokenizer, record, longest):
    """(token ids, prompt length): what is trained are the tokens after the rendered prompt."""
    question = [{"role": "user", "content": record["question"]}]
    answer = [{"role": "assistant", "content": record["answer"]}]
    full = tokenizer.apply_chat_template(question + answer, tokenize=False).removesuffix("\n")
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids(full)[:longest], len(ids(prompt))


def batch_loss(student, teacher, batch, vocabulary, spec):
    """Means over the supervised positions of a global batch; every sequence goes through the models on its own."""
    sums, count = {}, 0
    for tokens, prompt in batch:
        inputs, first = torch.tensor([tokens]), prompt - 1
        with torch.no_grad():
            t = teacher(input_ids=inputs).logits[0, first:-1, :vocabulary]
        s = student(input_ids=inputs).logits[0, first:-1, :vocabulary]
        count += len(s)
        for name, values in loss_terms(s, t, inputs[0, prompt:], spec).items():
            sums[name] = sums.get(name, 0) + values.sum()
    return {name: value / count for name, value in sums.items()}


def optimizer_of(student, args):
    decay = [p for p in student.parameters() if p.dim() > 1]
    plain = [p for p in student.parameters() if p.dim() == 1]
    return torch.optim.AdamW([dict(params=decay, weight_decay=args["weight_decay"]),
                              dict(params=plain, weight_decay=0.0)], lr=args["learning_rate"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    config = yaml.safe_load((ROOT / "test/golden/smollm2/distill.yaml").read_text())
    args, data = config["student"]["training_args"], config["student"]["data_args"]
    w, steps = config["distill_loss_weight"], config["max_steps"]
    spec = dict(objective=config["kd_objective"], temperature=1.0, teacher_temperature=1.0, topk=0, skew_lambda=0.1)

    tokenizer = AutoTokenizer.from_pretrained(options.student)
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student, teacher = load(options.student), load(options.teacher)
    optimizer = optimizer_of(student, args)
    scheduler = get_scheduler(args["lr_scheduler_type"], optimizer, num_warmup_steps=args["warmup_steps"],
                              num_training_steps=steps)
    batch_size = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    with open(ROOT / data["file_name"], encoding="utf-8") as lines:
        samples = [encode(tokenizer, json.loads(next(lines)), config["sequence_length"])
                   for _ in range(steps * batch_size)]

    print("step      loss  cross-entropy  divergence  gradient norm  learning rate")
    for step in range(steps):
        optimizer.zero_grad()
        means = batch_loss(student, teacher, samples[step * batch_size:(step + 1) * batch_size], len(tokenizer), spec)
        loss = (1 - w) * means["cross_entropy"] + w * means["divergence"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config["max_grad_norm"])
        print(f"{step + 1:4} {loss.item():9.6f} {means['cross_entropy'].item():14.6f} {means['divergence'].item():11.6f} "
              f"{norm.item():14.6f} {scheduler.get_last_lr()[0]:14.3e}", flush=True)
        optimizer.step()
        scheduler.step()


if __name__ == "__main__":
    main()
