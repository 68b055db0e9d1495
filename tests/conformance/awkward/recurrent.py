"""Recurrences: loops over steps, torch's own, packed sequences, states handed in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from conformance.awkward.registering import awkward, sequences
from conformance.drawing import draw, lengths, normal, of


def variant(name: str, make: Any, **fields: Any) -> None:
    """An entry of a recurrent layer as it is, without a module around it."""
    sequences(f"recurrent/{name}", **fields)(make)


variant("rnn-relu", lambda: nn.RNN(8, 6, nonlinearity="relu", batch_first=True))
variant("rnn-tanh-two-ways", lambda: nn.RNN(8, 6, bidirectional=True, batch_first=True))
variant("gru", lambda: nn.GRU(8, 6, batch_first=True), path="openvino")
variant("gru-two-layers", lambda: nn.GRU(8, 6, 2, bidirectional=True, dropout=0.5))
variant("gru-no-bias", lambda: nn.GRU(8, 6, bias=False))
variant("lstm", lambda: nn.LSTM(8, 6, batch_first=True), path="openvino")
variant("lstm-two-ways", lambda: nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True))
variant("lstm-projected", lambda: nn.LSTM(8, 6, proj_size=3, batch_first=True))
variant(
    "lstm-state-given",
    lambda: nn.LSTM(8, 6, batch_first=True),
    redraw=draw(normal("B", "L", 8), of(lambda *pair: pair, normal(1, "B", 6), normal(1, "B", 6))),
)
variant(
    "gru-state-given",
    lambda: nn.GRU(8, 6, batch_first=True),
    redraw=draw(normal("B", "L", 8), hx=normal(1, "B", 6)),
)


@sequences("recurrent/lstm-cell-loop")
class LstmCellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[0], 6)
        c = torch.zeros_like(h)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(h)
        return torch.stack(outputs, 1), c


@sequences("recurrent/gru-cell-backwards")
class GruCellBackwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, -1]
        for step in reversed(x.unbind(1)):
            h = self.cell(step, h)
        return h


@awkward("recurrent/cell-alone", draw(normal("B", 8)))
class CellAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


class Packed(nn.Module):
    def __init__(self, make: Any, sort: bool) -> None:
        super().__init__()
        self.rnn = make(8, 6, batch_first=True, bidirectional=True)
        self.sort = sort

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Any]:
        packed = pack_padded_sequence(x, n, batch_first=True, enforce_sorted=self.sort)
        out, state = self.rnn(packed)
        padded, sizes = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return padded, sizes, state


sequences("recurrent/packed-lstm", redraw=draw(normal("B", "L", 8), lengths(sort=True)), seeds=4)(
    lambda: Packed(nn.LSTM, True)
)
sequences("recurrent/packed-gru-unsorted", redraw=draw(normal("B", "L", 8), lengths()), seeds=4)(
    lambda: Packed(nn.GRU, False)
)


@sequences(
    "recurrent/packed-input",
    redraw=draw(
        of(
            lambda x, n: pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False),
            normal("B", "L", 8),
            lengths(),
        )
    ),
)
class PackedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 6, batch_first=True)

    def forward(self, packed: Any) -> Any:
        return self.rnn(packed)[0]


@sequences(
    "recurrent/padded-list",
    redraw=draw(
        of(
            lambda x, n: [row[:k] for row, k in zip(x, n.tolist(), strict=True)],
            normal("B", "L", 8),
            lengths(),
        )
    ),
)
class PaddedList(nn.Module):
    """A list of sequences, each of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 6, batch_first=True)

    def forward(self, rows: list[Tensor]) -> Tensor:
        return self.rnn(pad_sequence(rows, batch_first=True))[1]


@sequences("recurrent/state-kept", path="eager")
class StateKept(nn.Module):
    """Goes on where the former call ended."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 6, batch_first=True)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is not None and self.state.shape[1] != x.shape[0]:
            self.state = None
        out, state = self.rnn(x, self.state)
        self.state = state.detach()
        return out


@sequences("recurrent/attention-decoder")
class AttentionDecoder(nn.Module):
    """A fixed number of steps over inputs of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.mean(1), torch.zeros_like(x[:, 0])
        outputs = []
        for _ in range(3):
            weights = (x @ h[:, :, None]).softmax(1)
            h, c = self.cell((weights * x).sum(1), (h, c))
            outputs.append(h)
        return torch.cat(outputs, -1)
