"""Loading follows transformers; encoding treats special text as it is told; faults are named."""

import json
import threading

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxserve.errors import (
    CorruptFileError,
    InvalidRequestError,
    ModelNotFoundError,
    TokenOutOfRangeError,
    UnsupportedModelError,
)
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["", "The quick brown fox", " äöü 你好 😀", "<|start|>inside<|end|>", "a\n\n b\t"]


@pytest.fixture
def directory(tmp_path, byte_level_backend):
    """A model directory as transformers writes it, less what each test adds."""
    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|end|>", "special": True}
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<|start|>", "eos_token": eos})
    return tmp_path


def write(directory, name, content):
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def transformers_tokenizer(directory):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(directory))


def test_ids_and_text_equal_those_of_transformers(directory):
    ours, theirs = load_tokenizer(directory), transformers_tokenizer(directory)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.special_ids == set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)


def test_default_model_equals_transformers_reading_the_same_gguf(default_model):
    assert default_model.decode(default_model.encode("Hello, world 你")) == "Hello, world 你"
    assert default_model.special_tokens["eos_token"] == "<|im_end|>"
    assert default_model.eos_token_id in default_model.special_ids
    assert "<|im_start|>" in default_model.chat_template


def test_named_templates_of_a_gguf_file_are_kept(default_model_metadata):
    metadata = default_model_metadata | {"tokenizer.chat_template.tool_use": "TOOLS"}
    tokenizer = load_tokenizer(metadata)
    assert tokenizer.chat_template == {
        "default": default_model_metadata["tokenizer.chat_template"],
        "tool_use": "TOOLS",
    }


def test_tokens_that_only_the_config_lists_are_added_as_by_transformers(directory, byte_level_backend):
    size = byte_level_backend.get_vocab_size()
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(size): {"content": "<|tool|>", "special": True, **flags},
        str(size + 1): {"content": "<think>", "special": False, **flags},
    }
    write(directory, "tokenizer_config.json", {"eos_token": "<|tool|>", "added_tokens_decoder": added})
    write(directory, "special_tokens_map.json", {"bos_token": "ignored, as by transformers"})
    ours, theirs = load_tokenizer(directory), transformers_tokenizer(directory)
    text = "a<|tool|>b<think>c"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_token_id == theirs.eos_token_id == size
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.decode(ours.encode(text)) == "ab<think>c"


def test_config_that_contradicts_tokenizer_json_is_refused(directory):
    write(directory, "tokenizer_config.json", {"added_tokens_decoder": {"9999": {"content": "<|new|>"}}})
    with pytest.raises(CorruptFileError, match=r"'<\|new\|>' the id 9999"):
        load_tokenizer(directory)


def test_special_tokens_map_and_model_specific_tokens_are_read(directory):
    write(directory, "tokenizer_config.json", {"image_token": "<|start|>", "add_bos_token": True})
    write(directory, "special_tokens_map.json", {"eos_token": {"content": "<|end|>", "lstrip": False}})
    assert load_tokenizer(directory).special_tokens == {"eos_token": "<|end|>", "image_token": "<|start|>"}


def test_named_special_token_that_is_an_ordinary_token_becomes_special(directory):
    write(directory, "tokenizer_config.json", {"eos_token": "a"})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token_id in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("bab")) == "bb"


def test_truncation_and_padding_of_the_file_are_ignored(directory, byte_level_backend):
    byte_level_backend.enable_truncation(2)
    byte_level_backend.enable_padding(length=50)
    byte_level_backend.save(str(directory / "tokenizer.json"))
    assert len(load_tokenizer(directory).encode("x" * 10, add_special_tokens=False)) == 10


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config.json": {"chat_template": "config"}, "chat_template.json": {"chat_template": "j"}}, "j"),
        ({"chat_template.json": {"chat_template": "json"}, "chat_template.jinja": "jinja"}, "jinja"),
        (
            {"chat_template.jinja": "jinja", "additional_chat_templates/tool_use.jinja": "tools"},
            {"default": "jinja", "tool_use": "tools"},
        ),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "d"}]}},
            {"default": "d"},
        ),
    ],
)
def test_chat_template_comes_from_the_most_specific_file(directory, files, expected):
    (directory / "additional_chat_templates").mkdir()
    for name, content in files.items():
        write(directory, name, content)
    assert load_tokenizer(directory).chat_template == expected
    if "chat_template.json" not in files:  # a file of processors, which this class of transformers does not read
        assert transformers_tokenizer(directory).chat_template == expected


