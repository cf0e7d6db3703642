"""Settings: flat names into sections, every bad value named where it is made."""

import dataclasses
import math
from pathlib import Path

import pytest

from jaxserve.config import CacheOptions, CompileOptions, EngineConfig, KernelOptions, ModelOptions, SchedulerOptions
from jaxserve.errors import ConfigError

SECTIONS = {
    "model": ModelOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "kernels": KernelOptions,
    "compile": CompileOptions,
}
WHOLE = {
    "max_model_len": 2,
    "kv_cache_memory_bytes": 1,
    "num_pages": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_logprobs": 0,
    "compile_threads": 1,
}
CHOICES = {
    "load_format": ("auto", "safetensors", "gguf", "dummy"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "generation_config": ("auto", "none"),
    "page_size": (8, 16, 32, 64),
    "kv_cache_dtype": ("auto", "fp8"),
    "scheduling_policy": ("fcfs", "priority"),
    "overlap": (0, 1),
    "attention_backend": ("auto", "reference", "triton", "mosaic"),
    "sampling_backend": ("auto", "reference", "triton"),
    "matmul_backend": ("auto", "reference", "triton"),
    "quantization": ("none", "int8", "fp8", "int4"),
}
BAD = [
    *((name, low - 1) for name, low in WHOLE.items()),
    *((name, value) for name in WHOLE for value in (True, 64.0, "64", math.nan)),
    ("max_logprobs", None),
    *((name, value) for name in CHOICES for value in ("none such", None, True, 3, 8.0, 1.0, ["auto"])),
    *(("memory_utilization", value) for value in (0, 0.0, -0.1, 1.01, math.nan, math.inf, "0.9", None, True)),
    ("enable_prefix_caching", "no"),
    ("enable_prefix_caching", 1),
    ("show_progress", "no"),
    ("seed", -1),
    ("seed", "x"),
    ("seed", True),
    ("seed", 1.5),
    ("model", 5),
    ("tokenizer", 5),
    ("compilation_cache_dir", 5),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options(**{name: value})
    assert f"{name}={value!r}" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_accepted_and_a_wrong_one_is_told_them_all(name):
    for value in CHOICES[name]:
        EngineConfig.from_options(**{name: value})
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options(**{name: "none such"})
    assert all(str(choice) in str(caught.value) for choice in CHOICES[name])


@pytest.mark.parametrize(("name", "low"), WHOLE.items())
def test_smallest_whole_number_is_accepted_and_a_smaller_one_is_told_it(name, low):
    EngineConfig.from_options(**{name: low})
    with pytest.raises(ConfigError, match=f"at least {low}"):
        EngineConfig.from_options(**{name: low - 1})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("max_model_length", "max_model_len"),
        ("max_num_sequences", "max_num_seqs"),
        ("pagesize", "page_size"),
        ("gpu_memory_utilization", "memory_utilization"),
        ("sed", "seed"),
    ],
)
def test_unknown_option_is_refused_with_the_nearest_name(typo, meant):
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options(**{typo: 1})
    assert f"unknown option {typo}=1" in str(caught.value) and f"did you mean {meant}?" in str(caught.value)


def test_unknown_option_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ConfigError, match="unknown option zzzz=1$"):
        EngineConfig.from_options(zzzz=1)


def test_a_section_is_no_option():
    with pytest.raises(ConfigError, match="unknown option cache="):
        EngineConfig.from_options(cache=CacheOptions())


def test_every_field_of_every_section_is_an_option_that_lands_in_its_section():
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            config = EngineConfig.from_options(**{field.name: field.default})
            assert getattr(getattr(config, name), field.name) == field.default


def test_no_two_sections_share_a_name():
    names = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    assert len(names) == len(set(names)) and not {"seed", "show_progress"} & set(names)


def test_values_land_in_their_sections():
    config = EngineConfig.from_options(model="m", page_size=32, max_num_seqs=3, compile_threads=2, seed=5)
    assert (config.model.model, config.cache.page_size) == ("m", 32)
    assert (config.scheduler.max_num_seqs, config.compile.compile_threads, config.seed) == (3, 2, 5)
    assert EngineConfig.from_options() == EngineConfig()


def test_settings_are_frozen():
    config = EngineConfig()
    for part in (config, config.model, config.cache, config.scheduler, config.compile):
        for field in dataclasses.fields(part):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, None)


def test_pool_sized_twice_is_refused_with_both_sizes():
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes=4096.*num_pages=7"):
        CacheOptions(kv_cache_memory_bytes=4096, num_pages=7)


def test_fewer_tokens_than_sequences_are_refused_with_both():
    SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=8)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=7.*max_num_seqs=8"):
        SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=7)


def test_compilation_cache_is_where_it_was_put_else_in_the_users_cache(tmp_path, monkeypatch):
    assert CompileOptions(compilation_cache_dir=str(tmp_path)).cache_dir == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CompileOptions().cache_dir == tmp_path / ".cache" / "jaxserve" / "xla"
    assert CompileOptions(compilation_cache_dir="~/x").cache_dir == tmp_path / "x"
    assert isinstance(CompileOptions().cache_dir, Path)
