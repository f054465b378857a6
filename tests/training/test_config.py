"""Settings from TOML and the command line, and the three examples that come with the package."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from tabulate import tabulate

import ztsnr
from ztsnr.training.config import FinetuneSettings, StageSettings, TagWeightSettings
from ztsnr.training.networks import AdapterSettings
from ztsnr.training.objective import Objective
from ztsnr.training.settings_file import parse_settings, read_settings, write_settings

EXAMPLES = sorted((Path(ztsnr.__file__).parent / "training" / "examples").glob("*.toml"))
SMALL = """
out = "run"
steps = 5
[model]
base = "model"
[data]
batch_size = 2
sources = [{ path = "pictures" }]
"""


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        return read_settings(FinetuneSettings, path, overrides)

    return read


def refused(read, text, *overrides):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the sentence is what is compared)
        read(text, *overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.split("settings.toml")[-1].removeprefix(": ").strip()


# ----------------------------------------------------------------------------------------------------------------------
# The file


def test_types_become_those_of_the_settings(read):
    text = SMALL.replace("[model]", 'stages = [{ groups = ["up", "mid"], steps = 3 }, {}]\n[model]')
    settings = read(
        text + "[optimizer]\nbetas = [0.5, 1]\n[model.adapter]\nkind = 'lokr'\n[data.captions]\nkept_tags = 2\n"
    )
    assert settings.out == Path("run")
    assert settings.data.sources[0].path == Path("pictures")  # as written: relative to where the program is started
    assert settings.optimizer.betas == (0.5, 1.0)
    assert settings.stages == (StageSettings(("up", "mid"), 3), StageSettings(("all",)))
    assert settings.model.adapter == AdapterSettings("lokr")
    assert settings.data.captions.kept_tags == 2
    assert settings.data.captions.shuffle  # what a table does not say has its default
    assert settings.data.captions.caption_dropout == 0.1


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps =", "stepps =", "has stepps, which does not exist: did you mean steps?"),
        ("batch_size", "batchsize", "has data.batchsize, which does not exist: did you mean batch_size?"),
        ("path =", "pth =", "has data.sources.0.pth, which does not exist: did you mean path?"),
        ("[data]", "[dat]", "has dat, which does not exist: did you mean data?"),
        (
            "[data]",
            "[model.adapter]\nrnk = 3\n[data]",
            "has model.adapter.rnk, which does not exist: did you mean rank?",
        ),
        (
            "[model]",
            "stages = [{}, { qqq = 3 }]\n[model]",
            "has stages.1.qqq, which does not exist; there are groups, steps, learning_rate",
        ),
        (
            "batch_size = 2",
            "captions = { shufle = true }",
            "has data.captions.shufle, which does not exist: did you mean",
        ),
        ("batch_size = 2\n", "", "lacks data.batch_size"),
        ('out = "run"\n', "", "lacks out"),
        ('{ path = "pictures" }', "{}", "lacks data.sources.0.path"),
    ],
)
def test_names_that_do_not_exist_and_those_that_are_missing(read, old, new, sentence):
    assert old in SMALL
    assert refused(read, SMALL.replace(old, new)).startswith(sentence)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps = 5", "steps = 5.0", "steps: Input should be a valid integer"),
        ("steps = 5", "steps = '5'", "steps: Input should be a valid integer"),
        ("steps = 5", "steps = true", "steps: Input should be a valid integer"),
        ("steps = 5", "steps = 0", "steps must be at least 1, not 0"),
        ("steps = 5", "steps = 2026-01-01", "steps: Input should be a valid integer"),
        ('"run"', "3", "out: Input should be a valid string"),
        ('base = "model"', 'base = "model"\ntext_encoders = 1', "model.text_encoders: Input should be a valid boolean"),
        ('base = "model"', 'base = "model"\ndtype = "half"', "model.dtype: Input should be 'bfloat16', 'float16' or"),
        ('[{ path = "pictures" }]', '"pictures"', "data.sources: Input should be a valid array"),
        ('[model]\nbase = "model"', 'model = "model"', "model: Input should be an object"),
        ("[data]", "[optimizer]\nbetas = [0.9]\n[data]", "lacks optimizer.betas.1"),
        ("[data]", "[optimizer]\nclip = '1'\n[data]", "optimizer.clip: Input should be a valid number"),
        ("[data]", "[optimizer]\nname = 'sgd'\n[data]", "optimizer.name: Input should be 'adamw',"),
        (
            "[data]",
            "[objective]\nterminal_probability = 2\n[data]",
            "objective: terminal_probability must be at least 0 and less than 1, not 2.0",
        ),
        ("[data]", "[objective]\nprediction_type = 'epsilon'\n[data]", "objective: an epsilon model cannot start from"),
        ("batch_size = 2", "batch_size = 2\nlatents = 'l'\nflip = 0.5", "data.flip does not work with cached latents"),
        ("[model]", "stages = [{}, {}]\n[model]", "all stages but the last need a number of steps"),
        (
            "[data]",
            "[average]\nsigma_rel = []\n[export]\nraw = false\n[data]",
            "nothing would be exported: there is no",
        ),
        (
            "[data]",
            "[export]\nfolder = false\nsingle_file = false\n[data]",
            "nothing would be exported: export.single_",
        ),
        ("batch_size = 2", "batch_size = 2\nmax_chunks = 0", "data.max_chunks must be at least 1, not 0"),
        ("batch_size = 2", "batch_size = 2\nstep = 0", "data.step must be at least 1, not 0"),
        ("batch_size = 2", "batch_size = 2\nflip = 1.5", "data.flip must be from 0 to 1, not 1.5"),
        ("[data]", "[optimizer]\nlearning_rate = nan\n[data]", "optimizer.learning_rate must be at least 0, not nan"),
        ("[data]", "[optimizer]\nclip = -1.0\n[data]", "optimizer.clip must be at least 0, not -1.0"),
        ("[data]", "[watch]\nvalidate_every = -1\n[data]", "watch.validate_every must be at least 0, not -1"),
        ("[data]", "[watch]\npreview_steps = 0\n[data]", "watch.preview_steps must be at least 1, not 0"),
        ("[data]", "[watch]\npreview_size = [20, 36]\n[data]", "watch.preview_size must be two multiples of 8, not ["),
        ("[model]", "stages = [{ groups = [] }]\n[model]", "stages.0.groups is empty: name what is trained"),
        ("[model]", "stages = [{ steps = 0 }, {}]\n[model]", "stages.0.steps must be at least 1, not 0"),
        (
            "[data]",
            "[average]\non_cpu = true\n[speed]\nstrategy = 'fsdp'\n[data]",
            'average.on_cpu does not work with speed.strategy = "fsdp"',
        ),
        (
            "[data]",
            "text_encoders = true\nadapter = {}\n[export]\nfolder = false\nsingle_file = false\n[data]",
            "the adapter is of the U-Net alone",
        ),
        ("[data]", "[optimizer]\nschedule = 'rsqrt'\n[data]", "the schedule rsqrt needs optimizer.reference_steps"),
    ],
)
def test_values_of_another_type_or_out_of_range(read, old, new, sentence):
    assert old in SMALL
    assert refused(read, SMALL.replace(old, new)).startswith(sentence)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_settings(FinetuneSettings, tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = = 3")
    with pytest.raises(ValueError, match=r"broken\.toml is no TOML: .*line 1"):
        read_settings(FinetuneSettings, tmp_path / "broken.toml")
    (tmp_path / "picture.toml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.toml is no TOML"):
        read_settings(FinetuneSettings, tmp_path / "picture.toml")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("overrides", "place", "value"),
    [
        (("--steps", "7"), "steps", 7),
        (("--optimizer.learning-rate", "2e-6"), "optimizer.learning_rate", 2e-6),
        (("--optimizer.learning_rate", "2e-6"), "optimizer.learning_rate", 2e-6),
        (("--optimizer.betas", "0.8", "0.9"), "optimizer.betas", (0.8, 0.9)),
        (("--objective.zero-terminal-snr", "False"), "objective.zero_terminal_snr", False),
        (("--model.text-encoders", "True"), "model.text_encoders", True),
        (("--speed.compile", "True"), "speed.compile", True),
        (("--speed.compile", "None"), "speed.compile", None),
        (("--optimizer.name", "adafactor"), "optimizer.name", "adafactor"),
        (("--watch.preview-size", "64", "32"), "watch.preview_size", (64, 32)),
        (("--watch.preview-size", "None"), "watch.preview_size", None),
        (("--watch.prompts", "a cat", "a dog, night"), "watch.prompts", ("a cat", "a dog, night")),
        (("--average.sigma-rel",), "average.sigma_rel", ()),
        (("--data.buckets", "novelai", "1024x1024"), "data.buckets", ("novelai", "1024x1024")),
        (("--data.sources.0.path", "others"), "data.sources.0.path", Path("others")),
        (("--data.latents", "cache/of/it"), "data.latents", Path("cache/of/it")),
        (("--data.captions.caption-weights", "1", "2"), "data.captions.caption_weights", (1.0, 2.0)),
        (("--stages.0.learning-rate", "0.5"), "stages.0.learning_rate", 0.5),
    ],
)
def test_overrides(read, overrides, place, value):
    before, found = read(SMALL), read(SMALL, *overrides)
    changed = found
    for name in place.split("."):
        changed = changed[int(name)] if name.isdigit() else getattr(changed, name)
    assert changed == value
    # nothing else has changed
    first, second = (_flat(dataclasses.asdict(settings)) for settings in (before, found))
    differing = {name for name in first.keys() | second.keys() if first.get(name, ...) != second.get(name, ...)}
    assert all(name == place or name.startswith(place + ".") for name in differing)


def _flat(value, place=""):
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else None
    if children is None:
        return {place: value}
    return {k: v for name, child in children for k, v in _flat(child, f"{place}.{name}".lstrip(".")).items()}


def test_overrides_of_a_table_that_the_file_has(read):
    text = SMALL + "[model.adapter]\nkind = 'lora'\nrank = 8\n"
    assert read(text, "--model.adapter.rank", "4").model.adapter == AdapterSettings("lora", 4)


def test_overrides_of_a_table_that_the_file_does_not_have(read):
    """Its other settings have their defaults; and nothing else appears."""
    settings = read(SMALL, "--model.adapter.rank", "4", "--steps", "7")
    assert settings.model.adapter == AdapterSettings(rank=4)
    assert settings.steps == 7
    assert settings.data.tag_weights is None
    assert read(SMALL, "--data.tag_weights.power=0.3").data.tag_weights == TagWeightSettings(power=0.3)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("--optimizer.nam", "adamw"),
            "the command line has --optimizer.nam, which does not exist: did you mean --opt",
        ),
        (("--model.adapter.rnk", "4"), "the command line has --model.adapter.rnk, which does not exist: did you mean"),
        (("--zzz", "4"), "the command line has --zzz, which does not exist"),
        (("--optimizer.learning-rate", "nan"), "optimizer.learning_rate must be at least 0, not nan"),
        (("--steps", "many"), "--steps: invalid literal for int"),
        (("--steps",), "Missing value for argument '--steps'"),
        (("--steps", "0"), "steps must be at least 1, not 0"),
        (("--optimizer.name", "sgd"), "invalid choice 'sgd' for argument '--optimizer.name'. Expected one of ('adamw'"),
        (("--optimizer.betas", "0.8"), "Missing value for argument '--optimizer.betas'"),
        (("--objective.prediction-type", "epsilon"), "objective: an epsilon model cannot start"),
    ],
)
def test_mistakes_of_the_command_line(read, overrides, sentence):
    assert refused(read, SMALL, *overrides).startswith(sentence)


def test_help_lists_every_setting_with_its_meaning(read, capsys):
    with pytest.raises(SystemExit):
        read(SMALL, "--help")
    text = capsys.readouterr().out
    for name in (
        "--steps INT",
        "--objective.high-noise-share FLOAT",
        "--data.captions.caption-dropout",
        "--stages.0.steps",
        "--model.adapter.rank INT",
        "--data.tag-weights.power",
    ):
        assert name in text
    assert "share of the loss at t >= 900" in " ".join(text.replace("│", " ").split())


# ----------------------------------------------------------------------------------------------------------------------
# Written again, and the examples


def test_there_are_three_examples():
    assert [path.stem for path in EXAMPLES] == ["full_80gb", "lora_24gb", "two_nodes"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_settings_that_are_written_are_those_that_were_read(path, tmp_path):
    settings = read_settings(FinetuneSettings, path, ("--optimizer.learning-rate", "1.2345678901234567e-7"))
    written = tmp_path / "config.toml"
    written.write_bytes(write_settings(settings))
    assert read_settings(FinetuneSettings, written) == settings
    assert settings.optimizer.learning_rate == 1.2345678901234567e-7
    # all that was left to the defaults is in it
    assert "timesteps_scale" in tomllib.loads(written.read_text())["objective"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_state_the_share_of_high_noise_that_their_tables_have(path):
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    stated = content["objective"]["high_noise_share"]
    objective = Objective(read_settings(FinetuneSettings, path).objective)
    rows = objective.rows()
    weights = {t: probability * weight for t, _, probability, weight, _ in rows}
    share = sum(weight for t, weight in weights.items() if t >= 900) / sum(weights.values())
    assert share == pytest.approx(stated, abs=1e-9), tabulate(rows[900:])
    assert f"t >= 900 has {stated:.2%} of the loss" in objective.table()


def test_what_the_examples_are_for():
    settings = {path.stem: read_settings(FinetuneSettings, path) for path in EXAMPLES}
    for one in settings.values():
        assert one.objective.prediction_type == "v_prediction"
        assert one.objective.zero_terminal_snr
        assert one.data.captions.caption_dropout > 0
    assert settings["lora_24gb"].model.adapter is not None
    assert [stage.groups for stage in settings["full_80gb"].stages] == [("up",), ("all",)]
    assert settings["full_80gb"].stages[0].learning_rate < 1
    assert settings["two_nodes"].speed.strategy == "hsdp"
    assert settings["two_nodes"].data.batch_size % 8 == 0
    assert not settings["two_nodes"].average.on_cpu  # which shares of weights cannot be


def test_settings_of_a_table_without_a_file():
    settings = parse_settings(FinetuneSettings, tomllib.loads(SMALL))
    assert settings.steps == 5
    with pytest.raises(ValueError, match="the configuration lacks"):
        parse_settings(FinetuneSettings, {})
