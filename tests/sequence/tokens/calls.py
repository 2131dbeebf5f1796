"""Calls of torch's functions as users write them, of a value with tokens, and what must be refused.

`x` [batch, tokens, features] is what an embedding made of `ids` [batch, tokens] with weights `w` [rows, features].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EXACT = """
torch.where(x>0, x, 0.)
torch.where(torch.tensor(True), x, -x)
torch.where((ids>3)[...,None], x, torch.zeros((),dtype=x.dtype))
torch.where(torch.ones(x.shape[1],1).bool(), x, -x)
torch.where(condition=x>0, input=x, other=-x)
x.where(x>0, torch.zeros_like(x))
torch.ones(x.shape[-1],dtype=x.dtype).where(x>0, x)
torch.sum(input=x, dim=1)
torch.sum(x, (0,1))
torch.sum(x, dim=[])
x.sum(dim=-2)
x.mean(dim=(0, 1))
x.mean((0, 1))
x.mean(1, True)
x.mean(axis=1)
x.sum(axis=1, keepdims=True)
x.mean(1, keepdim=True, dtype=torch.float64)
x.float().mean(1, dtype=torch.float64)
x.sum()
x.mean()
torch.mean(x, dim=-1)
ids.sum(1), x
(x>0).sum(1), (x>0).sum()
(x>0).float().mean(1)
torch.cat(tensors=(x, x), dim=-1)
torch.cat((x, x), -1)
torch.cat([x, x], axis=2)
torch.cat([x, x])
torch.cat([torch.tensor([],dtype=x.dtype), x], 1)
torch.cat([torch.zeros(*x.shape,dtype=x.dtype), x], -1)
torch.cat([torch.zeros(*x.shape,dtype=x.dtype), x], 0)
torch.stack([x, x]), torch.stack([x,x],-1), torch.stack([x,x],1), torch.stack([x,x],2)
torch.stack(tensors=[x,x],dim=-2)
F.softmax(x, dim=-1, dtype=torch.float32)
F.softmax(x, -1)
torch.softmax(x, dim=2)
F.softmax(dim=-1, input=x)
F.log_softmax(x, dim=-1)
F.normalize(x, dim=-1)
F.normalize(x, 1, 2)
F.embedding(ids, w, 0)
F.embedding(input=ids, weight=w, padding_idx=0)
F.embedding(weight=w, input=ids)
x.flip(2)
x.flip([2])
torch.flip(x, (2,))
x.roll(1, 2)
x[..., None]
x[:, None]
x[None]
x[None, :, :, None]
x[..., 0]
x[..., :2]
x[..., -1:]
x[0]
x[-1]
x[:, -1:]
x[:, -1]
x[:, 0]
x[:, ::1]
x[:, -1:, :2]
x[..., -1, :]
x[:, -1, None]
x[[0]]
x[:, [0]]
x[..., [0, 1]]
x[..., torch.tensor([0,1])]
x[torch.arange(x.shape[0]), -1]
x[torch.arange(x.shape[0]), ids.argmax(-1)]
x[torch.arange(x.shape[0]), torch.full((x.shape[0],), x.shape[1]-1)]
x[torch.arange(x.shape[0])]
x[:, torch.arange(x.shape[1])]
x[:, torch.tensor(0)]
x[torch.tensor(0)]
x[:, slice(None)]
x[range(1)]
x[:, x.shape[1]-1]
x / torch.arange(1, x.shape[1]+1, dtype=x.dtype)[:,None]
torch.log(x.exp() * torch.arange(1, x.shape[1]+1, dtype=x.dtype)[:,None])
torch.sqrt(x.exp() * torch.arange(1, x.shape[1]+1, dtype=x.dtype)[:,None])
x[:, :1]
x[:, 0] + x[:, -1]
x[:, 0][:, None] + x
x - x.mean(1, keepdim=True)
x - x.mean(1)[:, None]
x[..., 0] + x[:, 0] if x.shape[1]==x.shape[2] else x
x.T
x.mT
x.permute(2, 0, 1)
x.permute((2, 0, 1))
torch.permute(input=x, dims=(1,0,2))
x.movedim(1, 0)
torch.movedim(x, (0, 1), (1, 2))
x.transpose(-1, -2)
torch.transpose(input=x, dim0=1, dim1=2)
torch.swapaxes(x, 0, 1)
torch.swapaxes(x, axis0=0, axis1=1)
x.swapdims(dim0=0, dim1=1)
x.unsqueeze(1), x.unsqueeze(-1), x.unsqueeze(dim=0), x.unsqueeze(-2)
torch.unsqueeze(input=x, dim=1)
x.squeeze()
x.squeeze(0)
x.squeeze(1)
x.squeeze(dim=(0,1))
torch.squeeze(input=x)
x[:1].squeeze(0)
x[:1].squeeze()
x[..., :1].squeeze(-1)
x.view(-1, x.shape[-1])
x.view(x.shape[0], -1, 2, x.shape[2]//2)
x.view(x.shape[0]*x.shape[1], -1)
x.view(size=(x.shape[0]*x.shape[1], -1))
x.reshape(shape=(x.shape[0]*x.shape[1], -1))
torch.reshape(input=x, shape=(-1, x.shape[2]))
torch.reshape(x, (-1, x.shape[2]))
x.flatten(0, 1)
torch.flatten(input=x, start_dim=0, end_dim=1)
x.flatten(start_dim=-3, end_dim=-2)
x.flatten(0,1).unflatten(0, (x.shape[0], -1))
x.flatten(0,1).view(x.shape[0], x.shape[1], -1)
x.unflatten(-1, (2, -1))
torch.unflatten(input=x, dim=-1, sizes=(2, -1))
x.view_as(x), x.reshape_as(x)
torch.zeros(*x.shape,dtype=x.dtype).view_as(x) + x
torch.zeros(x.numel(),dtype=x.dtype).view_as(x) + x
x[..., :1].expand(-1, -1, 5)
x[..., :1].expand(size=(-1,-1,5))
x.expand(2, *x.shape)
x.expand(2, -1, -1, -1)
torch.broadcast_to(x, (2, *x.shape))
x[:1].expand(5, -1, -1)
x.repeat(1, 1, 2)
x.repeat(2, 1, 1)
x.repeat(2, 1, 1, 1)
torch.tile(input=x, dims=(1,1,2))
x.repeat_interleave(2, -1)
x.repeat_interleave(2, dim=0)
x.chunk(2, -1)
x.chunk(2)
x.split(2, dim=-1)
torch.split(tensor=x, split_size_or_sections=2, dim=-1)
torch.split(x, [1, x.shape[-1]-1], -1)
x.split([1, x.shape[-1]-1], 2)
x.split(1)
x.tensor_split(2, -1)
torch.tensor_split(x, (1,), dim=2)
x.unbind(-1)
x.unbind()
torch.unbind(input=x, dim=2)
[y for y in x]
x.nbytes, x
x.numel(), x
x.size(), x.size(1), x.size(dim=1), x.shape, x.ndim, x
len(x), x
x.nelement(), x
x.new_zeros(x.shape) + x
x.new_ones(x.shape[1], 1) * x
x.new_full((x.shape[1], 1), 3.) * x
x.new_empty(x.shape[1], 1).fill_(2.) * x
x.new_zeros(size=(x.shape[1], 1)) + x
torch.zeros_like(x) + x
torch.ones_like(x, dtype=torch.float32) + x
torch.full_like(x, 2.) + x
torch.empty_like(x).fill_(1.) + x
F.dropout(x, 0.5)
F.dropout(x, p=0.3, training=True)
F.dropout(x, 0.5, True, True)
F.dropout(x, 1.0)
F.dropout(x, 0.5, False)
torch.dropout(x, 0.5, True)
F.dropout(x.transpose(0,1), 0.5)
F.glu(x)
F.silu(x) * F.gelu(x, approximate='tanh') + F.elu(x) + F.leaky_relu(x, 0.1)
x.clamp(0, 1), x.clip(0,1), torch.clamp(x, min=torch.zeros(x.shape[1],1,dtype=x.dtype))
torch.maximum(x, torch.zeros(x.shape[1],1,dtype=x.dtype))
x.max(torch.zeros(x.shape[1],1,dtype=x.dtype))
torch.max(x, other=torch.zeros(x.shape[1],1,dtype=x.dtype))
torch.max(input=x, dim=1)[0]
x.max(1)
x.max(1)[1]
x.max(dim=1).values
x.max(-1)
x.max()
x.min(1, keepdim=True)
x.argmax(1), x
x.argmax(-1), x
x.argmin(1, keepdim=True), x
x.var(1), x.std(1), x.var(1, unbiased=False)
x.var(1, correction=0)
x.var(dim=(0,1), keepdim=True)
x.var()
torch.var_mean(x, 1)
torch.std_mean(x, dim=1, keepdim=True)
x.var(-1), x.std(-1, unbiased=False), x.var(-1, False), x.var(2, keepdim=True)
x.var(False)
x.prod(-1)
x.median(-1)
x.mode(-1)
x.kthvalue(1)
x.nansum(-1), x
x.logsumexp(1)
torch.logsumexp(x, dim=(0,1))
torch.logsumexp(x, -1)
(x>0).any(1), (x>0).all(1), (x>0).any(), (x>0).all(), (x>0).any(-1), x
(x>0).any(dim=1, keepdim=True), x
(x>0).count_nonzero(), (x>0).count_nonzero(1), (x>0).count_nonzero(-1), x
torch.count_nonzero(x, dim=(0,1)), x
x.norm(), x.norm(dim=1), x.norm(dim=-1), x.norm(p=1, dim=1), x.norm(2, -1, True)
x.norm(p=float('inf'), dim=-1)
torch.linalg.norm(x), torch.linalg.norm(x, dim=-1)
torch.linalg.norm(x, dim=(1,2))
torch.linalg.norm(x, ord=2, dim=(0,2))
torch.norm(x, 'fro', dim=(1,2))
F.cosine_similarity(x, x*2+1, dim=-1)
x.cumsum(-1)
torch.diff(x)
torch.cumsum(torch.ones(*x.shape,dtype=x.dtype), 1) + x
x.sort(-1), x.argsort(-1), x.topk(2, -1), x.topk(2)
x.sort(descending=True)
x.gather(-1, ids[..., None] % x.shape[-1])
torch.gather(input=x, dim=-1, index=ids[..., None] % x.shape[-1])
x.take_along_dim(ids[..., None] % x.shape[-1], -1)
torch.take_along_dim(x, indices=ids[..., None] % x.shape[-1], dim=2)
x.scatter(-1, ids[...,None] % x.shape[-1], 0.)
x.scatter_add(-1, ids[...,None] % x.shape[-1], x[..., :1])
torch.zeros(*x.shape,dtype=x.dtype).scatter(-1, x.argmax(-1, keepdim=True), 1.) * x
torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.) * x
x.index_select(-1, torch.tensor([0, 1]))
x.index_select(0, torch.tensor([0]))
w.index_select(0, ids.flatten())
w[ids]
w[ids] + x
x.masked_fill(x > 0, 0.), x.masked_fill(torch.ones(x.shape[1],1).bool(), 1.)
x.masked_fill(mask=ids[...,None] == 3, value=0.)
torch.einsum('btd,vd->btv', x, w)
torch.einsum('btd,btd->bt', x, x)
torch.einsum('b t d, v d -> b t v', x, w)
torch.einsum('btd,t->btd', x, torch.ones(x.shape[1],dtype=x.dtype))
x @ w.T
x.matmul(w.T), torch.matmul(input=x, other=w.T)
x @ torch.ones(x.shape[0], x.shape[2], 3, dtype=x.dtype)
torch.bmm(x, torch.ones(x.shape[0], x.shape[2], 3, dtype=x.dtype))
x[0].mm(w.T)
torch.addmm(torch.zeros(11,dtype=x.dtype), x[0], w.T)
torch.addmm(torch.zeros(x.shape[1],1,dtype=x.dtype), x[0], w.T)
torch.addmm(input=torch.zeros(11,dtype=x.dtype), mat1=x[0], mat2=w.T)
torch.addmm(x[0] @ w.T, x[0], w.T, beta=2, alpha=3)
torch.baddbmm(torch.zeros(1,1,1,dtype=x.dtype), x, torch.ones(x.shape[0], x.shape[2], 3, dtype=x.dtype))
F.linear(x, w), F.linear(input=x, weight=w), F.linear(x, w, torch.ones(11,dtype=x.dtype))
F.layer_norm(x, (x.shape[-1],)), F.rms_norm(x, (x.shape[-1],)), F.layer_norm(input=x, normalized_shape=[x.shape[-1]])
F.conv1d(x.transpose(1,2), torch.ones(3,x.shape[2],1,dtype=x.dtype))
F.pad(x, (0, 1)), F.pad(input=x, pad=(1, 0)), F.pad(x, (0,0,0,0,1,1))
F.pad(x, (1, 1), mode='reflect')
F.one_hot(x.argmax(-1), 20), x
F.one_hot(ids), x
F.one_hot(x.argmax(-1)), x
torch.bincount(ids.flatten()), x
torch.bucketize(x, torch.linspace(-1,1,5,dtype=x.dtype)), x
torch.isin(x.argmax(-1), torch.tensor([0])), x
torch.isclose(x, x*1).all(), x
torch.complex(x, x).abs()
x.lerp(x*2, 0.5), torch.addcmul(x, x, x), torch.addcdiv(x, x, x*x+1)
torch.lerp(torch.ones(x.shape[1],1,dtype=x.dtype), x, 0.3)
torch.frexp(x)[0], x
(x>0) & (ids[...,None] > 3), (x>0) | True, ~(x>0), (x>0) ^ (x<1), x
x == x, x != 0, x > torch.zeros(x.shape[1],1), x
(x.long() << 1) | 1, x.long() >> 1, x.long() // 2, x.long() % 3, x
x.bool(), x.int(), x.half().float(), x.bfloat16().double()
torch.zeros(2).to(x), x
x.cpu(), x.contiguous(), x.clone(), x.detach(), x.clone(memory_format=torch.contiguous_format)
bool((x>0).all()), x
bool((x[0]>0).sum() > 3), x
float(x[0,0,0]), x
hash(x) != 0, x
x.is_same_size(x), x.is_same_size(torch.zeros(*x.shape)), x
torch.is_same_size(torch.zeros(*x.shape), x), x
torch.numel(x), torch.is_floating_point(x), torch.is_complex(x), torch.is_tensor(x), x
torch.broadcast_tensors(x, torch.zeros(x.shape[1],1,dtype=x.dtype))
torch.broadcast_tensors(torch.zeros(x.shape[1],1,dtype=x.dtype), x)
torch.nan_to_num(x), torch.isnan(x), torch.isfinite(x), x
x.grad_fn is not None, x.requires_grad, x.is_leaf, x
x.swapaxes(1,2).mT
F.cross_entropy(x.flatten(0,1), (ids % x.shape[-1]).flatten())
F.cross_entropy(input=x.flatten(0,1), target=(ids % x.shape[-1]).flatten())
F.cross_entropy(x.transpose(1,2), ids % x.shape[-1], reduction='sum')
F.cross_entropy(x.transpose(1,2), ids % x.shape[-1], reduction='none')
F.nll_loss(x.log_softmax(-1).flatten(0,1), (ids % x.shape[-1]).flatten())
F.nll_loss(x.log_softmax(-1).flatten(0,1), (ids % x.shape[-1]).flatten(), None, None, 2)
F.nll_loss(x.log_softmax(-1).flatten(0,1), (ids % x.shape[-1]).flatten(), ignore_index=2, reduction='sum')
F.cross_entropy(x.flatten(0,1), torch.full((x.shape[0]*x.shape[1],), -100))
F.cross_entropy(x[0], (ids % x.shape[-1])[0])
F.mse_loss(input=x, target=x*0.5)
F.huber_loss(x, x*0, 'none', 0.5)
F.binary_cross_entropy(x.sigmoid(), (x>0).to(x), weight=torch.ones(x.shape[-1],dtype=x.dtype)*2)
F.kl_div(x.flatten(0,1).log_softmax(-1), x.flatten(0,1).softmax(-1), reduction='batchmean')
F.poisson_nll_loss(x, x.abs()), F.gaussian_nll_loss(x, x*0, x*x+1)
F.scaled_dot_product_attention(x, x, x)
F.scaled_dot_product_attention(x[:,None], x[:,None], x[:,None], is_causal=True)
F.scaled_dot_product_attention(x, x, x, torch.zeros(x.shape[1],dtype=x.dtype))
F.scaled_dot_product_attention(x, x, x, scale=0.2)
torch.std(input=x, dim=1)
torch.argmax(input=x, dim=1), x
torch.max(input=x)
torch.amax(input=x, dim=1)
torch.any(input=x>0, dim=1), x
torch.norm(input=x)
torch.select(input=x, dim=1, index=0)
torch.narrow(x, 2, 0, 1), x.narrow(1, -1, 1), x.narrow(1, 0, x.shape[1])
x.select(-1, 0), x.select(1, -1), x.select(0,0)
x.mvlgamma(1)
x.bmm(torch.ones(x.shape[0], x.shape[2], 3, dtype=x.dtype)).relu().sum(-1)
(x[..., None, :] * x[..., :, None]).sum((-1,-2))
torch.exp(x).div(x.exp().sum(1, keepdim=True))
x.mul(torch.tensor(2.)), x * torch.tensor([2.]), x * torch.ones(1,1,1)
torch.ones(1,1,1,1,dtype=x.dtype)*x
torch.ones(2,x.shape[0],x.shape[1],1,dtype=x.dtype)*x
x[0] + torch.ones(5, x.shape[1], x.shape[2],dtype=x.dtype)
x[0] + x
x + x[0]
x[0,:,0] + x[0,:,:1].squeeze(-1)
x[..., 0] + torch.ones(x.shape[1],dtype=x.dtype)
x[...,:1] * torch.ones(x.shape[1],3,dtype=x.dtype)
F.one_hot((x>0).long()), x
x.std(1, False, True), x.std(1, True), torch.std(x, (1,), correction=0), torch.var_mean(x, (0,1), unbiased=False)
(ids[...,None]*(x>-9)).max(1), (ids[...,None]*(x>-9)).argmax(1), (ids[...,None]*(x>-9)).amax(1), x
x[torch.arange(x.shape[0]), -1, 0]
x[torch.arange(x.shape[0]), torch.arange(x.shape[0]) % x.shape[1]] * x[:, :, None].sum() + x[0,0]
x[0, torch.tensor([0, -1])]
x[:, [0, -1], 1:]
x[torch.arange(x.shape[0])[:,None], torch.tensor([[0,-1]])]
x[..., [0,1]], x[[0]], x[[0], :, 1:], x[..., torch.tensor([[0,1],[1,0]])]
torch.empty_like(x).copy_(torch.arange(x.shape[1],dtype=x.dtype)[:,None]) * x
x * torch.ones(2, 1, 1, dtype=x.dtype) if x.shape[0] in (1,2) else x
F.dropout(x.transpose(1,2), 0.5)
x.half().sum(1), x.bfloat16().mean((0,1)), x.half().mean(), x.half().sum(1, dtype=torch.float32)
F.cross_entropy(x.half().flatten(0,1), (ids % x.shape[-1]).flatten())
x.diff(dim=-1), x.cummax(-1)[0]
(x*0).norm(), x
x.unsqueeze(2).expand(-1,-1,3,-1).reshape(x.shape[0], x.shape[1], -1)
x[:, None].expand(-1, 3, -1, -1).reshape(x.shape[0]*3, x.shape[1], -1)
Sine.apply(x), Sine.apply(x.transpose(0, 1))
torch.ops.lss_tests.doubled(x), doubled(x)
torch.autograd.grad(x.sum() * 2, w)
x.std(1, False, True), x.std(1, True), torch.std(x, (1,), correction=0), torch.var_mean(x, (0, 1), unbiased=False)
(ids[..., None] * (x > -9)).max(1), (ids[..., None] * (x > -9)).argmax(1), (ids[..., None] * (x > -9)).amax(1), x
x[torch.arange(x.shape[0]), x[..., 0].argmax(-1)]
F.one_hot((x > 0).long()), F.one_hot(x.argmax(-1)), x
""".strip().splitlines()

REFUSED = """
x.cumsum(1)
x.flip(2, 1)
x.roll(1, 1)
x.sort(1)
x.topk(1, dim=1)
x[:, ::2]
x[ids > 3]
x[x > 0]
x[torch.arange(x.shape[0])[:, None], x.argmax(-1)]
x[:, 1:] - x[:, :-1]
torch.where(x > 0)
torch.Tensor.numpy(x.detach())
torch.tensor(x)
torch.asarray(x, dtype=torch.float32)
x.new_tensor(x)
torch.vmap(lambda v: v * 2)(x)
torch.func.grad(lambda v: (v**2).sum())(x)
copy.copy(x)
copy.deepcopy(x.detach())
pickle.dumps(x.detach())
x.stride()
x.data_ptr()
x.untyped_storage()
x.view(torch.int64)
x.tolist()
bool((x[0] > 0).all(-1).any(0) & (x[0, :, 0] > 0))
torch.equal(x, x)
x.normal_()
torch.bernoulli(x.sigmoid())
F.alpha_dropout(x, 0.5, training=True)
x.unfold(1, 1, 1)
x.median(1)
x.quantile(0.5, 1)
F.softmax(x, 1)
x.argmax()
F.batch_norm(x.transpose(1, 2), None, None, training=True)
F.conv1d(x.transpose(1, 2), torch.ones(3, x.shape[2], 3, dtype=x.dtype), padding=1)
F.embedding(ids, w, max_norm=1.0)
F.embedding(ids, w, scale_grad_by_freq=True)
torch.cat([x, x], 1)
torch.cat([x[:, :1], x], axis=1)
torch.zeros(*x.shape, dtype=x.dtype).copy_(x)
torch.zeros(*x.shape, dtype=x.dtype).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype).add_(x.sum(1))
torch.mul(x.detach(), 2, out=torch.zeros(*x.shape, dtype=x.dtype))
x.transpose_(0, 1)
x[:, 0].zero_()
x[:, :1] * torch.ones(5, 1, dtype=x.dtype)
x * torch.ones(x.shape[1] + 1, 1, dtype=x.dtype)
torch.einsum("btd,bsd->bts", x, x)
torch.einsum("btd,btd->bd", x, x)
torch.einsum("btd,tt->btd", x, torch.ones(x.shape[1], x.shape[1], dtype=x.dtype))
x @ x.transpose(1, 2)
x.transpose(1, 2) @ x
torch.ones(3, x.shape[1], dtype=x.dtype) @ x
torch.cdist(x, x)
torch.linalg.norm(x, ord=2, dim=(1, 2))
F.linear(x.transpose(1, 2), torch.ones(3, x.shape[1], dtype=x.dtype))
F.layer_norm(x, x.shape[1:])
x.reshape(-1)
x.repeat(1, 2, 1)
x.index_add(1, torch.tensor([0]), x[:, :1])
F.scaled_dot_product_attention(x, x[:, :1], x[:, :1])
F.scaled_dot_product_attention(x.transpose(1, 2), x.transpose(1, 2), x.transpose(1, 2))
torch.autograd.grad(x.sum(), x)
torch.autograd.grad(x.sum(), w, create_graph=True)
Unknown.apply(x)
torch.ops.lss_tests.unknown(x)
scripted(x)
""".strip().splitlines()


def in_place(x: Tensor, w: Tensor, ids: Tensor) -> Any:
    y = x * 1
    y += torch.ones(x.shape[1], 1, dtype=x.dtype)
    y.mul_(x)
    y[..., 0] = 0
    y[..., :2] += torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    y[ids == 3] = 0.5
    return y.masked_fill_((ids == 4)[..., None], 2.0)


def in_place_in_windows(x: Tensor, w: Tensor, ids: Tensor) -> Any:
    """What lies outside of a window stays as it is."""
    y, z = x * 1, x * 1
    y[:, -1] = 7.0
    if x.shape[1] == 1:
        return y
    y[:, :-1].add_(1)
    tail = y[:, 1:]
    tail *= 2
    z[:, 1:].zero_()
    z[:, :-1].copy_(x[:, :-1].sin())
    rectified = x * 1
    F.relu(rectified[:, 1:], inplace=True)
    return y, z, rectified


def quotients_in_windows(x: Tensor, w: Tensor, ids: Tensor) -> Any:
    """What lies outside of a window has no value of 0 that a quotient or a root would meet."""
    place = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    return x / place, torch.log(x.exp() * place), torch.sqrt(x[:, 1:].exp() * place[:-1]) if x.shape[1] > 1 else x


def picked_in_windows(x: Tensor, w: Tensor, ids: Tensor) -> Any:
    if x.shape[1] == 1:
        return x
    rows = torch.arange(x.shape[0])
    return x[:, :-1][rows, ids.argmax(-1) % (x.shape[1] - 1)], x[:, 1:].max(1), x[:, 1:].var(1), x[:, 1:].amax((0, 1))


def hooked(x: Tensor, w: Tensor, ids: Tensor) -> Any:
    """A hook gets the gradient of one process."""
    y = x * 1
    y.register_hook(lambda grad: grad.clamp(max=0.5))
    return y * x


def hooked_then_written(x: Tensor, w: Tensor, ids: Tensor) -> Any:
    """A hook stays where it was registered when its tensor, or a view of it, is written to in place."""
    y = x * 1
    y.register_hook(lambda grad: grad.clamp(max=0.5))
    y += x
    y.register_hook(lambda grad: grad * 3)
    y.transpose(0, -1).mul_(2)
    view = y[..., :1]
    view.register_hook(lambda grad: grad * 5)
    return y * x + view


def checkpointed(x: Tensor, w: Tensor, ids: Tensor) -> Any:
    from torch.utils.checkpoint import checkpoint

    return [
        checkpoint(lambda v: v.sin() - v.sin().mean(1, keepdim=True), x, use_reentrant=one) for one in (True, False)
    ]


WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        in_place,
        in_place_in_windows,
        quotients_in_windows,
        picked_in_windows,
        hooked,
        hooked_then_written,
        checkpointed,
    )
}
