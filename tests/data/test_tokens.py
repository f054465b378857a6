"""Chunks of tokens; and what is made of them, against diffusers and against each prompt alone."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ztsnr.data.tokens import batch_prompts, encode_prompts, token_chunks

from ..tiny_pipelines import make_tiny_sdxl

PAD = 0  # of SDXL's second encoder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return StableDiffusionXLPipeline.from_pretrained(make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl"))


@pytest.fixture(scope="module")
def tokenizer(sdxl):
    return sdxl.tokenizer


@pytest.fixture(scope="module")
def encoders(sdxl):
    return [sdxl.text_encoder, sdxl.text_encoder_2]


@pytest.fixture(scope="module")
def chunks_of(sdxl):
    def chunks(text):
        return [
            token_chunks(text, sdxl.tokenizer, sdxl.tokenizer.eos_token_id),
            token_chunks(text, sdxl.tokenizer_2, PAD),
        ]

    return chunks


# ----------------------------------------------------------------------------------------------------------------------
# Chunks


@settings(deadline=None)
@given(st.text("ab!( ", max_size=240))
def test_chunks_hold_the_text_in_order(tokenizer, text):
    chunks = token_chunks(text, tokenizer, PAD)
    words = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    length = sum(map(len, text.split()))
    assert len(words) == length
    assert chunks.dtype == torch.int64
    assert chunks.shape == (max(1, -(-length // 75)), 77)
    assert (chunks[:, 0] == tokenizer.bos_token_id).all()
    found = []
    for row in chunks.tolist():
        end = row.index(tokenizer.eos_token_id)
        assert set(row[end + 1 :]) <= {PAD}
        found += row[1:end]
    assert tokenizer.convert_ids_to_tokens(found) == words
    assert (chunks[:-1, 76] == tokenizer.eos_token_id).all()  # all but the last are full


@pytest.mark.parametrize(("length", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_the_number_of_chunks(tokenizer, length, chunks):
    assert len(token_chunks("a" * length, tokenizer, PAD)) == chunks


def test_an_exclamation_mark_is_not_padding(sdxl):
    """To the tokenizer that pads with it, it is."""
    text = "hello! !a"
    assert sdxl.tokenizer_2(text).input_ids != sdxl.tokenizer(text).input_ids
    first, second = token_chunks(text, sdxl.tokenizer, PAD), token_chunks(text, sdxl.tokenizer_2, PAD)
    assert torch.equal(first, second)
    assert first[0, 1:9].tolist() == sdxl.tokenizer(text, add_special_tokens=False).input_ids


def test_special_tokens_are_plain_text(tokenizer):
    row = token_chunks("a<|endoftext|>b", tokenizer, PAD)[0].tolist()
    assert row.index(tokenizer.eos_token_id) == 1 + len("a<|endoftext|>b")


def test_escaped_parentheses_are_parentheses(tokenizer):
    plain, escaped = r"a (b) :)", r"a \(b\) :\)"
    assert torch.equal(token_chunks(plain, tokenizer, PAD), token_chunks(escaped, tokenizer, PAD))
    assert not torch.equal(token_chunks(r"a \b", tokenizer, PAD), token_chunks("a b", tokenizer, PAD))


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def numbered(*lengths):
    """Prompts of two encoders, each chunk with a number of its own."""
    numbers = iter(range(sum(lengths)))
    chunks = [torch.tensor([[next(numbers)] * 77 for _ in range(length)]) for length in lengths]
    return [(chunk, 1000 + chunk) for chunk in chunks]


def test_a_batch_repeats_shorter_prompts():
    batch = batch_prompts(numbered(2, 1, 3))
    assert batch.rows.tolist() == [[0, 1, 0, 1, 0, 1], [2] * 6, [3, 4, 5, 3, 4, 5]]
    assert batch.chunks[0].tolist() == [[number] * 77 for number in range(6)]
    assert torch.equal(batch.chunks[1], 1000 + batch.chunks[0])
    assert batch_prompts(numbered(2, 2)).rows.tolist() == [[0, 1], [2, 3]]


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        batch_prompts([])
    (first, _), (second, _) = numbered(1, 2)
    with pytest.raises(ValueError, match=r"\[1, 2\] chunks of one prompt"):
        batch_prompts([(first, second)])


def test_a_prompt_means_in_a_batch_what_it_means_alone(sdxl, encoders, chunks_of):
    """The U-Net's answer is the same; with padding by empty chunks it is not."""
    torch.manual_seed(0)
    prompts = [chunks_of(text) for text in ("a cat", "b" * 76, "c, " * 76, "")]
    latents, time_ids = torch.randn(4, 4, 8, 8), torch.rand(4, 6)

    def answers(batch, which):
        with torch.no_grad():
            hidden, pooled = encode_prompts(batch, encoders)
            added = {"text_embeds": pooled, "time_ids": time_ids[which]}
            return sdxl.unet(latents[which], 500, hidden, added_cond_kwargs=added).sample

    together = answers(batch_prompts(prompts), slice(None))
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(together[i : i + 1], answers(batch_prompts([prompt]), slice(i, i + 1)))

    empty = chunks_of("")
    padded = [torch.cat([text, nothing]) for text, nothing in zip(prompts[0], empty, strict=True)]
    wrong = answers(batch_prompts([padded]), slice(0, 1))
    assert (wrong - together[:1]).abs().max() > 1e-4 * together[:1].abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# Encoding

