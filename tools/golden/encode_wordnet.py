"""Golden values of encoding: records → token ids and prompt length by transformers, with the quick start's tokenizer.

    python tools/golden/encode_wordnet.py > test/golden/encode_wordnet.json

Made with transformers 5.23.
"""
import json
import pathlib
import sys

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXTRA = [
    {"question": "What is a cat?", "answer": "a feline", "system": "You are a dictionary.", "prompt": "Answer briefly."},
    {"question": "Two\nlines?", "answer": "yes\n", "prompt": "One\r\nmore"},
    {"question": "Ends with a line break\n", "answer": "\n\n"},
    {"question": "", "answer": "an answer to nothing"},
    {"question": "Nothing to say?", "answer": ""},
    {"question": "What closes a turn?", "answer": "<|im_end|> does, <|im_start|>user\nopens one"},
    {"question": "日本語 and emoji \U0001f469\u200d\U0001f4bb?", "answer": "Cafe\u0301 is written café: 1234567890 µ"},
    {"question": "  spaces\tand\ttabs   ", "answer": "   leading, don't WE'LL see"},
    {"question": "control \u0000\u0001\u007f", "answer": "\ufffd", "system": "  "},
]


def main():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "wordnet" / "student")
    records = [json.loads(line) for line in open(ROOT / "configs" / "wordnet" / "validation.jsonl", encoding="utf-8")][:20]
    cases = []
    for record in records + EXTRA:
        prompt = record.get("prompt", "")
        user = prompt + "\n" + record["question"] if prompt else record["question"]
        turns = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        turns.append({"role": "user", "content": user})
        prompt_text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": record["answer"]})
        full_text = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        cases.append({**record, "tokens": encode(full_text), "prompt_length": len(encode(prompt_text))})
    sys.stdout.write("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
