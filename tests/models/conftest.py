"""Tiny random Hugging Face models and a dense stand-in for the attention kernels: an independent truth."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import decoder
from pallas_kernels.backend import REFERENCE
from pallas_kernels.dispatch import Kernels
from pallas_kernels.storage import KVPool

PAGE_SIZE = 4


def _dense_update(kv, qkv, cos, sin, kv_slots, *, page_offset):
    def write(pool, values):
        flat = pool.reshape(-1, *pool.shape[2:])
        return flat.at[kv_slots + page_offset * PAGE_SIZE].set(values).reshape(pool.shape)

    half, (first, second) = cos.shape[-1], jnp.split(qkv[:, :, :-1], 2, axis=-1)
    assert first.shape[-1] == half
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(qkv.dtype)
    q = turned[:, :, :-1].reshape(len(qkv), -1, 2 * half)
    return q, dataclasses.replace(kv, k=write(kv.k, turned[:, :, -1]), v=write(kv.v, qkv[:, :, -1]))


def _dense_attend(q, kv, plan, *, page_offset, scale, window, soft_cap):
    """One sequence: plan = (slots of all its tokens, positions of the queries); causality hides the unwritten slots."""
    assert soft_cap == 0.0
    slots, positions = plan
    group = q.shape[1] // kv.k.shape[2]
    keys, values = (
        jnp.repeat(pool.reshape(-1, *pool.shape[2:])[slots + page_offset * PAGE_SIZE], group, axis=1)
        for pool in (kv.k, kv.v)
    )
    scores = jnp.einsum("qhd,khd->hqk", q, keys, precision="highest") * scale
    distance = positions[:, None] - jnp.arange(len(slots))
    visible = (distance >= 0) & (distance < window if window else True)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, values, precision="highest")


DENSE = Kernels(
    prepare_attention=lambda *_: None,
    attend=_dense_attend,
    update_kv=_dense_update,
    sample=lambda *_: None,
    matmul=REFERENCE,
    backends=(),
)


def _decoder_logits(params, config, token_ids, *, chunk=None, max_model_len=128, kernels=DENSE):
    """f32[T, V] of one sequence computed `chunk` tokens a call (None = all at once), its pages in shuffled order."""
    length = len(token_ids)
    chunk = chunk or length
    pages = 1 + np.random.default_rng(0).permutation(-(-length // PAGE_SIZE))
    num_pages = len(pages) + 1
    slots = jnp.asarray((pages[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)).reshape(-1)[:length], jnp.int32)
    pool_shape = (config.num_layers * num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim)
    pool, no_scale = jnp.zeros(pool_shape, params.embed.dtype), jnp.zeros((*pool_shape[:2], 0))
    kv = KVPool(pool, pool, no_scale, no_scale)

    @jax.jit
    def step(params, ids, positions, kv_slots, plan, kv):
        hidden, kv = decoder.forward(
            params,
            config,
            kernels,
            token_ids=ids,
            positions=positions,
            kv_slots=kv_slots,
            attention=plan,
            kv=kv,
            max_model_len=max_model_len,
        )
        return decoder.logits(params, config, hidden), kv

    rows = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        positions = jnp.arange(start, end, dtype=jnp.int32)
        if kernels is DENSE:
            plan = (slots, positions)
        else:
            plan = kernels.prepare_attention(
                jnp.asarray(pages, jnp.int32)[None],
                jnp.asarray([0, end - start], jnp.int32),
                jnp.asarray([end], jnp.int32),
                positions,
                jnp.zeros(end - start, jnp.int32),
            )
        ids = jnp.asarray(token_ids[start:end], jnp.int32)
        logits, kv = step(params, ids, positions, slots[start:end], plan, kv)
        rows.append(np.asarray(logits))
    return np.concatenate(rows)


def _save_tiny(hf_config, directory: Path, *, seed=0, **save_options):
    """A torch model of `hf_config`, every parameter random (biases and norms too), saved; returned for its logits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.3)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5 * 1.5)
    model.save_pretrained(directory, **save_options)
    return model


@pytest.fixture
def tiny():
    """save(hf_config, directory) -> torch model; logits(params, config, token_ids) -> f32[T, V]; torch_logits(...)."""

    def torch_logits(model, token_ids):
        import torch

        with torch.no_grad():
            return model(torch.tensor([token_ids])).logits[0].numpy()

    return SimpleNamespace(save=_save_tiny, logits=_decoder_logits, torch_logits=torch_logits, page_size=PAGE_SIZE)
