"""How many captions are longer than ``data.max_chunks``, and so lose their end."""

import numpy as np
from transformers import CLIPTokenizer

from ..data.arrow_file import pc
from ..data.captions import join_tags
from ..data.tokens import TEXT, text_tokens
from .config import DataSettings
from .run_data import TrainingData

MOST = 10_000  # captions to tokenize, about two seconds; of more, an even share is counted


def cut_captions(data: TrainingData, settings: DataSettings, tokenizer: CLIPTokenizer, most: int = MOST) -> str:
    """A line about the captions that are cut; "" if none is.

    A token has at least one byte, so only captions with more bytes than there is room for tokens are tokenized.
    """
    captions, room = settings.captions, settings.max_chunks * TEXT
    texts = pc.list_flatten(data.index.table["captions"].filter(data.plan.assignment >= 0))
    around = len(join_tags((captions.prefix, "-", captions.suffix), captions.separator).encode())
    lengths = pc.binary_length(texts.cast("large_binary")).to_numpy() + around
    candidates = np.flatnonzero(lengths > room)
    chosen = candidates
    if len(candidates) > most:
        chosen = candidates[np.linspace(0, len(candidates) - 1, most).round().astype(int)]
    if not len(chosen):
        return ""
    whole = [
        join_tags((captions.prefix, " ".join(text.split()), captions.suffix), captions.separator)
        for text in texts.take(chosen).to_pylist()
    ]
    counts = np.array([len(tokens) for tokens in text_tokens(whole, tokenizer)])
    if not (counts > room).any():
        return ""
    found = round(int((counts > room).sum()) * len(candidates) / len(chosen))
    about = "" if len(chosen) == len(candidates) else "about "
    return (
        f"{about}{found} of {len(texts)} captions are longer than data.max_chunks = {settings.max_chunks} ({room} "
        f"tokens) and are cut there; the longest has {counts.max()} tokens: raise data.max_chunks to train all of it"
    )
