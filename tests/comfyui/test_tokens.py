"""Captions become the tokens, and these the conditioning, that ComfyUI makes of the prompt that says the same."""

import json
import os
import random
import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ztsnr.data.tokens import batch_prompts, encode_prompts, token_chunks

pytestmark = pytest.mark.comfyui

END = 49407
# What runs in ComfyUI's own interpreter
INSIDE = """
import json, sys
request = json.load(sys.stdin)
sys.path.insert(0, request["comfyui"])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import torch
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from safetensors.torch import load_file, save_file

tokenizer = SDXLTokenizer()
prompts = [tokenizer.tokenize_with_weights(prompt) for prompt in request["prompts"]]
assert all(weight == 1 for prompt in prompts for chunks in prompt.values() for chunk in chunks for _, weight in chunk)
tokens = [{name: [[token for token, _ in chunk] for chunk in chunks] for name, chunks in prompt.items()}
          for prompt in prompts]
json.dump(tokens, open(request["tokens"], "w"))

model = SDXLClipModel(model_options={f"clip_{name}_model_config": request["config"][name] for name in "lg"})
for name in "lg":
    state = load_file(request["weights"][name])
    lacks = getattr(model, "clip_" + name).transformer.load_state_dict(state, strict=False)
    assert not lacks.unexpected_keys and set(lacks.missing_keys) <= {"text_projection.weight"}, lacks
with torch.no_grad():
    encoded = [model.encode_token_weights(prompt) for prompt in prompts[:request["encode"]]]
save_file({f"{i} {what}": tensor.contiguous() for i, pair in enumerate(encoded)
           for what, tensor in zip(("hidden", "pooled"), pair)}, request["conditioning"])
"""

WORD = "photograph"  # one token
NASTY = [
    "",
    " ",
    "\n\t ",
    "!",
    "!!! wow! !",
    "?!?! :) ;( ^_^ >:( @_@ o_o =3 \\m/ \\o/ 0w0",
    "1girl, solo, hatsune miku (vocaloid), long hair",
    r"1girl, solo, hatsune miku \(vocaloid\), long hair",
    r"\(^o^)/, \\(mixed\\), (escaped\), \(half)",
    "a (very:1.2) (((nested))) caption (with: numbers:1.5) ((",
    ")( )) :) (:",
    "[brackets], {braces}, <lora:nothing:1>, |pipes|, a:b::c",
    "BREAK red BREAK blue AND green",
    "line one\nline two\r\nline three\n\n\nline four",
    ",,,, , ,a,,b,",
    "long_hair blue_eyes __wildcard__",
    "don't can't it's I'll we've you're he'd I'm 'quoted' ''",
    "ÀÉÎÕÜ naïve café Ångström ﬁ ﬂ Ⅷ ①",
    "e\u0301 cafe\u0301 n\u0303",
    "初音ミク, 長い髪, 東方Project, ﾊﾝｶｸ, ＦＵＬＬ　ＷＩＤＴＨ",  # noqa: RUF001
    "привет мир, שלום עולם, مرحبا بالعالم, สวัสดี, 안녕하세요",
    "😀🎨👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈👍🏽❤️",
    "zero\u200bwidth, no\u00a0break, soft\u00adhyphen, \ufeffmark, ideographic\u3000space",
    "tab\tbell\x07 escape\x1b delete\x7f next\x85line",
    "x" * 40,
    "x" * 500,
    "supercalifragilisticexpialidocious " * 30,
    "漢" * 100,
    "😀" * 60,
    "0123456789" * 20,
    "3.14159 1,000,000 2023-11-24 12:30 50% #1 $5 a&b c/d e+f",
    *(" ".join([WORD] * count) for count in (1, 7, 8, 74, 75, 76, 77, 149, 150, 151, 225, 226, 300)),
    # a long word over the edge of a chunk
    *(" ".join([WORD] * count + ["llanfairpwllgwyngyllgogerychwyrndrobwll", "end"]) for count in range(66, 76, 2)),
    *(" ".join([WORD] * count + ["(brackets)", "end"]) for count in range(70, 76)),
]


