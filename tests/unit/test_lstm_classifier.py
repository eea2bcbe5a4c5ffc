"""Padding never changes an answer, and no text of a batch changes another's."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.lstm import SimpleLSTM

quick = settings(deadline=None, max_examples=50)
WORDS = 50

token_lists = st.lists(st.lists(st.integers(1, WORDS - 1), min_size=1, max_size=25), min_size=1, max_size=6)


def build(seed=0, **sizes):
    torch.manual_seed(seed)
    return SimpleLSTM(WORDS, 3, **sizes)


def pad(lists, extra=0):
    lengths = torch.tensor([len(numbers) for numbers in lists])
    tokens = torch.zeros(len(lists), int(lengths.max()) + extra, dtype=torch.int64)
    for row, numbers in enumerate(lists):
        tokens[row, : len(numbers)] = torch.tensor(numbers)
    return tokens, lengths


def gradients(model, lists, extra, loss_of):
    """Return the gradients of a loss of the logits, by parameter."""
    model.zero_grad()
    loss_of(model(*pad(lists, extra))).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def packed(model, tokens, lengths):
    """Return the logits by way of torch's packed sequences."""
    sequence = nn.utils.rnn.pack_padded_sequence(
        model.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
    )
    return model.classifier(model.lstm(sequence)[1][0][-1])


@quick
@given(token_lists, st.integers(0, 40))
def test_padding_never_changes_an_answer(lists, extra):
    model = build()
    together = model(*pad(lists))
    more = model(*pad(lists, extra))
    torch.testing.assert_close(more, together, rtol=0, atol=1e-6)
    assert torch.equal(more.argmax(dim=1), together.argmax(dim=1))
    for row, numbers in enumerate(lists):
        alone = model(torch.tensor([numbers]), torch.tensor([len(numbers)]))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)
        assert alone[0].argmax() == together[row].argmax()


@quick
@given(token_lists, st.integers(1, 40))
def test_padding_never_changes_a_gradient(lists, extra):
    model, targets = build(), torch.arange(len(lists)) % 3

    def loss_of(logits):
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    without = gradients(model, lists, 0, loss_of)
    torch.testing.assert_close(gradients(model, lists, extra, loss_of), without, rtol=0, atol=1e-6)
    added = {name: torch.zeros_like(value) for name, value in without.items()}
    for row, numbers in enumerate(lists):
        part = gradients(
            model, [numbers], 0, lambda logits, t=targets[row : row + 1]: nn.functional.cross_entropy(logits, t)
        )
        added = {name: added[name] + part[name] for name in added}
    torch.testing.assert_close(added, without, rtol=0, atol=2e-6)


@quick
@given(token_lists)
def test_the_answer_is_that_of_packed_sequences(lists):
    model = build()
    torch.testing.assert_close(model(*pad(lists)), packed(model, *pad(lists)), rtol=0, atol=1e-6)


def test_the_last_token_counts_and_what_lies_behind_it_does_not():
    model = build()
    lengths = torch.tensor([3])
    base = model(torch.tensor([[5, 6, 7, 0]]), lengths)
    assert torch.equal(model(torch.tensor([[5, 6, 7, 9]]), lengths), base)
    for changed in ([8, 6, 7, 0], [5, 8, 7, 0], [5, 6, 8, 0], [6, 5, 7, 0]):
        assert (model(torch.tensor([changed]), lengths) - base).abs().max() > 1e-4


def test_layers_and_sizes_are_those_promised():
    model = SimpleLSTM(1000, 4)
    assert (model.embedding.num_embeddings, model.embedding.embedding_dim) == (1000, 128)
    assert (model.lstm.input_size, model.lstm.hidden_size, model.lstm.num_layers) == (128, 64, 1)
    assert not model.lstm.bidirectional
    assert (model.classifier.in_features, model.classifier.out_features) == (64, 4)
    assert sum(p.numel() for p in model.parameters()) == 1000 * 128 + 4 * 64 * (128 + 64 + 2) + 64 * 4 + 4
    assert model(*pad([[1, 2], [3]])).shape == (2, 4)
    small = build(embedding_size=5, hidden_size=7)
    assert small.lstm.weight_ih_l0.shape == (28, 5) and small(*pad([[1]])).shape == (1, 3)


def test_padding_has_no_embedding_and_gets_no_gradient():
    model = build()
    assert model.embedding.weight[0].eq(0).all()
    assert gradients(model, [[1, 2, 3], [4]], 5, torch.sum)["embedding.weight"][0].eq(0).all()


def test_forget_gates_start_open_and_the_others_do_not():
    model = build()
    both = model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0
    assert both[64:128].eq(1).all()
    assert both[:64].abs().max() < 0.3 and both[128:].abs().max() < 0.3 and both[:64].ne(0).any()


def test_the_gradient_of_a_long_text_reaches_its_first_word():
    model = build()
    texts = [[1] + [2] * 255]
    found = gradients(model, texts, 0, torch.sum)["embedding.weight"][1]
    assert found.abs().max() > torch.finfo(torch.float32).tiny  # no denormal number


def test_samples_of_a_batch_do_not_influence_each_other():
    model = build()
    tokens, lengths = pad([[1, 2, 3], [4, 5], [6]])
    for row in range(3):
        model.zero_grad()
        model(tokens, lengths)[row].sum().backward()
        touched = model.embedding.weight.grad.ne(0).any(dim=1).nonzero()[:, 0].tolist()
        assert touched == [number for number in tokens[row].tolist() if number]


def test_every_parameter_learns():
    model = build()
    found = gradients(
        model, [[1, 2], [3, 4]], 0, lambda logits: nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    )
    assert all(gradient.ne(0).any() for gradient in found.values())


def test_bfloat16_autocast_is_close_and_finite():
    model = build()
    batch = pad([[1, 2, 3], [4, 5]], 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(*batch)
        nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    torch.testing.assert_close(logits.float(), model(*batch), rtol=0, atol=2e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_the_compiled_model_answers_and_learns_the_same():
    model = build()
    other = copy.deepcopy(model)
    compiled = torch.compile(other)
    for batch in (pad([[1, 2, 3], [4, 5]], 5), pad([[6] * 11, [7]], 5)):
        expected, found = model(*batch), compiled(*batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        expected.logsumexp(1).sum().backward()
        found.logsumexp(1).sum().backward()
    for one, two in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-5)
