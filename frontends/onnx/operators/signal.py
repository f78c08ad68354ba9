"""Fourier transforms and mel filters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regraft.frontends.onnx.registry import operator
from regraft.frontends.onnx.values import DTYPES


def _dft(x: Tensor, length: Any, axis: int, inverse: int, onesided: int) -> Tensor:
    axis = axis % x.dim() if axis >= 0 else axis % x.dim()
    count = length[0] if length else None
    values = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
    if inverse and onesided:
        count = 2 * (values.shape[axis] - 1) if count is None else count
        return torch.fft.irfft(values, count, axis)[..., None]
    if onesided:
        values = values.real if values.is_complex() else values
        return torch.view_as_real(torch.fft.rfft(values, count, axis))
    function = torch.fft.ifft if inverse else torch.fft.fft
    return torch.view_as_real(function(values, count, axis))


@operator("DFT", since=17, host=(1,))
def dft_17(x, length=None, *, axis=1, inverse=0, onesided=0):
    return _dft(x, length, axis, inverse, onesided)


@operator("DFT", since=20, host=(1, 2))
def dft(x, length=None, axis=None, *, inverse=0, onesided=0):
    return _dft(x, length, axis[0] if axis else -2, inverse, onesided)


@operator("STFT", host=(1, 3))
def stft(signal, step, window=None, length=None, *, onesided=1):
    count = length[0] if length else window.shape[0]
    values = torch.view_as_complex(signal) if signal.shape[-1] == 2 else signal.squeeze(-1)
    frames = values.unfold(1, count, step[0])
    if window is not None:
        frames = frames * window
    return torch.view_as_real(torch.fft.rfft(frames) if onesided else torch.fft.fft(frames))


def _window(size: Any, periodic: int, dtype: int, shares: tuple[float, ...]) -> Tensor:
    count = size[0]
    angle = torch.arange(count, dtype=torch.float64)
    angle = angle * (2 * math.pi / (count if periodic else count - 1))
    terms = [share * torch.cos(k * angle) for k, share in enumerate(shares)]
    return sum(terms[1:], terms[0]).to(DTYPES[dtype])


@operator("HannWindow", host=(0,))
def hann_window(size, *, output_datatype=1, periodic=1):
    return _window(size, periodic, output_datatype, (0.5, -0.5))


@operator("HammingWindow", host=(0,))
def hamming_window(size, *, output_datatype=1, periodic=1):
    return _window(size, periodic, output_datatype, (25 / 46, -21 / 46))


@operator("BlackmanWindow", host=(0,))
def blackman_window(size, *, output_datatype=1, periodic=1):
    return _window(size, periodic, output_datatype, (0.42, -0.5, 0.08))


@operator("MelWeightMatrix", host=(0, 1, 2, 3, 4))
def mel_weight_matrix(bins, length, rate, lowest, highest, *, output_datatype=1):
    count, spectrum = bins[0], length[0] // 2 + 1
    low, high = (2595 * math.log10(1 + f[0] / 700) for f in (lowest, highest))
    points = torch.arange(count + 2, dtype=torch.float64) * ((high - low) / (count + 2)) + low
    hertz = 700 * (10 ** (points / 2595) - 1)
    edges = torch.floor((length[0] + 1) * hertz / rate[0])
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    line = torch.arange(spectrum, dtype=torch.float64)[:, None]
    rising = torch.where(middle > left, (line - left) / (middle - left).clamp(min=1), 1.0)
    falling = (right - line) / (right - middle).clamp(min=1)
    up, down = (line >= left) & (line <= middle), (line >= middle) & (line < right)
    up = torch.where(middle > left, up, line == middle)
    made = torch.where(up, rising, torch.where(down, falling, 0.0))
    return made.to(DTYPES[output_datatype])
