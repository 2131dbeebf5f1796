"""Models that can't be shared, each with the line that is refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.sequence.tokens.foreign import Unknown

WIDTH = 8


class Model(nn.Module):
    """One layer between an embedding and a head."""

    refused = ""  # the function that the message names

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, WIDTH)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.linear(self.embed(ids))


class NaiveAttention(Model):
    refused = "matmul"

    def forward(self, ids: Tensor) -> Tensor:
        x = self.hidden(ids)
        scores = torch.matmul(x, x.transpose(1, 2))  # refused
        return scores.softmax(-1) @ x


class EinsumAttention(Model):
    refused = "einsum"

    def forward(self, ids: Tensor) -> Tensor:
        x = self.hidden(ids)
        return torch.einsum("bqd,bkd->bqk", x, x)  # refused


class LinearAttention(Model):
    refused = "matmul"

    def forward(self, ids: Tensor) -> Tensor:
        x = F.elu(self.hidden(ids)) + 1
        state = x.transpose(1, 2) @ x  # refused
        return x @ state


class Recurrent(Model):
    refused = "lstm"

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rnn(self.hidden(ids))[0]  # refused


class Gated(Model):
    refused = "gru"

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rnn(self.hidden(ids))[0]  # refused


class Convolution(Model):
    refused = "conv1d"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.hidden(ids).transpose(1, 2))  # refused


class RunningSum(Model):
    refused = "cumsum"

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids).cumsum(1)  # refused


class Roll(Model):
    refused = "roll"

    def forward(self, ids: Tensor) -> Tensor:
        return torch.roll(self.hidden(ids), shifts=1, dims=1)  # refused


class BatchNorm(Model):
    refused = "batch_norm"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.hidden(ids).transpose(1, 2))  # refused


class Picking(Model):
    refused = "__getitem__"

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids)[ids > 3]  # refused


class Difference(Model):
    refused = "sub"

    def forward(self, ids: Tensor) -> Tensor:
        x = self.hidden(ids)
        return x[:, 1:] - x[:, :-1]  # refused


class ExpertChoice(Model):
    refused = "topk"

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids).softmax(-1).topk(2, dim=1).values  # refused


class Sorted(Model):
    refused = "sort"

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids).sort(dim=1).values  # refused


class Unfolded(Model):
    refused = "unfold"

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids).unfold(1, 2, 2)  # refused


class CrossAttention(Model):
    refused = "scaled_dot_product_attention"

    def forward(self, ids: Tensor) -> Tensor:
        x, other = self.hidden(ids)[:, None], torch.ones(2, 1, 5, WIDTH)
        return F.scaled_dot_product_attention(x, other, other)  # refused


class Prefix(Model):
    refused = "cat"

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([torch.ones(2, 3, WIDTH), self.hidden(ids)], dim=1)  # refused


class Loop(Model):
    refused = "unbind"

    def forward(self, ids: Tensor) -> Tensor:
        state = torch.zeros(2, WIDTH)
        for token in self.hidden(ids).unbind(1):  # refused
            state = torch.tanh(state + token)
        return state


class OwnFunction(Model):
    refused = "tests.sequence.tokens.foreign.Unknown"

    def forward(self, ids: Tensor) -> Tensor:
        return Unknown.apply(self.hidden(ids))  # refused


class Cache(Model):
    refused = "cat"

    def forward(self, ids: Tensor) -> Tensor:
        key = self.hidden(ids)[:, None]
        past = torch.ones(2, 1, 3, WIDTH)
        return torch.cat((past, key), dim=-2)  # refused


class Experts(Model):
    refused = "where"

    def forward(self, ids: Tensor) -> Tensor:
        x = self.hidden(ids).flatten(0, 1)
        chosen = x.argmax(-1) == 0
        (rows,) = torch.where(chosen)  # refused
        return torch.zeros_like(x).index_add_(0, rows, x[rows])


class Weights(Model):
    refused = "multi_head_attention_forward"

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.hidden(ids)
        return self.attend(x, x, x)[0]  # refused


MODELS = Model.__subclasses__()
