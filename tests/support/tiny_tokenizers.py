"""Small fast tokenizers of transformers, made in memory: whole words with BERT's special tokens, and a byte-level BPE."""

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = ["turn", "put", "the", "lamp", "heater", "off", "on", "in", "hall", "bed"]
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
NUM_TOKENS = len(_SPECIAL) + len(WORDS)


def word_tokenizer(**settings: Any) -> Any:
    """Ids 0 to 4 are the special tokens in the order of BERT's, then the words."""
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL.values(), *WORDS])}
    engine = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **(_SPECIAL | settings))


def byte_tokenizer(pre_tokenizer: Any = None, **settings: Any) -> Any:
    """A byte-level BPE that knows the words with a space before them; ``<end>`` is its last token, and its end of text."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
    engine.train_from_iterator([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **settings)
    made.add_special_tokens({"eos_token": "<end>"})
    return made