SHORT = ["a cat, (sitting) on a mat", "", "x" * 75]


def test_sdxl_as_in_diffusers(sdxl, encoders, chunks_of):
    expected, _, expected_pooled, _ = sdxl.encode_prompt(SHORT, device="cpu", do_classifier_free_guidance=False)
    hidden, pooled = encode_prompts(batch_prompts([chunks_of(text) for text in SHORT]), encoders)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_stable_diffusion_as_in_diffusers(sdxl, tokenizer):
    """SD 1.x and 2.x: one encoder, the last hidden state that it has, behind the final norm."""
    pipeline = StableDiffusionPipeline(
        vae=sdxl.vae,
        text_encoder=sdxl.text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            norm_num_groups=4,
            attention_head_dim=4,
            layers_per_block=1,
            cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        scheduler=sdxl.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    expected, _ = pipeline.encode_prompt(SHORT, "cpu", 1, do_classifier_free_guidance=False)
    batch = batch_prompts([[token_chunks(text, tokenizer, tokenizer.eos_token_id)] for text in SHORT])
    hidden, pooled = encode_prompts(batch, [sdxl.text_encoder])
    torch.testing.assert_close(hidden, expected)
    assert pooled is None


def test_long_prompts_are_their_chunks_one_behind_the_other(encoders, chunks_of):
    """Each chunk as a prompt of its own; pooled is that of the first."""
    letters = "abcdefghij" * 16
    pieces = [letters[:75], letters[75:150], letters[150:]]
    # a letter at the end of a word is another token, hence the words end with the pieces
    whole, parts = chunks_of(" ".join(pieces)), [chunks_of(piece) for piece in pieces]
    hidden, pooled = encode_prompts(batch_prompts([whole]), encoders)
    separate, separate_pooled = encode_prompts(batch_prompts(parts), encoders)
    assert hidden.shape == (1, 3 * 77, 40)
    torch.testing.assert_close(hidden[0], separate.flatten(0, 1))
    torch.testing.assert_close(pooled[0], separate_pooled[0])


def test_gradients_flow_into_the_encoders(encoders, chunks_of):
    hidden, pooled = encode_prompts(batch_prompts([chunks_of("a"), chunks_of("b" * 80)]), encoders)
    (hidden.square().sum() + pooled.square().sum()).backward()
    for encoder in encoders:
        assert encoder.get_input_embeddings().weight.grad.abs().sum() > 0
        encoder.zero_grad()
    with torch.no_grad():
        assert not encode_prompts(batch_prompts([chunks_of("a")]), encoders)[0].requires_grad
