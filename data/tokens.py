r"""Prompts of any length as chunks of tokens, and their encoding by CLIP's text encoders.

CLIP reads 77 tokens.  A longer text is cut after every 75 tokens; each chunk gets its own begin and end token and is
encoded separately, and the results are concatenated (CLIP context concatenation: NovelAI Diffusion V3, arXiv
2409.15997).  The chunks equal ComfyUI's token for token (0.3.64 to 0.33), so a model is trained on the tokens that it
is prompted with there.

A caption is plain text; ComfyUI's prompts have a syntax.  The captions ``a (b)`` and ``a \(b\)`` both train the tokens
of the prompt ``a \(b\)``: an escaped parenthesis loses its backslash in captions, as it does in prompts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from .captions import unescape

CHUNK = 77
TEXT = CHUNK - 2  # tokens of text in a chunk


class TokenBatch(NamedTuple):
    """The prompts of a batch.

    Attributes:
        chunks: for each text encoder, (N, 77) int64: the chunks of all prompts in order.
        rows: (B, L) int64: the numbers of the chunks that make up each prompt.
    """

    chunks: tuple[torch.Tensor, ...]
    rows: torch.Tensor


def token_chunks(text: str, tokenizer, pad: int) -> torch.Tensor:
    """The tokens of a text.

    Args:
        text: plain text, as ``caption_text`` returns it; an empty one gives one chunk without text.
        tokenizer: transformers' CLIPTokenizer.  Special tokens in the text are read as plain text.  (The tokenizers of
            SDXL's second encoder and of SD 2.x pad with "!", and would take every "!" for padding, unlike ComfyUI.)
        pad: token that fills the last chunk after its end token: ``tokenizer.eos_token_id`` for SD 1.x and SDXL's first
            encoder, 0 for SD 2.x and SDXL's second encoder.

    Returns:
        (chunks, 77) int64; to train on shorter prompts, keep the first chunks.
    """
    (tokens,) = text_tokens([text], tokenizer)
    chunks = torch.full((max(1, math.ceil(len(tokens) / TEXT)), CHUNK), pad)
    for row, begin in zip(chunks, range(0, max(1, len(tokens)), TEXT), strict=True):
        piece = [tokenizer.bos_token_id, *tokens[begin : begin + TEXT], tokenizer.eos_token_id]
        row[: len(piece)] = torch.tensor(piece)
    return chunks


def text_tokens(texts: Sequence[str], tokenizer) -> list[list[int]]:
    """The tokens of each text by themselves, uncut: escapes are parentheses, and special tokens are plain text."""
    plain = [unescape(text) for text in texts]
    return tokenizer(plain, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def batch_prompts(prompts: Sequence[Sequence[torch.Tensor]]) -> TokenBatch:
    """Prompts of any lengths as one batch.

    Shorter prompts are repeated up to the least common multiple of all lengths, as ComfyUI does (comfy/conds.py).
    Attention does not change if all its keys and values are repeated, so each prompt means exactly what it means alone.
    Empty chunks would not work as padding, because attention sees them.  Only ``rows`` repeats; no chunk is encoded
    twice.  Prompts of up to 3 chunks give at most 6 chunks each, those of up to 4 at most 12, those of up to 5 at most
    60, so shorten longer ones first.

    Args:
        prompts: for each prompt and each text encoder, its (chunks, 77) tokens.

    Raises:
        UserError: there are no prompts, or the encoders have different numbers of chunks for one prompt.
    """
    if not prompts:
        raise UserError("there are no prompts to make a batch of: give at least one")
    for prompt in prompts:
        if len({len(chunks) for chunks in prompt}) != 1:
            raise UserError(
                f"the text encoders' tokenizers make {[len(chunks) for chunks in prompt]} chunks of one prompt: give "
                "tokenizers with the same vocabulary"
            )
    lengths = [len(prompt[0]) for prompt in prompts]
    places = torch.arange(math.lcm(*lengths))
    begins = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    rows = torch.stack([begin + places % length for begin, length in zip(begins, lengths, strict=True)])
    return TokenBatch(tuple(torch.cat(chunks) for chunks in zip(*prompts, strict=True)), rows)


def encode_prompts(tokens: TokenBatch, text_encoders: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode prompts as the U-Net expects them.

    For SDXL, the penultimate hidden states of the two encoders are concatenated, without a norm, and the second
    encoder's pooled and projected output for the first chunk is returned too.  For SD 1.x and 2.x it is the last hidden
    state of the one encoder, after the final norm.  (In SD 2.x that is the penultimate one, because diffusers drops the
    last layer.)

    Args:
        tokens: tokens with chunks for each encoder.
        text_encoders: transformers' CLIPTextModel, followed by a CLIPTextModelWithProjection for SDXL.  Gradients flow
            into encoders that are trained.

    Returns:
        (B, L * 77, width) hidden states, and (B, projection) for SDXL, else None.
    """
    outputs = [
        encoder(chunks.to(encoder.device), output_hidden_states=True)
        for encoder, chunks in zip(text_encoders, tokens.chunks, strict=True)
    ]
    if len(outputs) == 1:
        hidden, pooled = outputs[0].last_hidden_state, None
    else:
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[1].text_embeds[tokens.rows[:, 0]]
    return hidden[tokens.rows].flatten(1, 2), pooled
