"""Which backend runs an op: by device, by wish, never silently."""

import dataclasses
import logging

import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import BackendError, Target
from pallas_kernels.paged_attention.shape import AttentionShape

SHAPE = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16", kv_dtype="bfloat16")
CPU, H200 = Target("cpu"), Target("gpu", "NVIDIA H200", (9, 0), 132)
OLD = Target("gpu", "Tesla V100", (7, 0), 80)


def backends(target, shape=SHAPE, **wishes):
    return dict(dispatch.choose(target, shape, **wishes).backends)


def test_cpu_runs_plain_jax_and_a_gpu_runs_triton_unless_told_otherwise():
    assert set(backends(CPU).values()) == {"reference"}
    assert set(backends(H200).values()) == {"triton"}
    assert backends(H200, attention="reference", sampling="reference", matmul="reference") == backends(CPU)
    assert backends(H200, attention="reference")["sampling"] == "triton"
    assert backends(H200, attention="reference")["kv_update"] == "reference"


def test_kernel_asked_for_on_cpu_runs_interpreted_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        chosen = backends(CPU, attention="triton", sampling="triton", matmul="triton")
    assert set(chosen.values()) == {"triton"}
    assert "paged_attention=triton" in caplog.text and "interpreted" in caplog.text


def test_choice_is_logged_by_op_and_device(caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        dispatch.choose(H200, SHAPE)
    assert (
        "kernels on NVIDIA H200: paged_attention=triton, kv_update=triton, sampling=triton, quant_matmul=triton"
        in caplog.text
    )


def test_gpu_that_triton_does_not_know_falls_back_with_a_warning_and_a_wish_for_it_is_refused(caplog):
    with caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        assert set(backends(OLD).values()) == {"reference"}
    assert "plain JAX" in caplog.text and "compute capability 7.0" in caplog.text
    with pytest.raises(BackendError, match="attention_backend=triton.*Tesla V100 has compute capability 7.0"):
        dispatch.choose(OLD, SHAPE, attention="triton")
    with pytest.raises(BackendError, match="sampling_backend=triton"):
        dispatch.choose(OLD, SHAPE, sampling="triton")


def test_float8_pool_on_a_gpu_that_converts_none_is_read_by_plain_jax(caplog):
    shape = dataclasses.replace(SHAPE, kv_dtype="float8_e4m3fn")
    assert backends(H200, shape)["paged_attention"] == "triton"
    with caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        assert backends(Target("gpu", "NVIDIA A100", (8, 0), 108), shape)["paged_attention"] == "reference"
    assert "float8" in caplog.text


def test_mosaic_runs_on_hopper_only_and_only_when_asked_for():
    assert backends(H200, attention="mosaic")["paged_attention"] == "mosaic"
    with pytest.raises(BackendError, match="is no Hopper GPU"):
        dispatch.choose(Target("gpu", "NVIDIA B200", (10, 0), 148), SHAPE, attention="mosaic")


def test_shape_a_backend_cannot_run_is_refused_with_the_reason():
    wide = AttentionShape(
        num_heads=8, num_kv_heads=8, head_dim=512, page_size=16, dtype="bfloat16", kv_dtype="bfloat16"
    )
    with pytest.raises(BackendError, match="attention_backend=triton cannot run here: .*512"):
        dispatch.choose(H200, wide, attention="triton")
    assert backends(H200, wide)["paged_attention"] == "reference"
