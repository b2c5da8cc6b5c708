"""A small language model of a few words, of random weights, for worlds whose language is a closed vocabulary."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<end>", "<unknown>")


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token a word, words being what white space divides; ``<end>`` ends an answer."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], unk_token=SPECIAL[1]
    )


def small_llama(
    vocabulary: int, width: int = 96, layers: int = 4, *, length: int = 256, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama of random weights: heads of 32, inner width twice the width, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 32),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
