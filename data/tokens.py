r"""Prompts of any length as chunks of tokens, and what CLIP's text encoders make of them.

CLIP reads 77 tokens.  A longer text is cut after every 75 tokens; each chunk gets a begin and an end token of its own,
is encoded for itself, and the results are put one behind the other (CLIP context concatenation: NovelAI Diffusion V3,
arXiv 2409.15997).  The chunks are token for token those of ComfyUI (read in 0.3.64 to 0.33), so that a model
is trained on what it is prompted with there.

A caption is plain text; ComfyUI's prompts have a syntax.  ``a (b)`` trains the tokens of the prompt ``a \(b\)``, and so
does the caption ``a \(b\)``: a parenthesis that is escaped loses its backslash, in captions as in prompts.
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
        chunks: for each text encoder, (N, 77) int64: the chunks of all prompts one after the other.
        rows: (B, L) int64: which chunks make up each prompt.
    """

    chunks: tuple[torch.Tensor, ...]
    rows: torch.Tensor


def token_chunks(text: str, tokenizer, pad: int) -> torch.Tensor:
    """The tokens of a text.

    Args:
        text: plain, as ``caption_text`` gives it; an empty one is a chunk without text.
        tokenizer: transformers' CLIPTokenizer.  Its special tokens have no meaning in the text.  (The tokenizers of
            SDXL's second encoder and of SD 2.x pad with "!", and so would take every "!" for padding, unlike ComfyUI.)
        pad: the token that fills the last chunk behind its end: for SD 1.x and SDXL's first encoder
            ``tokenizer.eos_token_id``, for SD 2.x and SDXL's second encoder 0.

    Returns:
        (chunks, 77) int64; to train with fewer take the first of them.
    """
    tokens = tokenizer(unescape(text), add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    chunks = torch.full((max(1, math.ceil(len(tokens) / TEXT)), CHUNK), pad)
    for row, begin in zip(chunks, range(0, max(1, len(tokens)), TEXT), strict=True):
        piece = [tokenizer.bos_token_id, *tokens[begin : begin + TEXT], tokenizer.eos_token_id]
        row[: len(piece)] = torch.tensor(piece)
    return chunks


def batch_prompts(prompts: Sequence[Sequence[torch.Tensor]]) -> TokenBatch:
    """Prompts of any lengths as one batch.

    Shorter prompts are repeated up to the least common multiple of all lengths, as ComfyUI does (comfy/conds.py):
    attention over keys and values that are all there twice is attention over them once, so that each prompt means
    exactly what it means alone.  Empty chunks as padding would not do, since attention sees them.  The repetition is in
    ``rows`` only; no chunk is encoded twice.  Prompts of up to 3 chunks make a batch of at most 6, up to 4 of at most
    12, up to 5 of 60: cut longer ones before.

    Args:
        prompts: for each prompt, for each text encoder, its (chunks, 77) tokens.

    Raises:
        UserError: no prompts, or encoders that have different numbers of chunks of the same prompt.
    """
    if not prompts:
        raise UserError("there are no prompts to make a batch of")
    for prompt in prompts:
        if len({len(chunks) for chunks in prompt}) != 1:
            raise UserError(
                f"the text encoders' tokenizers make {[len(chunks) for chunks in prompt]} chunks of one prompt; they "
                "must have one vocabulary"
            )
    lengths = [len(prompt[0]) for prompt in prompts]
    places = torch.arange(math.lcm(*lengths))
    begins = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    rows = torch.stack([begin + places % length for begin, length in zip(begins, lengths, strict=True)])
    return TokenBatch(tuple(torch.cat(chunks) for chunks in zip(*prompts, strict=True)), rows)


def encode_prompts(tokens: TokenBatch, text_encoders: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the U-Net is given of the prompts.

    SDXL's two encoders give their penultimate hidden states, without a norm, side by side; the second one also its
    pooled and projected output for the first chunk.  The one encoder of SD 1.x and 2.x gives its last hidden state
    behind the final norm.  (That is the penultimate one of SD 2.x, for diffusers leaves its last layer away.)

    Args:
        tokens: with chunks for each of the encoders.
        text_encoders: transformers' CLIPTextModel, and for SDXL a CLIPTextModelWithProjection.  Gradients flow into
            those that are trained.

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
