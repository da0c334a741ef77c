"""How a configuration is put together, what is refused, and that what is written is what is read."""

import logging
from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from unrote.config import (
    METHODS,
    PARTS,
    Config,
    changed_keys,
    fields_of,
    load_config,
    merge,
    parse,
    parse_assignment,
    preset_names,
    preset_values,
    read_yaml,
)
from unrote.config.sections import CONFIG_VERSION
from unrote.errors import InputError


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_later_ones_win(tmp_path):
    """Defaults < preset < file < method < overrides."""
    assert Config().training.batch_size == 64
    assert load_config(preset="cifar10").training.batch_size == 128
    file = write(tmp_path, "preset: cifar10\nmethod: agc\ntraining: {batch_size: 7, epochs: 3}\n")
    config = load_config(file=file)
    assert (config.preset, config.method) == ("cifar10", "agc")
    assert (config.training.batch_size, config.training.epochs) == (7, 3)
    assert config.training.ema_decay == 0.9999, "the preset's, which the file does not set"
    assert config.training.adam_beta1 == 0.9, "the default, which neither sets"
    config = load_config(file=file, method="standard", preset="tiny", overrides={"training.batch_size": 9})
    assert (config.preset, config.method, config.training.batch_size) == ("tiny", "standard", 9)
    assert config.training.epochs == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_parts(method):
    config = load_config(method=method)
    assert tuple(part for part in PARTS if getattr(config, part).enabled) == METHODS[method]
    assert (config.num_shards > 1) == ("iet" in method)
    assert (config.skip_ratio > 0) == ("gate" in METHODS[method])


def test_what_a_method_sets_wins_over_a_preset_and_not_over_the_user(tmp_path):
    gate = load_config(method="gap", preset="cifar10").gate
    assert (gate.skip_ratio, gate.reference, gate.signal, gate.bank.bins) == (0.8, 0.125, "history", 20)
    file = write(tmp_path, "method: gap\ngate: {reference: 0.2}\n")
    gate = load_config(file=file, overrides={"gate.skip_ratio": 0.9}).gate
    assert (gate.skip_ratio, gate.reference, gate.signal) == (0.9, 0.2, "history")
    assert load_config(preset="cifar10").gate.reference == 0
    more = load_config(method="gap+", overrides={"augmentation.ops.flip": False})
    assert (more.gate.reference, more.skip_ratio) == (0.125, 0.7)
    assert more.augmentation.labels and more.augmentation.ops.shift == 0.125 and not more.augmentation.ops.flip


def test_a_part_that_the_file_or_an_override_sets_itself_stays(tmp_path):
    file = write(tmp_path, "augmentation: {enabled: false}\n")
    assert not load_config(method="iet-agc+", file=file).augmentation.enabled
    assert load_config(method="standard", overrides={"gate.enabled": True}).skip_ratio > 0


def test_an_empty_section_of_a_file_sets_nothing(tmp_path):
    file = write(tmp_path, "preset: demo\ntraining:\ngate:\n  # skip_ratio: 0.3\n")
    assert load_config(file=file).gate == load_config(preset="demo").gate
    assert load_config(file=file).training == load_config(preset="demo").training


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", "2.0e-4"])
def test_numbers_as_people_write_them(tmp_path, text):
    """YAML 1.1 takes 2e-4 for a string."""
    file = write(tmp_path, f"training: {{learning_rate: {text}}}\n")
    assert load_config(file=file).training.learning_rate == 2e-4
    key, value = parse_assignment(f"training.learning_rate={text}")
    assert load_config(overrides={key: value}).training.learning_rate == 2e-4


def test_assignments():
    assert parse_assignment("model.block_out_channels=[32, 64]") == ("model.block_out_channels", [32, 64])
    assert parse_assignment("gate.bank.bins=null") == ("gate.bank.bins", None)
    assert parse_assignment("data.source=a=b") == ("data.source", "a=b")
    assert parse_assignment(" gate.enabled = yes") == ("gate.enabled", True)
    with pytest.raises(InputError, match="key=value"):
        parse_assignment("gate.enabled")
    with pytest.raises(InputError, match=r"--set model\.block"):
        parse_assignment("model.block_out_channels=[32")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_with_every_method_and_survives_its_run_folder(preset, method, tmp_path):
    config = load_config(preset=preset, method=method)
    path = write(tmp_path, config.to_yaml())
    assert parse(read_yaml(path), str(path)) == config
    assert load_config(file=path) == config, "a run's config.yaml given as --config is the same run"


