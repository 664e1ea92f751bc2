"""Backends of attention, by name. Their results are the same within rounding; a backend refuses what it cannot do.

auto        triton for float16 and bfloat16 on CUDA and in Triton's interpreter, else reference
triton      our kernels, on CUDA or in the interpreter. float32 runs without tensor cores, slowly, and compiles slowly
flash       FlashAttention 2 (Dao 2023, https://arxiv.org/abs/2307.08691), on CUDA in float16 or bfloat16, without shared
            prefixes: torch's own, or the package flash-attn's if torch was built without it
flex        torch's FlexAttention (Dong et al. 2024, https://arxiv.org/abs/2412.05496): compiled on CUDA, forward only on a CPU
reference   eager, anywhere

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import functools
import importlib.util
import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention.choice import Backend
from kernels.attention.work import UNBOUNDED, AttentionWork
from kernels.launch import INTERPRETED, runs_triton


def chosen(backend: Backend, query_THE: Tensor, work: AttentionWork) -> Literal["triton", "flash", "flex", "reference"]:
    """The backend that `backend` names for these tensors.

    Raises: ValueError for a backend that cannot compute this.
    """
    if backend == "auto":
        return "triton" if runs_triton(query_THE) and (INTERPRETED or query_THE.itemsize == 2) else "reference"
    gradients = torch.is_grad_enabled() and query_THE.requires_grad
    prefixes = any(prefix >= 0 for *_, prefix in work.segments)
    problem = cannot(backend, query_THE.device, query_THE.dtype, gradients=gradients, prefixes=prefixes)
    if problem:
        raise ValueError(problem)
    return backend


def cannot(backend: Backend, device: torch.device, dtype: torch.dtype, *, gradients: bool, prefixes: bool) -> str | None:
    """Why a backend cannot compute attention (with gradients, with shared prefixes); None if it can."""
    cuda = device.type == "cuda"
    problem = None
    if backend == "triton" and (dtype == torch.float64 or not (cuda or INTERPRETED)):
        problem = "needs float32, float16 or bfloat16 on CUDA, or Triton's interpreter"
    elif backend == "flash" and not (cuda and dtype in (torch.float16, torch.bfloat16)):
        problem = "needs float16 or bfloat16 on CUDA"
    elif backend == "flash" and not (torch.backends.cuda.is_flash_attention_available() or _has_package()):
        problem = "needs a torch built with FlashAttention, or the package flash-attn 2.6 or newer"
    elif backend == "flash" and prefixes:
        problem = "cannot share prefixes"
    elif backend == "flex" and gradients and not cuda:
        problem = "has no gradients on a CPU"
    given = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    return f"attention backend {backend} {problem}; given {given}: choose another" if problem else None


def flash_attention(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork) -> tuple[Tensor, Tensor]:
    """(output [T, H, E], log-sum-exp [H, T]) by FlashAttention."""
    places = work.segments[-1][1] if work.segments else 0
    padding = query_THE.shape[0] - places
    if not places:
        return query_THE * 0, query_THE.new_full((query_THE.shape[1], padding), float("-inf"), dtype=torch.float32)
    bounds, longest = work.once("flash", query_THE.device, _bounds)
    # FlashAttention counts the places to the left: one less than the window.
    left = -1 if work.window == UNBOUNDED else work.window - 1
    out_THE, log_sum_exp_HT = _flash()(query_THE[:places], key_TKE[:places], value_TKE[:places], bounds, longest, left)
    if padding:
        out_THE = torch.cat((out_THE, query_THE[places:] * 0))
        log_sum_exp_HT = torch.nn.functional.pad(log_sum_exp_HT, (0, padding), value=float("-inf"))
    return out_THE, log_sum_exp_HT.detach()


def _bounds(work: AttentionWork, device: torch.device) -> tuple[Tensor, int]:
    bounds = torch.tensor([0, *(end for _, end, _ in work.segments)], dtype=torch.int32)
    return bounds.to(device), int(bounds.diff().max())


@functools.cache
def _has_package() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash() -> Any:
    """function(query, key, value, bounds, longest, places to the left) -> (output, log-sum-exp)."""
    return _of_package() if _has_package() and not torch.backends.cuda.is_flash_attention_available() else _of_torch()


@functools.cache
def _of_package() -> Any:
    from flash_attn import flash_attn_varlen_func

    def function(query_THE, key_TKE, value_TKE, bounds, longest, left):
        out_THE, log_sum_exp_HT, _ = flash_attn_varlen_func(
            query_THE,
            key_TKE,
            value_TKE,
            bounds,
            bounds,
            longest,
            longest,
            causal=True,
            window_size=(left, 0),
            deterministic=True,
            return_attn_probs=True,
        )
        if log_sum_exp_HT.ndim != 2:
            raise ValueError("flash-attn before 2.6 returns log-sum-exps of padded documents: install a newer version")
        return out_THE, log_sum_exp_HT

    return function


@functools.cache
def _of_torch() -> Any:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    known = inspect.signature(varlen_attn).parameters

    def public(query_THE, key_TKE, value_TKE, bounds, longest, left):
        return varlen_attn(
            query_THE,
            key_TKE,
            value_TKE,
            bounds,
            bounds,
            longest,
            longest,
            window_size=(left, 0),
            enable_gqa=query_THE.shape[1] != key_TKE.shape[1],
            return_aux=AuxRequest(lse=True),
        )

    def inner(query_THE, key_TKE, value_TKE, bounds, longest, left):
        """The operator inside varlen_attn, for versions of torch whose varlen_attn has no window yet."""
        return torch.ops.aten._flash_attention_forward(
            query_THE,
            key_TKE,
            value_TKE,
            bounds,
            bounds,
            longest,
            longest,
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            window_size_left=left,
            window_size_right=0,
        )[:2]

    return public if {"window_size", "enable_gqa"} <= set(known) else inner


def flex_attention(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork) -> tuple[Tensor, Tensor]:
    """(output [T, H, E], log-sum-exp [H, T]) by FlexAttention."""
    if not query_THE.shape[0]:
        return query_THE * 0, query_THE.new_empty((query_THE.shape[1], 0), dtype=torch.float32)
    from torch.nn.attention.flex_attention import AuxRequest

    mask = work.once("flex", query_THE.device, _block_mask)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_THE, key_TKE, value_TKE))
    out, aux = _flex(query_THE.is_cuda)[0](query, key, value, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].detach()


def _block_mask(work: AttentionWork, device: torch.device) -> Any:
    """The mask by segments and by places in the text, where a segment continues its prefix."""
    segment_T = torch.full((work.tokens,), -1, dtype=torch.int32)
    prefix_T = torch.full((work.tokens,), -2, dtype=torch.int32)
    place_T = torch.arange(work.tokens, dtype=torch.int32)
    for number, (start, end, prefix) in enumerate(work.segments):
        segment_T[start:end] = number
        prefix_T[start:end] = prefix if prefix >= 0 else -2
        # A segment's places continue its prefix's.
        if prefix >= 0:
            place_T[start:end] -= start - work.segments[prefix][1]
    segment_T, prefix_T, place_T = segment_T.to(device), prefix_T.to(device), place_T.to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = place_T[query] - place_T[key]
        related = (segment_T[query] == segment_T[key]) | (prefix_T[query] == segment_T[key])
        return related & (segment_T[key] >= 0) & (distance >= 0) & (distance < work.window)

    return _flex(device.type == "cuda")[1](visible, None, None, work.tokens, work.tokens, device=device)


@functools.cache
def _flex(cuda: bool) -> tuple[Any, Any]:
    """(flex_attention, create_block_mask), compiled for CUDA: uncompiled they hold all pairs in memory."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return (torch.compile(flex_attention), torch.compile(create_block_mask)) if cuda else (flex_attention, create_block_mask)
