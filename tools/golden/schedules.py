#!/usr/bin/env python3
"""Prints the learning-rate multipliers of transformers that test/core/schedule_test.cpp holds."""
import torch
from transformers import get_scheduler

parameters = [torch.nn.Parameter(torch.zeros(1))]
for name in ["constant", "constant_with_warmup", "linear", "cosine"]:
    for warmup, total in [(0, 6), (3, 8), (2, 2)]:
        if name == "constant" and warmup:
            continue
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        values = []
        for _ in range(total + 1):
            values.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        print(f"{{schedules::{name}, {warmup}, {total}, {{{', '.join(map(repr, values))}}}}},")
