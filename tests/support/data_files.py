import json

LINES = [
    {"text": "hello world", "label": 1},
    {"text": "hi", "label": "mad", "ignored": [1]},
    {"text": "hello hello hello", "text_b": "world", "label": 0},
]


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
