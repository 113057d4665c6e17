"""Calls of many operators in many spellings: of `y` (2, 8, 8, 8) and of parts of a model `s`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TEXT = """
y.masked_scatter(y > 0, torch.ones(5000)).relu()
y.mean((2, 3)).masked_scatter(y.mean((2, 3)) > 0, s.k.expand(8, 8, 8)).relu()
y[:, :1].masked_scatter(y[:, :1] > 0, y).relu()
torch.where(y > 0, y, y.mean()).relu()
y.flatten(2).std(False).relu()
y.std(1).relu()
y.std(unbiased=True).relu()
y.var((1, 2), keepdim=True)
torch.var(y, dim=(), correction=1)
y.std((), True, True)
torch.std(y, None, True, True)
y.sum(()).relu()
y.sum([], True)
y.amax(()).relu()
y.mean([]).relu()
y.any(1)
y.any(1, True)
y.all((1, 2))
y.argmax()
y.argmax(keepdim=True)
y.argmax(1, True)
y.prod(1)
y.logsumexp((1, 2))
y.nansum(1)
y.count_nonzero((1, 2))
y.count_nonzero()
y.mean(np.int64(1))
y.mean((np.int64(1), -1))
y.sum(axis=1, keepdims=True)
torch.sum(input=y, dim=-1)
y.norm(2, 1)
y.norm()
y.norm(dim=(1, 2))
y.norm(p=1, dim=1, keepdim=True)
torch.norm(y, dim=1)
torch.norm(y, 2, None, True)
y.repeat_interleave(2)
y.repeat_interleave(2, 1)
y.repeat_interleave(2, dim=0)
torch.repeat_interleave(torch.tensor([1, 2]))
y.repeat(2, 1, 1, 1, 1)
y.repeat((1, 2, 1, 1))
y.mean().repeat(3)
y.tile(2, 1, 1, 1, 1)
y.expand(3, -1, -1, -1, -1)
y.expand(y.shape)
torch.broadcast_to(y, (3, 2, 8, 8, 8))
y.broadcast_to((3, 2, 8, 8, 8))
y.mean(1).view(y.shape[0], -1)
y.view(y[:, :, 0].shape + (8,))
y.reshape(y.size()[:2] + (-1,))
y.view(-1)
y.view([2, -1])
torch.reshape(y, shape=(2, -1))
y.view(torch.int32)
y.view(size=(2, -1))
y.reshape(y.shape[0])
y.view(y.numel())
y.reshape(y.shape)
y.mean(1).reshape(y.shape[0], *y.shape[2:])
y.view(y.size(0), y.size(1), -1)
y.flatten()
y.flatten(1)
y.flatten(-3, -2)
y.flatten(1, 1)
y.mean().flatten()
y.flatten(-1)
s.fl(y)
s.fl2(y)
s.uf(y)
y.unflatten(1, (2, -1))
torch.unflatten(y, -1, (2, 4))
y.unflatten(dim=1, sizes=[2, 2, 2])
y.mean((2, 3)).t()
y.T
y.mT
y.mean((1, 2, 3)).t()
y.movedim(1, -1)
y.movedim((0, 1), (1, 0))
y.adjoint()
y.transpose(-1, 1)
y.transpose(dim0=1, dim1=2)
y.swapdims(1, 2)
y.permute(0, 2, 3, 1)
y.permute([0, -1, 1, 2])
torch.permute(y, dims=(0, 2, 3, 1))
y.mean((2, 3)).permute(1, 0)
y.select(1, 0)
torch.select(y, dim=1, index=2)
y.unsqueeze(-1)
y.squeeze()
y.squeeze(1)
y.narrow(1, 0, 3)
torch.narrow(y, dim=1, start=1, length=2)
y.index_select(1, s.idx)
torch.index_select(y, dim=0, index=s.idx[:1])
y.gather(1, s.idx.view(1, 2, 1, 1))
torch.gather(y, 1, index=s.idx.view(1, 2, 1, 1))
y[:, s.idx]
y[:, None]
y[..., 0]
y[:, ::2]
y[:, 1:-1]
y[0]
y[:, 0:1]
y[:, [0, 1]]
y[y > 0]
y[True]
y[:, slice(1, None, 3)]
y[-1:]
y[0, 1]
y[:, :, ::2, ..., 1:]
y[:, y.shape[0]:]
y[:, 20:]
y[:, -3:]
y.chunk(3, 1)[0]
y.chunk(3, 1)[2]
y.chunk(3, 1)[-1]
y.chunk(5, 1)[-1]
torch.chunk(input=y, chunks=2, dim=-3)[1]
y.split(3, 1)[2]
y.split([3, 5], 1)[1]
y.split((3, 5), dim=1)[-1]
torch.split(y, split_size_or_sections=3, dim=1)[0]
y.tensor_split(3, 1)[0]
y.tensor_split((2, 5), 1)[1]
y.tensor_split(indices=(2, 5), dim=1)[2]
y.hsplit(2)[0]
y.vsplit(2)[1]
y.dsplit([2])[1]
y.split_with_sizes([3, 5], 1)[0]
torch.unsafe_chunk(y, 2, 1)[0]
torch.unsafe_split(y, 3, 1)[2]
y.unbind(1)[0]
torch.stack(y.unbind(1), 1)
torch.cat(y.chunk(2, 1), 1)
torch.stack(y.chunk(2, 1))
y.tensor_split(torch.tensor([2, 5]), 1)[0]
torch.cat((y, torch.empty(0)), 1)
torch.cat([torch.empty(0), y])
torch.cat([y, y], dim=-3)
torch.concat((y, y), axis=1)
torch.stack((y, y), -1)
torch.hstack((y, y))
torch.dstack((y.mean((2, 3)), y.mean((2, 3))))
F.pad(y, (1, 1))
F.pad(y, (1, 1, 0, 0, 2, 3))
F.pad(y, (1, 1, 1, 1), mode='reflect')
F.pad(y, (0, 0, 0, 0, 0, -3))
F.pad(y, ())
s.zp(y)
s.cp(y)
torch.constant_pad_nd(y, (0, 0, 0, 0, 1, 1))
torch._C._nn.pad(y, [1, 1], 'constant', 0.0)
F.interpolate(y, size=4)
F.interpolate(y, (4, 4))
F.interpolate(y.flatten(2), 4, mode='linear')
F.interpolate(y.unsqueeze(-1), scale_factor=(2, 2, 2))
s.up(y)
F.interpolate(y.mean(3), scale_factor=2)
F.pixel_shuffle(y, 2)
F.pixel_unshuffle(y[0], 2)
F.channel_shuffle(y, 4)
torch.pixel_shuffle(input=y, upscale_factor=2)
F.max_pool2d(y, 2, None, 0, 1, False, True)[0]
s.mp(y)[0]
F.max_pool2d(y[0], 2)
F.adaptive_avg_pool2d(y, (None, 1))
F.adaptive_max_pool2d(y, 1, True)[1]
torch.max_pool1d(y.flatten(2), 2)
F.max_pool1d(y.flatten(2)[0], 2)
F.lp_pool1d(y.flatten(2), 2, 2)
F.avg_pool3d(y, 2)
F.avg_pool3d(y.unsqueeze(1), 2)
F.max_pool3d(y, 2)
s.glu(y)
F.glu(y, dim=1)
F.softmax(y, 1)
s.sm(y)
s.gn(y)
s.gn(y.mean((2, 3)))
s.ln(y)
s.in2(y)
s.in2(y[0])
F.instance_norm(y)
F.layer_norm(y, (8, 8))
F.layer_norm(y, y.shape[1:])
F.rms_norm(y, (8,))
F.group_norm(y, 2)
torch.group_norm(y, 2)
F.batch_norm(y, torch.zeros(8), torch.ones(8))
F.local_response_norm(y, 2)
s.ct(y)
s.ct(y[0])
s.bl(y, y)
F.linear(y, s.l.weight)
F.linear(y, s.l.weight[0])
F.linear(y, s.l.weight[:4])
F.conv2d(y, s.ct.weight[:4, :2].repeat(1, 1, 1, 1).permute(0, 1, 2, 3).contiguous()[:4], groups=4)
F.conv1d(y.flatten(2), torch.ones(4, 8, 1))
torch.conv2d(y[0], torch.ones(4, 8, 1, 1))
torch.conv2d(y, torch.ones(4, 8, 3, 3), None, 1, 'same')
y @ y
y @ y[0, 0]
y @ y[0, 0, 0]
torch.matmul(y[0, 0, 0], y)
torch.bmm(y[0], y[1])
torch.einsum('bchw,bchw->bc', y, y)
torch.einsum('bchw->b', [y])
torch.einsum('...w->...', y)
torch.einsum('bchw,cd', y, s.l.weight)
F.scaled_dot_product_attention(y, y, y)
F.scaled_dot_product_attention(y[0], y[0], y[0], attn_mask=y[:1, :1])
F.scaled_dot_product_attention(query=y, key=y, value=y[..., :3])
y.__matmul__(y)
y.__rmatmul__(y[0, 0])
s.em((y > 0).long())
F.embedding((y > 0).long(), s.em.weight)
torch.embedding(s.em.weight, (y > 0).long())
F.one_hot((y > 0).long(), 3)
F.embedding_bag((y[:, :, 0, 0] > 0).long(), s.em.weight)
y + s.k
s.k * y[0, 0, :1]
y.mean(1, keepdim=True) * y
y.mean() + s.k
torch.pow(2, y)
2 ** y
y.clamp(s.k, None)
torch.clamp(s.k[:, 0, 0], min=y)
torch.lerp(s.k, y, 0.5)
torch.lerp(s.k, s.k, y)
s.k.addcmul(y, s.k)
s.k.masked_fill(y > 0, 1.0)
s.k.float_power(y)
torch.where(y > 0, 1.0, 0.0)
torch.where(y > 0)[0]
y.mean().mul(y)
torch.add(y, s.k, alpha=2)
torch.atan2(s.k, y)
y.copysign(s.k)
F.prelu(y, s.k[:, 0, 0])
torch.ldexp(s.k, y)
torch.maximum(s.k, y)
torch.max(s.k, y)
y.max(1)[0]
y.max(1).values
y.max()
torch.min(y, 1, True)[0]
y.sort()[0]
y.topk(2, 1)[0]
torch.std_mean(y, 1)[0]
y.unfold(1, 2, 2)
F.unfold(y, 2)
F.fold(F.unfold(y, 2), (8, 8), 2)
y.diagonal()
y.tril()
y.roll(1)
y.flip(1)
y.flip((1, 2))
y.cumsum(1)
y.scatter(1, s.idx.view(1, 2, 1, 1), 0.0)
torch.zeros_like(y)
torch.full_like(y, 2)
y.new_zeros(3)
y.new_ones(y.shape)
torch.zeros(y.shape)
torch.full((2, 3), 1.0) + y.mean()
torch.fill(y, 1.0)
y.type_as(s.k)
y.real
torch.real(y)
y.ravel()
y.renorm(2, 1, 1.0)
F.normalize(y)
F.cosine_similarity(y, y)
F.pairwise_distance(y, y)
torch.cdist(y, y)
torch.outer(y[0, 0, 0], y[0, 0, 0])
F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2)
F.grid_sample(y, torch.zeros(2, 4, 4, 2))
torch.meshgrid(y[0, 0, 0], y[0, 0, 0])[0]
y.mean((2, 3)).relu_().unsqueeze_(1)
y.squeeze_(0)
y.transpose_(1, 2)
y.as_strided((4,), (1,))
y.index_add(1, s.idx, y[:, :2])
F.gumbel_softmax(y)
y.T.relu()
y.mean(1).T
torch.tril(y) + torch.eye(8)
y.sum().item() * y
torch.atleast_3d(y.mean())
y.mean((2, 3)).index_put((s.idx,), y.mean())
s.k.take(s.idx.view(1, 1, 2))
y.float().argsort(1)
torch.addmm(y[0, 0], y[0, 0], y[0, 0])
torch.linspace(0, 1, 8) * y
y.swapaxes(axis0=0, axis1=1)
"""

EXPRESSIONS = tuple(_TEXT.strip().splitlines())


def function(expression: str) -> Callable[[Any, Tensor], Any]:
    """An expression as a function of a model and a value."""
    names = {"torch": torch, "F": F, "np": np}
    made: Callable[[Any, Tensor], Any] = eval(f"lambda s, y: {expression}", names)
    return made


class Calling(nn.Module):
    """A convolution, and an expression of its result."""

    def __init__(self, expression: str) -> None:
        super().__init__()
        self.function = function(expression)
        self.c, self.l = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.gn, self.ln = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.em, self.in2 = nn.Embedding(9, 5), nn.InstanceNorm2d(8, affine=True)
        self.sm, self.zp, self.cp = nn.Softmax2d(), nn.ZeroPad2d((1, 2, 3, 4)), nn.CircularPad2d(1)
        self.uf, self.fl, self.fl2 = nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Flatten(2)
        self.up, self.glu = nn.Upsample(scale_factor=2), nn.GLU(1)
        self.mp = nn.MaxPool2d(2, return_indices=True)
        self.ct, self.bl = nn.ConvTranspose2d(8, 4, 2, 2, groups=2), nn.Bilinear(8, 8, 3)
        self.register_buffer("k", torch.randn(8, 1, 1))
        self.register_buffer("idx", torch.tensor([0, 2]))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.c(x))