def test_directory_without_tokenizer_names_itself_and_the_files_looked_for(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json.*tokenizer\.model") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ModelNotFoundError, match="absent"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}),
        ("tokenizer_config.json", {"eos_token": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("special_tokens_map.json", "nonsense"),
        ("chat_template.json", {}),
    ],
)
def test_malformed_file_is_a_one_line_error_with_its_path(directory, name, content):
    write(directory, name, content)
    with pytest.raises(CorruptFileError) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


def test_other_tokenizer_files_go_through_transformers(tmp_path, byte_level_backend, caplog):
    vocab_file, merges_file = byte_level_backend.model.save(str(tmp_path))
    assert vocab_file.endswith("vocab.json") and merges_file.endswith("merges.txt")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "bos_token": "<|start|>"}
    write(tmp_path, "tokenizer_config.json", config | {"unk_token": "<|end|>", "chat_template": "T"})
    with caplog.at_level("INFO", logger="jaxserve"):
        tokenizer = load_tokenizer(tmp_path)
    assert [record.getMessage() for record in caplog.records if "vocab.json" in record.getMessage()]
    text = "The quick brown fox 你好"
    assert tokenizer.encode(text) == byte_level_backend.encode(text).ids
    assert tokenizer.eos_token_id == byte_level_backend.token_to_id("<|end|>")
    assert tokenizer.chat_template == "T"


def test_files_transformers_cannot_read_are_refused_by_name(tmp_path):
    write(tmp_path, "tokenizer.model", "not a sentencepiece model")
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_special_text_is_plain_text_where_it_must_not_be_parsed(byte_level, default_model):
    for tokenizer in (byte_level, default_model):
        special = tokenizer.special_tokens["eos_token"]
        text = f"Ignore this {special}{special} and that"
        assert tokenizer.eos_token_id in tokenizer.encode(text)
        plain = tokenizer.encode(text, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(plain)
        assert tokenizer.decode(plain) == text
        assert tokenizer.eos_token_id in tokenizer.encode(text)  # the setting does not stick


def test_model_that_looks_up_whole_words_cannot_smuggle_special_tokens_in():
    from tokenizers.processors import TemplateProcessing

    vocab = {text: token for token, text in enumerate(["<unk>", "<s>", "h", "i", "<", "s", ">"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.encode_special_tokens = True
    assert backend.encode("<s>", add_special_tokens=False).ids == [1]  # the leak this test is about
    backend.encode_special_tokens = False
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "unk_token": "<unk>"})
    assert tokenizer.encode("hi <s>") == [1, 2, 3, 1]
    assert tokenizer.encode("hi <s>?", parse_special=False) == [1, 2, 3, 4, 5, 6, 0]
    assert tokenizer.encode("hi <s>", add_special_tokens=False, parse_special=False) == [2, 3, 4, 5, 6]


def test_add_special_tokens_adds_what_the_post_processor_says(byte_level_backend):
    from tokenizers.processors import TemplateProcessing

    bos = byte_level_backend.token_to_id("<|start|>")
    byte_level_backend.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", bos)])
    tokenizer = Tokenizer(byte_level_backend, {"bos_token": "<|start|>"})
    bare = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("fox") == tokenizer.encode("fox", parse_special=False) == [bos, *bare]


def test_parse_special_does_not_leak_between_threads(byte_level):
    wrong = []

    def encode(parse_special):
        for _ in range(200):
            ids = byte_level.encode("<|end|>", parse_special=parse_special)
            if (byte_level.eos_token_id in ids) != parse_special:
                wrong.append(ids)

    threads = [threading.Thread(target=encode, args=(parse_special,)) for parse_special in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", b"bytes", None])
def test_text_that_is_no_unicode_is_an_invalid_request(byte_level, text):
    for call in (lambda: byte_level.encode(text), lambda: byte_level.encode_batch(["fine", text])):
        with pytest.raises(InvalidRequestError, match="prompt") as caught:
            call()
        assert caught.value.field == "prompt"


def test_token_text_is_what_the_token_adds(byte_level, byte_fallback):
    ids = byte_level.encode("The quick fox<|end|>")
    assert "".join(byte_level.token_text(token) for token in ids) == "The quick fox<|end|>"
    assert byte_fallback.token_text(byte_fallback._backend.token_to_id("\u2581cat")) == " cat"
    assert byte_fallback.token_text(byte_fallback._backend.token_to_id("<0xE4>")) == "\ufffd"
    assert byte_level.token_text(10**6) == ""


@pytest.mark.parametrize("token", [-1, 2**32])
def test_impossible_token_id_is_an_invalid_request(byte_level, token):
    with pytest.raises(TokenOutOfRangeError, match=str(token)) as caught:
        byte_level.decode([5, token])
    assert caught.value.value == token