def test_the_method_is_what_is_said_or_the_preset_names_or_depends_on_the_model(tmp_path):
    own, tuned = {}, {"model.pretrained": "somebody/model"}
    assert [load_config(overrides=values).method for values in (own, tuned)] == ["gap+", "iet-agc+"]
    assert load_config(preset="laion-10k").method == "iet-agc+", "it names a model"
    assert load_config(preset="cifar10").method == "iet-agc+"
    assert load_config(preset="cifar10", method="agc").method == "agc"
    (tmp_path / "run.yaml").write_text("method: iet\npreset: cifar10\n")
    assert load_config(file=tmp_path / "run.yaml").method == "iet"
    scans = load_config(preset="medical-grey")
    assert (scans.method, scans.augmentation.labels, scans.gate.skip_ratio) == ("gap+", True, 0.7)
    assert (scans.augmentation.ops.shift, scans.augmentation.ops.flip) == (0.03, False), "the preset knows the images"


def test_a_file_that_thinks_of_another_default_is_told(tmp_path, caplog):
    file = tmp_path / "run.yaml"
    file.write_text("ensemble: {num_shards: 4}\n")
    with caplog.at_level(logging.WARNING, "unrote"):
        load_config(file=file, method="standard")
        assert caplog.text == "", "the same file serves several methods"
        load_config(file=file)
    assert "ensemble.num_shards is ignored: method gap+ does not enable ensemble" in caplog.text


def test_presets_set_only_known_keys_and_are_all_listed():
    files = [entry.name for entry in (resources.files("unrote") / "presets").iterdir()]
    assert sorted(f"{name}.yaml" for name in preset_names()) == sorted(files)
    known = {row[0] for row in fields_of()}
    for name in preset_names():
        assert set(leaves(preset_values(name))) <= known


@given(
    st.builds(
        dict,
        epochs=st.floats(1e-9, 1e9),
        learning_rate=st.floats(1e-12, 10),
        adam_epsilon=st.floats(1e-30, 1),
        use_ema=st.booleans(),
        max_grad_norm=st.floats(0, 1e6),
    ),
    st.text(min_size=1, max_size=30),
)
def test_any_values_survive_yaml(training, source):
    config = parse({"training": training, "data": {"source": source}}, "test")
    assert parse(yaml.safe_load(config.to_yaml()), "test") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gate.skip_rato": 1}, r"no key 'gate\.skip_rato' \(did you mean 'gate\.skip_ratio'\?\)"),
        ({"gate.bank.bin": 1}, r"did you mean 'gate\.bank\.bins'"),
        ({"trainning.epochs": 1}, r"did you mean 'training'"),
        ({"sed": 1}, r"did you mean 'seed'"),
        ({"training.epochs": 0}, r"training\.epochs: .*greater than 0, not 0"),
        ({"training.epochs": "many"}, r"training\.epochs: .*not 'many'"),
        ({"training.optimizer": "sgd"}, r"training\.optimizer: .*'adam' or 'adamw'"),
        ({"training": 3}, "training: is a section of settings, not a value"),
        ({"gate": True}, "gate: is a section of settings, not a value"),
        ({"training.epochs.many": 1}, r"training\.epochs"),
        ({"model.block_out_channels": [33]}, "multiple of 32"),
        ({"model.attention_levels": [3]}, "there are 3 levels, 0 to 2"),
        ({"gate.bank.bins": 1001}, "at most 1000"),
        ({"redistribution.enabled": True, "ensemble.enabled": True, "ensemble.num_shards": 1}, "num_shards > 1"),
        ({"redistribution.enabled": True}, "enable ensemble"),
        ({"redistribution.enabled": True, "ensemble.enabled": True, "gate.enabled": False}, "enable gate"),
        ({"method": "agc"}, "--method"),
        ({"preset": "tiny"}, "--preset"),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gaet: {skip_ratio: 0.3}", r"run\.yaml: there is no key 'gaet' \(did you mean 'gate'\?\)"),
        ("model: text", r"run\.yaml: model: is a section of settings"),
        ("a: " + "[" * 3000, r"run\.yaml: can't be read as YAML"),
        ("at: 2026-13-45", r"run\.yaml: can't be read as YAML"),
        ("gate: true", r"run\.yaml: gate: is a section of settings"),
        ("gate: false", r"run\.yaml: gate: is a section of settings"),
        ("gate: [1, 2]", r"run\.yaml: gate: is a section of settings"),
        ("gate: 3", r"run\.yaml: gate: is a section of settings"),
        ("method: iet-agcc", r"no method 'iet-agcc' \(did you mean"),
        ("method: 3", "no method 3"),
        ("method: [agc]", "no method"),
        ("preset: cifar", r"no preset 'cifar' \(did you mean 'cifar10'\?\)"),
        ("preset: 10", "no preset 10"),
        ("- a\n- b", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: [", "can't be read as YAML"),
        ("!!python/object/apply:os.system [echo]", "can't be read as YAML"),
    ],
)
def test_a_wrong_file_is_named_with_the_way_out(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_config(file=write(tmp_path, text))


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="can't be read"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputError, match="can't be read"):
        read_yaml(tmp_path / "binary.yaml")