def random_captions(count):
    draw = random.Random(0)
    tags = [tag for caption in NASTY for tag in caption.split(",") if len(tag) < 60]
    blocks = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x2000, 0x27BF), (0x3040, 0x30FF)]
    blocks += [(0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]

    def characters():
        block = draw.choice(blocks)
        return "".join(chr(draw.randint(*block)) for _ in range(draw.randint(1, 12)))

    for _ in range(count):
        parts = [draw.choice((lambda: draw.choice(tags), characters))() for _ in range(draw.randint(1, 40))]
        yield draw.choice((", ", ",", " ", "\n")).join(parts)


CAPTIONS = [*NASTY, *random_captions(400)]
ENCODED = len(NASTY)


def as_prompt(caption):
    """The caption as a ComfyUI user types it: its parentheses escaped, unless they are."""
    return re.sub(r"(?<!\\)[()]", r"\\\g<0>", caption)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def encoders():
    """Two small random encoders with CLIP's vocabulary."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        configs = [
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=2,
                projection_dim=width,
                hidden_act=activation,
                eos_token_id=END,
                initializer_factor=5.0,
            )
            for width, activation in ((16, "quick_gelu"), (24, "gelu"))
        ]
        return [CLIPTextModel(configs[0]).eval(), CLIPTextModelWithProjection(configs[1]).eval()]


@pytest.fixture(scope="module")
def comfyui(comfyui_path, comfyui_python, folder, encoders):
    """What ComfyUI makes of the captions: tokens, and tensors for the first of them."""
    request = {
        "comfyui": str(comfyui_path),
        "prompts": [as_prompt(caption) for caption in CAPTIONS],
        "encode": ENCODED,
        "tokens": str(folder / "tokens.json"),
        "conditioning": str(folder / "conditioning.safetensors"),
        "weights": {name: str(folder / f"{name}.safetensors") for name in "lg"},
        "config": {
            name: {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
            | {"num_hidden_layers": 3}
            for name, width in (("l", 16), ("g", 24))
        },
    }
    for name, encoder in zip("lg", encoders, strict=True):
        # transformers of some versions leave "text_model." away
        state = {
            key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor.contiguous()
            for key, tensor in encoder.state_dict().items()
            if not key.endswith("position_ids")
        }
        save_file(state, request["weights"][name])
    run = subprocess.run(
        [comfyui_python, "-c", INSIDE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "tokens.json").read_text()), load_file(request["conditioning"])


@pytest.fixture(scope="module")
def tokenizers(comfyui_path):
    """Those of SDXL as diffusers loads them: the second one pads with "!"."""
    files = comfyui_path / "comfy" / "sd1_tokenizer"
    return [CLIPTokenizer.from_pretrained(files, model_max_length=77, pad_token=pad) for pad in ("<|endoftext|>", "!")]


def test_token_for_token(comfyui, tokenizers):
    tokens, _ = comfyui
    lengths = set()
    for caption, theirs in zip(CAPTIONS, tokens, strict=True):
        for tokenizer, pad, name in zip(tokenizers, (END, 0), "lg", strict=True):
            for text in (caption, as_prompt(caption)):
                assert token_chunks(text, tokenizer, pad).tolist() == theirs[name], (name, text)
        lengths.add(len(theirs["l"]))
    assert lengths >= {1, 2, 3, 4}


def test_prompts_of_one_word_a_token_are_what_they_seem(comfyui):
    """That the captions at the edge of a chunk are at the edge."""
    tokens, _ = comfyui
    for count, chunks in ((75, 1), (76, 2), (150, 2), (151, 3), (225, 3), (226, 4)):
        assert len(tokens[CAPTIONS.index(" ".join([WORD] * count))]["l"]) == chunks


def test_number_for_number(comfyui, tokenizers, encoders):
    """A text as ComfyUI encodes it alone, and as we encode it in a batch of all lengths, where it is repeated."""
    _, conditioning = comfyui
    prompts = [
        [token_chunks(caption, tokenizer, pad) for tokenizer, pad in zip(tokenizers, (END, 0), strict=True)]
        for caption in CAPTIONS[:ENCODED]
    ]
    chosen = [i for i, prompt in enumerate(prompts) if len(prompt[0]) <= 4]
    with torch.no_grad():
        hidden, pooled = encode_prompts(batch_prompts([prompts[i] for i in chosen]), encoders)
    assert hidden.shape == (len(chosen), 12 * 77, 40)
    for row, i in enumerate(chosen):
        alone = conditioning[f"{i} hidden"]
        torch.testing.assert_close(hidden[row], alone[0].repeat(12 * 77 // alone.shape[1], 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled[row], conditioning[f"{i} pooled"][0], rtol=1e-4, atol=1e-4)
    assert hidden.std() > 0.1
