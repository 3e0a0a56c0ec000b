"""Writes a BERT of 12 layers, 768 wide, with random weights and no tokenizer: its data are arrays of ids. Prints one JSON object.

Usage: make_bert.py OUT
"""

import json
import sys
import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    """Make it, and print its number of parameters."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=77))
    model.save_pretrained(sys.argv[1])
    print(json.dumps({"parameters": model.num_parameters()}))


if __name__ == "__main__":
    main()
