"""LSTM that carries its state from call to call. Legend: B batch, T time, F input columns, H hidden state."""

from __future__ import annotations

import torch
from torch import nn

State = tuple[torch.Tensor, torch.Tensor]  # hidden h and cell c, each [1, B, H]
FORGET_BIAS = 3.0  # keeps 95 % of a memory from sample to sample


class FrequencyLSTM(nn.Module):
    """LSTM of one layer and a linear layer: one number for every time step."""

    def __init__(self, num_inputs: int = 5, hidden_size: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num_inputs, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 1)
        # Forget gates start open: at torch's sigmoid(0) a memory is halved at every sample, and a gradient cannot find
        # out what happened a period of hundreds of samples ago. docs/stateful_lstm.md has figures.
        with torch.no_grad():
            self.lstm.get_parameter("bias_ih_l0")[hidden_size : 2 * hidden_size].fill_(FORGET_BIAS)
            self.lstm.get_parameter("bias_hh_l0")[hidden_size : 2 * hidden_size].zero_()

    def forward(self, x_BTF: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """Return the answers [B, T, 1] and the state after the last time step.

        Args:
            x_BTF: inputs, in the order of time.
            state: what the call before returned; None for zeros.
        """
        hidden_BTH, state = self.lstm(x_BTF, state)
        return self.head(hidden_BTH), state

    def summary(self) -> str:
        """Return a line on the layers and how many parameters each has."""
        lstm, head = (sum(parameter.numel() for parameter in layer.parameters()) for layer in (self.lstm, self.head))
        return (
            f"LSTM({self.lstm.input_size} -> {self.lstm.hidden_size}) {lstm:,} + Linear({self.lstm.hidden_size} -> 1) "
            f"{head:,} = {lstm + head:,} parameters"
        )
