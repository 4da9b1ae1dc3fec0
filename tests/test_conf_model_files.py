"""What can be seen to be wrong with a model's files before anything starts."""

import json

import pytest
import torch
from safetensors.torch import save_file

from apportion.actors.loading import load_causal_lm
from apportion.cli import compose_config, to_config
from apportion.conf import preference_schema
from apportion.conf.models import check_own_tokenizer, read_limits, read_model
from apportion.data.builtin import _build_tiny
from apportion.plan import make_plan
from apportion.platform.errors import ConfigError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    folder.mkdir()
    _build_tiny(folder)
    return folder


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model (264 tokens) that a test may spoil."""
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add_token(model, text, number=264):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    entry = {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}  # fmt: skip
    tokenizer["added_tokens"].append(entry)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def refusal(model, template=None):
    with pytest.raises(ConfigError) as error:
        check_own_tokenizer(str(model), "model.path", template)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_that_is_whole_is_accepted(model):
    check_own_tokenizer(str(model))
    edit(model / "config.json", vocab_size=320, pad_token_id=-1)  # embeddings are often padded
    check_own_tokenizer(str(model))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    check_own_tokenizer(str(model))


def test_a_token_without_an_embedding_is_refused_where_something_writes_it(model, tmp_path):
    add_token(model, "<|turn|>")
    check_own_tokenizer(str(model))  # nothing writes it, as in some published models
    template = tmp_path / "turns.jinja"
    template.write_text("{{ '<|turn|>' }}")
    assert refusal(model, str(template)) == (
        f"model.path: got {model}, whose tokenizer has 265 tokens and whose embeddings are 264 (its chat template writes "
        "'<|turn|>', id 264), expected an embedding for each token: resize the model (resize_token_embeddings(265)), or "
        "take that token out of the tokenizer"
    )
    template.write_text("{{ messages }}")
    check_own_tokenizer(str(model), chat_template=str(template))
    edit(model / "tokenizer_config.json", pad_token="<|turn|>")
    assert "(its padding token '<|turn|>' has id 264)" in refusal(model)


def test_a_token_that_the_tokenizer_puts_around_a_text_needs_an_embedding(model, tmp_path):
    add_token(model, "<|begin|>")
    single = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    edit(model / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": single})
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages }}")
    assert "(it puts around a text '<|begin|>', id 264)" in refusal(model, str(template))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"vocab": {"a": null}}}'),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}'),
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"pad_token": {"content": []}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(model, file, text):
    (model / file).write_text(text)
    assert "expected " in refusal(model)


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_a_role_whose_token_is_added_when_the_tokenizer_is_loaded_is_refused(model, role):
    edit(model / "tokenizer_config.json", **{role: {"content": "[NEW]", "special": True}})
    assert "whose tokenizer has 265 tokens and whose embeddings are 264 (its " in refusal(model)


def test_ordinary_tokens_beyond_the_embeddings_are_refused(model):
    edit(model / "config.json", vocab_size=200)
    edit(model / "config.json", eos_token_id=1, pad_token_id=0)
    assert "has 264 tokens and whose embeddings are 200 (ordinary text gives them)" in refusal(model)


@pytest.mark.parametrize(
    ("file", "name", "number"),
    [
        ("config.json", "eos_token_id", 264),
        ("config.json", "eos_token_id", -1),
        ("config.json", "pad_token_id", 300),
        ("generation_config.json", "eos_token_id", [1, 999]),
    ],
)
def test_an_id_outside_the_vocabulary_is_refused(model, file, name, number):
    edit(model / file, **{name: number})
    shown = number[-1] if isinstance(number, list) else number
    assert refusal(model) == (
        f"model.path: got {model}, whose {file} has {name} {shown}, outside the model's 264 embeddings, expected 0 to 263: "
        "correct it there"
    )


def spoil_end(file):
    file.write_bytes(file.read_bytes()[:-1000])


def spoil_header(file):
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(bytes(data))


def list_header(file):
    file.write_bytes((2).to_bytes(8, "little") + b"[]")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_end, "it is truncated, expected whole weights"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x" * 10), "it is damaged, expected whole weights"),
        (spoil_header, "whose header is damaged"),
        (list_header, "whose header is damaged"),
    ],
)
def test_weights_that_are_not_whole_are_refused_under_the_models_key(model, spoil, said):
    spoil(model / "model.safetensors")
    for read in (read_model, read_limits):
        with pytest.raises(ConfigError) as error:
            read(str(model), "critic.model")
        assert str(error.value).startswith(f"critic.model: got {model}/model.safetensors") and said in str(error.value)


def test_a_packed_checkpoint_that_is_truncated_is_refused(model):
    (model / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(100)}, model / "pytorch_model.bin")
    read_model(str(model))
    spoil_end(model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, which is truncated, expected whole weights"):
        read_model(str(model))


def test_shards_are_accepted_when_all_are_there(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    for number in (1, 2):
        save_file({f"w{number}": torch.zeros(2, 2)}, tmp_path / f"model-{number}-of-2.safetensors")
    index = {"weight_map": {"w1": "model-1-of-2.safetensors", "w2": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_limits(str(tmp_path)).vocabulary == 9
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"whose index names model-2-of-2\.safetensors, which is not there"):
        read_limits(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ConfigError, match=r"index\.json without a weight_map, expected an index of the weights"):
        read_limits(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"index\.json: not readable .* expected an index of the weights"):
        read_limits(str(tmp_path))
    (tmp_path / "model-1-of-2.safetensors").rename(tmp_path / "model.safetensors")
    assert read_limits(str(tmp_path)).vocabulary == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "got a list, expected a model's configuration, a mapping"),
        ("null", "got a NoneType, expected a model's configuration"),
        ("{", "not readable"),
        ('{"num_hidden_layers": -2}', "got num_hidden_layers -2, expected a whole number above 0"),
        ('{"vocab_size": 1e30}', "got vocab_size 1e+30, expected a whole number above 0"),
        (
            '{"num_hidden_layers": 1000000000000}',
            "got num_hidden_layers 1000000000000, expected a whole number of at most",
        ),
        ('{"max_position_embeddings": -1}', "got max_position_embeddings -1, expected a whole number above 0"),
        ('{"max_position_embeddings": [5]}', "got max_position_embeddings [5], expected a whole number above 0"),
        ('{"layer_types": 5}', "got layer_types 5, expected a list"),
        ('{"layer_types": [5]}', "got layer_types [5], expected a list of text"),
        ('{"sliding_window": "x"}', "got sliding_window 'x', expected a whole number"),
        ('{"num_attention_heads": 0}', "got num_attention_heads 0, expected a whole number above 0"),
        ("[" * 5000, "not readable (maximum recursion depth"),
        ('{"num_attention_heads": "many"}', "got num_attention_heads 'many', expected a whole number above 0"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_model(str(tmp_path))
    assert said in str(error.value) and str(error.value).startswith(f"{tmp_path}/config.json: ")


def config(model, *words, stage=None):
    return to_config(compose_config([*words, f"model.path={model}"], stage=stage))[0]


@pytest.mark.parametrize("key", ["model.path", "reference.model", "critic.model", "judge.model"])
def test_plan_looks_at_every_model_of_the_run(model, tiny, key):
    spoil_end(model / "model.safetensors")
    words = {
        "model.path": ["experiment=tiny_grpo"],
        "reference.model": ["experiment=tiny_ppo", "algorithm.kl.place=reward", "algorithm.kl.coefficient=0.1"],
        "critic.model": ["experiment=tiny_ppo"],
        "judge.model": ["experiment=tiny_grpo", "algorithm=capo", "judge.context_tokens=2048"],
    }[key]
    with pytest.raises(ConfigError, match=rf"^{key}: got .*truncated"):
        make_plan(config(tiny, *words, f"{key}={model}") if key != "model.path" else config(model, *words))


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_the_other_stages_refuse_a_tokenizer_that_is_too_large(model, stage):
    edit(model / "tokenizer_config.json", pad_token="[PAD]")
    with pytest.raises(ConfigError, match="its padding token '\\[PAD\\]' has id 264"):
        preference_schema.check(config(model, "data.train=rows.jsonl", stage=stage))


@pytest.mark.parametrize("name", ["n" * 256, "..", ".", "a/b", "a\0b", "a\nb"])
def test_a_run_name_that_no_file_system_takes_is_refused(model, name):
    made = config(model, "experiment=tiny_grpo")
    made.run_name = name
    with pytest.raises(ConfigError, match=r"^run_name: got "):
        make_plan(made)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_a_link_to_nothing_are_refused(model, name):
    (model / "model.safetensors").unlink()
    (model / name).symlink_to(model / "blobs" / "gone")
    with pytest.raises(ConfigError, match=rf"^model\.path: got .*{name}, a link to a file that is not there, expected"):
        read_model(str(model))


def test_a_missing_part_of_weights_in_the_older_format_is_refused_unless_there_are_safetensors(model):
    weights = {"weight_map": {"w1": "pytorch_model-00001-of-00002.bin", "w2": "pytorch_model-00002-of-00002.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(weights))
    assert read_model(str(model)).vocabulary == 264  # the index of a format that is not read
    (model / "model.safetensors").unlink()
    torch.save({"w1": torch.zeros(10)}, model / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ConfigError, match=r"whose index names pytorch_model-00002-of-00002\.bin, which is not there"):
        read_model(str(model))
    torch.save({"w2": torch.zeros(10)}, model / "pytorch_model-00002-of-00002.bin")
    assert read_model(str(model)).vocabulary == 264


def test_a_configuration_with_more_layers_than_the_weights_is_refused(model):
    edit(model / "config.json", num_hidden_layers=3)
    with pytest.raises(ConfigError) as error:
        read_limits(str(model), "critic.model")
    assert str(error.value) == (
        f"critic.model: got {model}, whose config.json has num_hidden_layers 3 and whose weights have 2 layers, expected as "
        "many: fetch both again"
    )
    edit(model / "config.json", num_hidden_layers=1)  # some weights have a layer more, for guesses
    assert read_limits(str(model)).vocabulary == 264


def test_a_configuration_with_sizes_of_each_layer_or_without_some_gives_no_facts_and_no_error(tmp_path):
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "vocab_size": 9,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    for changes in (
        {"hidden_size": None},
        {"intermediate_size": [8, 16]},
        {"num_key_value_heads": [1, 2]},
        {"head_dim": [4]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
        assert read_model(str(tmp_path)) is None
        assert read_limits(str(tmp_path)).vocabulary == 9


@pytest.mark.parametrize("text", ['{"weight_map": {"a": 5}}', '{"weight_map": []}', "[]", "[" * 5000])
def test_an_index_of_another_form_is_refused(model, text):
    (model / "model.safetensors").rename(model / "model-1-of-1.safetensors")
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json.* expected an index of the weights"):
        read_model(str(model))


def test_a_model_that_transformers_cannot_read_is_one_line_and_code_of_its_own_keeps_its_traceback(model):
    edit(model / "config.json", hidden_act="nothing")
    with pytest.raises(
        ConfigError, match=rf"^{model}: the model cannot be loaded \(KeyError: 'nothing'\), expected the whole"
    ):
        load_causal_lm(str(model), "float32")
    with pytest.raises(KeyError):
        load_causal_lm(str(model), "float32", trust_remote_code=True)
