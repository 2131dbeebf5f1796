"""Functions that run through all tokens, each with the reason why no rank can compute its part."""

from __future__ import annotations

from typing import Any

from lightning_superscale.sequence.tokens.call import Call
from lightning_superscale.sequence.tokens.rules.registry import Rule, rule


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


# Functions, why they can't be shared, and what to do.
_REFUSED: list[tuple[str, str, str]] = [
    (
        "avg_pool1d max_pool1d max_pool1d_with_indices lp_pool1d adaptive_avg_pool1d adaptive_max_pool1d interpolate "
        "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample "
        "unfold fold im2col fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_rfft2 stft conv_transpose1d "
        "conv_transpose2d convolution trapezoid trapz gradient",
        "mixes each token with its neighbours, which other ranks have",
        "Train this model without sequence=.",
    ),
    (
        "nonzero nonzero_static masked_select unique unique_dim unique_consecutive _unique2 masked_scatter "
        "masked_scatter_ argwhere bincount histc histogram",
        "finds other numbers of tokens on each rank",
        "Keep the shape, with torch.where() or labels of -100.",
    ),
    (
        "index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_put index_put_ index_reduce "
        "index_reduce_ scatter_reduce scatter_reduce_ put_ put take slice_scatter select_scatter diagonal_scatter",
        "moves tokens to places that a tensor names",
        "Keep each token where it is: weight what experts give for all tokens with torch.where(), or compute whole "
        "tensors before the model's first layer.",
    ),
    (
        "bernoulli bernoulli_ normal normal_ uniform_ random_ exponential_ geometric_ cauchy_ log_normal_ multinomial "
        "poisson rrelu rrelu_ alpha_dropout feature_alpha_dropout feature_dropout dropout1d dropout2d dropout3d "
        "gumbel_softmax binomial native_dropout",
        "draws random numbers for tokens, other ones on each rank",
        "Use torch.nn.functional.dropout or torch.rand_like(), which draw those of one process.",
    ),
    (
        "cdist pdist dist cov corrcoef kron tensordot bilinear chain_matmul linalg_multi_dot block_diag cartesian_prod "
        "combinations triplet_margin_loss vander",
        "compares every token with every other, or puts them together",
        "Use torch.nn.functional.scaled_dot_product_attention for attention, and losses of each token.",
    ),
    (
        "tril triu tril_ triu_ diagonal diag diag_embed trace fliplr flipud rot90 as_strided ravel narrow_copy msort "
        "fill_diagonal_ vstack row_stack column_stack view_as_complex_copy",
        "may move tokens, or take them out of their order",
        "Use functions that name dims, such as flatten(0, 1), or whole tensors before the model's first layer.",
    ),
    (
        "flash_attn_func flash_attn_varlen_func _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math",
        "attends to this rank's tokens alone",
        "Use torch.nn.functional.scaled_dot_product_attention, which ranks share; in transformers, "
        "attn_implementation='sdpa'.",
    ),
    (
        "flex_attention",
        "attends to this rank's tokens alone where it has a name that could not be replaced",
        "Bind it to a name of a module of Python, or to an attribute of a layer, before training begins.",
    ),
    (
        "ctc_loss cosine_embedding_loss multi_margin_loss multilabel_margin_loss soft_margin_loss "
        "margin_ranking_loss hinge_embedding_loss multilabel_soft_margin_loss triplet_margin_with_distance_loss",
        "is a loss whose mean over the tokens of all ranks has no rule",
        "Use cross_entropy, mse_loss or one like them, or write it out: a mean of elements.",
    ),
    (
        "linalg_inv inverse linalg_solve solve linalg_qr qr linalg_svd svd linalg_eigh linalg_det det linalg_cholesky "
        "cholesky pinverse linalg_pinv matrix_exp linalg_matrix_power matrix_power",
        "takes tokens for rows of one matrix",
        "Apply it to weights, or before the model's first layer.",
    ),
    (
        "_pack_padded_sequence pack_padded_sequence pad_sequence nested_tensor to_sparse to_mkldnn _to_sparse",
        "puts tokens of sequences in another order",
        "Pad sequences to one length.",
    ),
    ("as_subclass", "takes a tensor out of the rules", "Keep it as it is."),
    ("new", "makes a tensor of an old kind", "Use .new_zeros() or .new_empty()."),
]


def _refusing(why: str, instead: str) -> Rule:
    def refuse(call: Call) -> Any:
        call.refuse(why, instead)

    return refuse


for _names, _why, _instead in _REFUSED:
    rule(*_names.split())(_refusing(_why, _instead))
