"""Texts to tokens, without an object for each token; messages that are cut and padded."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_download import load_vocabulary
from runner.data import messages
from runner.data.messages import cut_and_pad, tokenize

END = "<|endoftext|>"
SPECIAL = [END, f"a{END}b", "<|endoftext|", "|>", " ", "\n\n"]
texts = st.lists(st.one_of(st.text(min_size=1), st.sampled_from(SPECIAL)), min_size=1)


@settings(deadline=None)
@given(texts=texts, per_call=st.integers(1, 3))
@example(texts=["a ", " b", "\n", "\n c"], per_call=4)  # whitespace at an end is cut there, not where the next begins
@example(texts=[END], per_call=1)
def test_tokens_are_those_of_each_text_alone(texts, per_call):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # no half surrogate pairs, which are refused
    vocabulary = load_vocabulary()
    expected = [vocabulary.encode_ordinary(text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "TEXTS_PER_CALL", per_call)
        token_ids, lengths = tokenize(vocabulary, texts)
    assert lengths.tolist() == [len(tokens) for tokens in expected]
    assert token_ids.tolist() == sum(expected, [])


@given(st.lists(st.integers(1, 6), min_size=1), st.integers(1, 8), st.booleans())
def test_messages_are_cut_and_padded(lengths, limit, is_padded):
    lists = [[10 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    cut = [tokens[:limit] for tokens in lists]
    expected = [tokens + [-1] * (limit - len(tokens)) for tokens in cut] if is_padded else cut
    x, lengths = torch.tensor(sum(lists, [])), torch.tensor(lengths)
    new_lengths = torch.tensor([len(tokens) for tokens in expected])
    assert cut_and_pad(x, lengths, new_lengths, -1).tolist() == sum(expected, [])
