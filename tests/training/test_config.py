"""Settings from TOML and the command line, and the three examples that come with the package."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from tabulate import tabulate

import ztsnr
from ztsnr.errors import UserError
from ztsnr.training.config import (
    DataSettings,
    FinetuneSettings,
    ModelSettings,
    OptimizerSettings,
    SourceSettings,
    StageSettings,
    TagWeightSettings,
)
from ztsnr.training.decoder.settings import VaeDecoderSettings
from ztsnr.training.networks import AdapterSettings
from ztsnr.training.objective import Objective
from ztsnr.training.ranges import bare, is_optional
from ztsnr.training.setting_names import all_names
from ztsnr.training.settings_file import parse_settings, read_settings, write_settings
from ztsnr.training.settings_list import explanations, list_settings

FOLDER = Path(ztsnr.__file__).parent / "training" / "examples"
DECODER = FOLDER / "decoder.toml"
EXAMPLES = sorted(set(FOLDER.glob("*.toml")) - {DECODER})
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
        ("batch_size", "batchsize", "has data.batchsize, which does not exist: did you mean data.batch_size?"),
        ("path =", "pth =", "has data.sources.0.pth, which does not exist: did you mean data.sources.0.path?"),
        ("[data]", "[dat]", "has dat, which does not exist: did you mean data?"),
        (
            "[data]",
            "[model.adapter]\nrnk = 3\n[data]",
            "has model.adapter.rnk, which does not exist: did you mean model.adapter.rank?",
        ),
        (
            "[model]",
            "stages = [{}, { qqq = 3 }]\n[model]",
            "has stages.1.qqq, which does not exist: choose from groups, steps, learning_rate",
        ),
        (
            "batch_size = 2",
            "captions = { shufle = true }",
            "has data.captions.shufle, which does not exist: did you mean",
        ),
        (
            "steps = 5",
            "learning_rate = 5",
            "has learning_rate, which does not exist: did you mean optimizer.lear",
        ),
        ("batch_size = 2\n", "", "lacks data.batch_size: set it to a whole number of at least 1"),
        ('out = "run"\n', "", "lacks out: set it to a path"),
        ('{ path = "pictures" }', "{}", "lacks data.sources.0.path: set it to a path"),
    ],
)
def test_names_that_do_not_exist_and_those_that_are_missing(read, old, new, sentence):
    assert old in SMALL
    assert refused(read, SMALL.replace(old, new)).startswith(sentence)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps = 5", "steps = 5.0", "steps must be a whole number of at least 1, not 5.0"),
        ("steps = 5", "steps = '5'", 'steps must be a whole number of at least 1, not "5"'),
        ("steps = 5", "steps = true", "steps must be a whole number of at least 1, not true"),
        ("steps = 5", "steps = 0", "steps must be a whole number of at least 1, not 0"),
        ("steps = 5", "steps = 2026-01-01", 'steps must be a whole number of at least 1, not "2026-01-01"'),
        ('"run"', "3", "out must be a path, not 3"),
        ('base = "model"', 'base = "model"\ntext_encoders = 1', "model.text_encoders must be true or false, not 1"),
        (
            'base = "model"',
            'base = "model"\ndtype = "half"',
            'model.dtype must be "bfloat16", "float16"',
        ),
        ('[{ path = "pictures" }]', '"pictures"', 'data.sources must be a list of paths or tables, not "pictures"'),
        ('[model]\nbase = "model"', 'model = "model"', 'model must be a table, not "model"'),
        ("[data]", "[optimizer]\nbetas = [0.9]\n[data]", "optimizer.betas must be a list of 2 numbers, not [0.9]"),
        ("[data]", "[optimizer]\nclip = '1'\n[data]", 'optimizer.clip must be a number of at least 0, not "1"'),
        ("[data]", "[optimizer]\nname = 'sgd'\n[data]", 'optimizer.name must be "adamw",'),
        (
            "[data]",
            "[objective]\nterminal_probability = 2\n[data]",
            "objective: terminal_probability must be at least 0 and less than 1, not 2.0",
        ),
        (
            "[data]",
            "[objective]\nprediction_type = 'epsilon'\nzero_terminal_snr = true\n[data]",
            "objective: an epsilon model cannot start from",
        ),
        ("batch_size = 2", "batch_size = 2\nlatents = 'l'\nflip = 0.5", "data.flip does not work with data.latents"),
        ("[model]", "stages = [{}, {}]\n[model]", "stages.0.steps is missing: only the last stage"),
        (
            "[data]",
            "[average]\nsigma_rel = []\n[export]\nraw = false\n[data]",
            "nothing would be exported: set average.sigma_rel",
        ),
        (
            "[data]",
            "[export]\nfolder = false\nsingle_file = false\n[data]",
            "nothing would be exported: turn export.single_file",
        ),
        (
            "batch_size = 2",
            "batch_size = 2\nmax_chunks = 0",
            "data.max_chunks must be a whole number of at least 1",
        ),
        ("batch_size = 2", "batch_size = 2\nstep = 0", "data.step must be a whole number of at least 1, not 0"),
        ("batch_size = 2", "batch_size = 2\nflip = 1.5", "data.flip must be a number from 0 to 1, not 1.5"),
        (
            "[data]",
            "[optimizer]\nlearning_rate = nan\n[data]",
            "optimizer.learning_rate must be a number of at least 0, not nan",
        ),
        ("[data]", "[optimizer]\nclip = -1.0\n[data]", "optimizer.clip must be a number of at least 0, not -1.0"),
        (
            "[data]",
            "[watch]\nvalidate_every = -1\n[data]",
            "watch.validate_every must be a whole number of",
        ),
        (
            "[data]",
            "[watch]\npreview_steps = 0\n[data]",
            "watch.preview_steps must be a whole number of",
        ),
        ("[data]", "[watch]\npreview_size = [20, 36]\n[data]", "watch.preview_size must be two multiples of 8, not ["),
        ("[model]", "stages = [{ groups = [] }]\n[model]", "stages.0.groups is empty: name the groups"),
        (
            "[model]",
            "stages = [{ steps = 0 }, {}]\n[model]",
            "stages.0.steps must be a whole number of at least 1",
        ),
        (
            "[data]",
            "[average]\non_cpu = true\n[speed]\nstrategy = 'fsdp'\n[data]",
            'average.on_cpu works only with speed.strategy = "ddp": "fsdp"',
        ),
        (
            "[data]",
            "text_encoders = true\nadapter = {}\n[export]\nfolder = false\nsingle_file = false\n[data]",
            "trained text encoders are exported only with a whole model",
        ),
        (
            "[data]",
            "[optimizer]\nschedule = 'rsqrt'\n[data]",
            'optimizer.schedule = "rsqrt" needs optimizer.ref',
        ),
        (
            "[data]",
            "[optimizer]\nschedule = 'cosine'\n[data]",
            'optimizer.schedule = "cosine" needs more steps than',
        ),
        ("batch_size = 2", "batch_size = 2\nmax_aspect_error = nan", "data.max_aspect_error must be a number"),
        ("[data]", "[average]\nsigma_rel = [0.05, 0.3]\n[data]", "average.sigma_rel.1 must be a number above 0 and at"),
        ("[data]", "[average]\ndecay = 1.0\n[data]", "average.decay must be a number between 0 and 1, not 1.0"),
    ],
)
def test_values_of_another_type_or_out_of_range(read, old, new, sentence):
    assert old in SMALL
    assert refused(read, SMALL.replace(old, new)).startswith(sentence)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_settings(FinetuneSettings, tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = = 3")
    with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML: .*line 1"):
        read_settings(FinetuneSettings, tmp_path / "broken.toml")
    (tmp_path / "picture.toml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.toml is not valid TOML"):
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
        (("--stages", "[{ steps = 3 }, {}]"), "stages", (StageSettings(steps=3), StageSettings())),
        (("--data.sources.0.weight", "2"), "data.sources.0.weight", 2.0),
        (("--data.sources", "a", "b"), "data.sources", (SourceSettings(Path("a")), SourceSettings(Path("b")))),
        (("--optimizer.betas.1", "0.9"), "optimizer.betas.1", 0.9),
        (("--optimizer.betas", "[0.8, 0.9]"), "optimizer.betas", (0.8, 0.9)),
        (("--seed", "-3"), "seed", -3),
        (("--watch.wandb=--odd",), "watch.wandb", "--odd"),
        (("--out", "2026-01-01"), "out", Path("2026-01-01")),
        (("--model.base", "3"), "model.base", "3"),
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
            "the command line has --optimizer.nam, which does not exist: did you mean --optimizer.name?",
        ),
        (("--model.adapter.rnk", "4"), "the command line has --model.adapter.rnk, which does not exist: did you mean"),
        (("--zzz", "4"), "the command line has --zzz, which does not exist"),
        (("--optimizer.learning-rate", "nan"), "optimizer.learning_rate must be a number of at least 0, not nan"),
        (
            ("--learning-rate", "1"),
            "the command line has --learning-rate, which does not exist: did you mean --opt",
        ),
        (
            ("--steps.x", "4"),
            "the command line has --steps.x, which does not exist: --list-settings prints",
        ),
        (
            ("--data.sources.1.weight", "2"),
            "--data.sources.1.weight: data.sources has 1 entry, numbered from 0; --da",
        ),
        (("--stages", "[{"), "--stages: [{ is not valid TOML"),
        (("4",), "4 does not belong to a setting: write --NAME VALUE"),
        (("--steps", "4", "5"), "--steps takes one value, not 2: a whole number of at least 1"),
        (("--steps", "many"), 'steps must be a whole number of at least 1, not "many"'),
        (("--steps", "none"), 'steps must be a whole number of at least 1, not "none"'),
        (("--steps",), "--steps needs a value: a whole number of at least 1"),
        (("--steps", "0"), "steps must be a whole number of at least 1, not 0"),
        (("--speed.compile", "perhaps"), 'speed.compile must be true or false, not "perhaps"'),
        (("--optimizer.name", "sgd"), 'optimizer.name must be "adamw",'),
        (("--optimizer.betas", "0.8"), "optimizer.betas must be a list of 2 numbers, not [0.8]"),
        (("--optimizer.betas", "1", "2", "3"), "optimizer.betas must be a list of 2 numbers, not [1, 2, 3]"),
        (
            ("--objective.prediction-type", "epsilon", "--objective.zero-terminal-snr", "true"),
            "objective: an epsilon model cannot start",
        ),
    ],
)
def test_mistakes_of_the_command_line(read, overrides, sentence):
    assert refused(read, SMALL, *overrides).startswith(sentence)


def test_overrides_of_a_plain_source(read):
    text = SMALL.replace('{ path = "pictures" }', '"pictures", "others"')
    sources = read(text, "--data.sources.1.weight", "3").data.sources
    assert sources == (SourceSettings(Path("pictures")), SourceSettings(Path("others"), weight=3.0))


def test_none_removes_a_table(read):
    assert read(SMALL + "[model.adapter]\nrank = 8\n", "--model.adapter", "none").model.adapter is None


# ----------------------------------------------------------------------------------------------------------------------
# The list


@pytest.mark.parametrize("kind", [FinetuneSettings, VaeDecoderSettings])
def test_every_setting_has_an_explanation(kind):
    lines = list(list_settings(kind))
    for place, hint in all_names(kind):
        optional_or_leaf = is_optional(hint) or not dataclasses.is_dataclass(bare(hint))
        if not optional_or_leaf:  # a table, which is a heading
            assert any(line.startswith(f"[{'.'.join(place)}]  ") for line in lines), place
            continue
        rows = [number for number, line in enumerate(lines) if line.startswith(f"{'.'.join(place)}  (")]
        assert len(rows) == 1, place
        explanation = lines[rows[0] + 1]
        assert re.match(r"    [^ ].*\w.*", explanation), place


def test_the_list_says_what_is_allowed_and_the_default():
    lines = list(list_settings(FinetuneSettings))
    assert "steps  (a whole number of at least 1; required)" in lines
    assert "optimizer.learning_rate  (a number of at least 0; default 1e-05)" in lines
    assert 'speed.strategy  ("ddp", "fsdp" or "hsdp"; default "ddp")' in lines
    assert "average.sigma_rel  (a list of numbers above 0 and at most 0.288675; default [0.05])" in lines
    assert "model.adapter  (a table; default none)" in lines


def test_the_list_of_a_file_says_its_values(read):
    settings = read(SMALL, "--data.sources", "a", "b", "--data.sources.1.weight", "3", "--steps", "7")
    lines = list(list_settings(FinetuneSettings, settings))
    assert "steps  (a whole number of at least 1; required; now 7)" in lines
    assert "data.sources.1.weight  (a number of at least 0; default 1.0; now 3.0)" in lines
    assert "model.adapter  (a table; default none; now none)" in lines


def test_explanations_of_several_settings_and_those_inherited():
    @dataclasses.dataclass
    class Outer:
        """First.

        Attributes:
            one: What it
                does.
            two, three: Together.

        Raises:
            four: Not a setting.
        """

        one: int
        two: int
        three: int

    @dataclasses.dataclass
    class Inner(Outer):
        """Second.

        Attributes:
            three: Its own.
        """

        four: int = 1

    assert explanations(Inner) == {"one": "What it does.", "two": "Together.", "three": "Its own."}


# ----------------------------------------------------------------------------------------------------------------------
# Settings made in Python


def test_values_are_checked_without_a_file():
    data = DataSettings((SourceSettings(Path("pictures")),), 2)
    with pytest.raises(UserError, match=r"optimizer\.clip must be a number of at least 0, not -1"):
        FinetuneSettings(ModelSettings("m"), data, Path("run"), 5, optimizer=OptimizerSettings(clip=-1))
    with pytest.raises(UserError, match=r"optimizer\.schedule must be"):
        FinetuneSettings(ModelSettings("m"), data, Path("run"), 5, optimizer=OptimizerSettings(schedule="linear"))


def test_a_bug_in_the_settings_is_not_told_as_a_mistake():
    @dataclasses.dataclass
    class Broken:
        """Broken."""

        one: int = 1

        def __post_init__(self):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug") as caught:
        parse_settings(Broken, {})
    assert type(caught.value) is ValueError


# ----------------------------------------------------------------------------------------------------------------------
# Written again, and the examples


def test_there_are_three_examples_and_one_for_a_decoder():
    assert [path.stem for path in EXAMPLES] == ["full_80gb", "lora_24gb", "two_nodes"]
    assert read_settings(VaeDecoderSettings, DECODER).steps == 20000


@pytest.mark.parametrize("path", [*EXAMPLES, DECODER], ids=lambda path: path.stem)
def test_lines_of_the_examples_can_be_uncommented(path):
    kind = VaeDecoderSettings if path == DECODER else FinetuneSettings
    text = re.sub(r"^# (\w+ = .*)$", r"\1", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    parse_settings(kind, tomllib.loads(text))


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
    for name, one in settings.items():
        stated = one.objective.prediction_type, one.objective.zero_terminal_snr
        # a LoRA takes them from its base
        assert stated == ((None, None) if name == "lora_24gb" else ("v_prediction", True))
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
