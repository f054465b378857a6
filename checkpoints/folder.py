"""The weights of one network of a diffusers folder, in one file or in several."""

import json
from pathlib import Path

from ..errors import UserError
from .header import LONGEST_HEADER, PICKLES, read_header, shorten
from .stream import TensorStream, stored


def read_weights(part: Path) -> dict[str, TensorStream]:
    """The tensors of a network, from the files that diffusers loads by default, or else from a variant such as fp16.

    Args:
        part: the network's folder, such as FOLDER/unet.

    Raises:
        UserError: no such folder, pickles only, a damaged file, or files that are not what their index says.
    """
    plain = weights_file(part)
    stem, index = plain.stem, part / f"{plain.name}.index.json"
    if plain.is_file():
        return _of_file(plain)
    if index.is_file():
        return _of_index(index)
    versions = [file for file in sorted(part.glob(f"{stem}.*.safetensors")) if "-of-" not in file.name]
    if versions:
        return _of_file(versions[0])
    if indices := sorted(part.glob(f"{stem}.safetensors.index.*.json")):
        return _of_index(indices[0])
    if pickles := [file for file in sorted(part.glob(f"*{stem}*")) if file.suffix in PICKLES]:
        read_header(pickles[0])  # always raises, and says why
    raise UserError(f"there is no {plain}: give the diffusers folder of a whole model")


def weights_file(part: Path) -> Path:
    """The one file that a network is saved in: transformers name theirs, the text encoders, differently."""
    return part / f"{'model' if part.name.startswith('text_encoder') else 'diffusion_pytorch_model'}.safetensors"


def _of_file(path: Path) -> dict[str, TensorStream]:
    header = read_header(path)
    return {name: stored(path, header, name) for name in header.tensors}


def _of_index(index: Path) -> dict[str, TensorStream]:
    """The tensors of several files, by the index that says which file each tensor is in."""
    try:
        with index.open("rb") as file:
            content = json.loads(file.read(LONGEST_HEADER).decode("utf-8"))
        places = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not a readable index of weights") from None
    tensors = {}
    for name in sorted(set(places.values())):
        if "/" in name or "\\" in name:
            raise UserError(f"{index} names a file outside of its folder: {shorten(name)}")
        tensors |= _of_file(index.parent / name)
    if differing := sorted(tensors.keys() ^ places.keys()):
        raise UserError(f"{index} and the files it names list different tensors, for example {shorten(differing[0])}")
    return tensors
