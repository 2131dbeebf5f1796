"""Functions that run through all tokens, each with the reason why no rank can compute its part."""

from __future__ import annotations

from typing import Any

from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.rules.registry import rule


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent(call: Call) -> Any:
    call.refuse(
        "is recurrent: each token needs the state that all tokens before it left",
        "Recurrent layers can't be shared; train this model without sequence=.",
    )


@rule("batch_norm", "instance_norm", "group_norm", "native_batch_norm", "local_response_norm")
def statistics(call: Call) -> Any:
    call.refuse(
        "takes mean and deviation over tokens, of which this rank has a part",
        "Use LayerNorm or RMSNorm, which treat every token by itself.",
    )


@rule("avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "interpolate", "unfold", "fft_fft",
      "fft_rfft", "conv_transpose1d")  # fmt: skip
def neighbours(call: Call) -> Any:
    call.refuse(
        "mixes each token with its neighbours, which other ranks have",
        "Train this model without sequence=.",
    )


@rule("nonzero", "masked_select", "unique", "masked_scatter", "masked_scatter_", "argwhere")
def counts(call: Call) -> Any:
    call.refuse(
        "finds other numbers of tokens on each rank",
        "Keep the shape, with torch.where() or labels of -100.",
    )