def test_a_setting_that_has_no_effect_is_said(caplog):
    with caplog.at_level(logging.WARNING, "unrote"):
        load_config(method="standard", overrides={"gate.bank.decay": 0.5, "training.epochs": 2})
    assert [record.getMessage() for record in caplog.records] == [
        "gate.bank.decay is ignored: method standard does not enable gate"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "unrote"):
        load_config(method="agc", overrides={"gate.bank.decay": 0.5})
        load_config(method="standard", overrides={"gate.enabled": True, "gate.skip_ratio": 0.3})
    assert not caplog.records


def test_fields_of_covers_every_leaf_with_a_description():
    rows = fields_of()
    assert [name for name, *_ in rows] == list(leaves(Config().model_dump()))
    assert all(description for *_, description in rows)
    for name, kind, default, _ in rows:
        value = Config()
        for part in name.split("."):
            value = getattr(value, part)
        assert default == value
        assert not isinstance(value, BaseModel)
        assert kind


def test_changed_keys_are_named_with_both_values():
    old = load_config(overrides={"gate.bank.bins": None, "training.epochs": 100})
    assert changed_keys(old, old) == []
    new = load_config(overrides={"gate.bank.bins": 50, "training.epochs": 3})
    assert changed_keys(old, new) == ["training.epochs: 100.0 -> 3.0", "gate.bank.bins: None -> 50"]


nested = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=12)
mappings = st.dictionaries(st.sampled_from("abc"), nested)


@given(mappings, mappings)
def test_merge_takes_over_what_is_set_and_keeps_the_rest(base, over):
    merged = merge(base, over)
    assert merge(merged, over) == merged
    assert merge(base, {}) == base
    assert merge({}, over) == over
    for key in {*base, *over}:
        both = [side[key] for side in (base, over) if key in side]
        if len(both) == 2 and all(isinstance(value, dict) for value in both):
            assert merged[key] == merge(*both)
        else:
            assert merged[key] == both[-1]


def test_a_configuration_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3


def test_files_have_a_version(tmp_path):
    """One without it is of the first; a newer one is refused; it is no setting."""
    config = load_config()
    written = yaml.safe_load(config.to_yaml())
    assert written.pop("version") == CONFIG_VERSION == 1
    assert parse(written, "an older file") == config
    assert load_config(file=write(tmp_path, "version: 1\nseed: 3")).seed == 3
    with pytest.raises(InputError, match=r"run\.yaml: has version 2, this unrote knows 1 and .*pip install --upgrade"):
        load_config(file=write(tmp_path, "version: 2\nseed: 3"))
    for wrong in ("0", "yes", "1.5", "one", "[1]"):
        with pytest.raises(InputError, match="version must be a whole number"):
            load_config(file=write(tmp_path, f"version: {wrong}"))
    assert "version" not in {row[0] for row in fields_of()}
