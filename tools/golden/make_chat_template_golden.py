#!/usr/bin/env python3
"""Renders conversations with the Jinja templates of published tokenizers, for test/io/chat_template_test.cpp.

make_chat_template_golden.py OUT.json NAME=TEMPLATE_FILE ... NAME@TEMPLATE_FILE ...
TEMPLATE_FILE is a .jinja text or a tokenizer_config.json. With @ only the fingerprint of the template is kept and not its
text: for templates that may not be passed on (Llama 3.1 and later).
Needs jinja2. The environment is the one of transformers' apply_chat_template (trimmed blocks, bos_token given), without
strftime_now, so that a template which asks for today's date falls back to its own.
"""
import json
import sys

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SYSTEM = {"role": "system", "content": "Answer briefly.\n"}
USER = {"role": "user", "content": "What does “tide” mean?\nAs a noun. "}
ANSWER = {"role": "assistant", "content": "\n the rise and fall of the sea\n"}
THOUGHT = {"role": "assistant", "content": "<think>\n\nthe moon pulls\n\n</think>\n\n the rise and fall"}
HALF = {"role": "assistant", "content": "no beginning\n</think>\nsaid</think>\n\nsaid again"}
TOOL = {"role": "user", "content": "<tool_response>42</tool_response>"}
CONVERSATIONS = [
    [USER], [SYSTEM, USER], [USER, ANSWER], [SYSTEM, USER, ANSWER], [USER, ANSWER, USER], [USER, ANSWER, USER, ANSWER],
    [USER, THOUGHT], [SYSTEM, USER, THOUGHT, USER, THOUGHT], [USER, HALF], [USER, ANSWER, SYSTEM, USER, ANSWER],
    [USER, THOUGHT, TOOL, ANSWER], [USER, ANSWER, ANSWER], [USER, THOUGHT, ANSWER], [{"role": "user", "content": ""}],
    [{"role": "user", "content": "\u3000 wide\u00a0"}, {"role": "assistant", "content": ""}],
]


def fingerprint(template):
    """As ChatTemplate::fingerprint in io/chat_template.cpp."""
    value = 0xcbf29ce484222325
    for byte in template.rstrip("\n ").replace("\\n", "\n").encode():
        value = (value ^ byte) * 0x100000001b3 % 2**64
    return value


def main():
    out, *templates = sys.argv[1:]
    cases = []
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    for pair in templates:
        is_kept = "@" not in pair
        name, path = pair.split("=" if is_kept else "@", 1)
        text = open(path, encoding="utf-8").read()
        if path.endswith(".json"):
            text = json.loads(text)["chat_template"]
        template = environment.from_string(text)
        rendered = [[template.render(messages=c, add_generation_prompt=g, bos_token="<|begin_of_text|>") for g in (False, True)]
                    for c in CONVERSATIONS]
        case = {"name": name, "template": text} if is_kept else {"name": name, "fingerprint": f"{fingerprint(text):016x}"}
        cases.append({**case, "rendered": rendered})
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"conversations": CONVERSATIONS, "cases": cases}, file, ensure_ascii=False, indent=1)


main()
