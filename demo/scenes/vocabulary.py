"""Tokenizers of the captions, with one token per word, as CLIPTokenizer and T5TokenizerFast."""

from __future__ import annotations

import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from dit_accel.demo.scenes.scene import TEXT_LENGTH, words_of_language

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_UNKNOWN = "<unk>"


def build_t5_tokenizer() -> T5TokenizerFast:
    """Build a Unigram tokenizer whose pieces are whole words; ids 0, 1, 2 are pad, end and unknown, as in T5.

    T5 is case-sensitive: each word is in the vocabulary twice, and `share_capitals` copies its embedding.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), (T5_UNKNOWN, -20.0)]
    words = words_of_language()
    pieces += [("▁" + word, -1.0) for word in (*words, *(word.capitalize() for word in words))]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


def build_clip_tokenizer() -> CLIPTokenizer:
    """Build a byte-pair tokenizer whose merges join each word of the language to one token, from its end to its start.

    Each merge contains the end of the word, so merges of different words do not interfere. Words outside the language
    are split into letters and word endings, whose embeddings are zero (`neutral_ids`).
    """
    words = words_of_language()
    vocab = {CLIP_START: 0, CLIP_END: 1, "<|unknown|>": 2}
    for letter in sorted(set("".join(words))):
        vocab[letter] = len(vocab)
        vocab[letter + "</w>"] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in words:
        joined = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if (letter, joined) not in merges:
                merges.append((letter, joined))
            joined = letter + joined
            vocab.setdefault(joined, len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, unk_token="<|unknown|>")
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


def share_capitals(embedding: torch.Tensor) -> None:
    """Copy the T5 embeddings of the words to those of the capitalized words, in place."""
    count = len(words_of_language())
    embedding.data[3 + count : 3 + 2 * count] = embedding.data[3 : 3 + count]


def neutral_ids(tokenizer: CLIPTokenizer | T5TokenizerFast) -> list[int]:
    """Ids of the tokens that are neither words of the language nor start, end or padding; their embeddings are zero."""
    known = {CLIP_START, CLIP_END, "<pad>", "</s>"}
    for word in words_of_language():
        known |= {word + "</w>", "▁" + word, "▁" + word.capitalize()}
    return sorted(index for token, index in tokenizer.get_vocab().items() if token not in known)
