"""Check that a checkpoint has every tensor of the published model of its architecture, in the published shape.

Names and shapes are compared in the layout of single files; those of a diffusers folder are converted to it first.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ..errors import UserError
from .architecture import BARE_UNET, DIFFUSERS_FOLDER, DIFFUSERS_UNET, LORA, SUPPORTED
from .folder import read_weights
from .header import read_header, shorten
from .inspect import CheckpointReport
from .layouts import CLIP, UNET, Layout, Recipe, clip_layout, list_names, open_clip_layout, unet_layout, vae_layout
from .published import NETWORKS, Shapes, network_names

_SIZES = {"KOALA": ("KOALA 700M", "KOALA 1B")}  # the models of an architecture that has several
_FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")  # in the order of NETWORKS
_LAYOUTS = {
    "VAE": vae_layout,
    "CLIP ViT-L": clip_layout,
    "OpenCLIP ViT-bigG": open_clip_layout,
    "OpenCLIP ViT-H": open_clip_layout,
}
MARKS = {"v_pred", "ztsnr"}
# what may be missing: programs make it again, or never use it
_OPTIONAL = {
    "CLIP ViT-L": ("embeddings.position_ids",),
    "OpenCLIP ViT-bigG": ("logit_scale",),
    "OpenCLIP ViT-H": ("logit_scale", "text_projection", "transformer.resblocks.23."),
}
# what may be present besides: averaged weights, the noise schedule, marks, and what else text encoders are saved with
_USUAL = re.compile(
    r"model_ema\..*|.*\.(position_ids|logit_scale|text_projection(\.weight)?)|v_pred|ztsnr"
    r"|betas|logvar|scale_factor|denoiser\.sigmas|lvlb_weights|posterior_\w+|\w*alphas_cumprod(_prev)?"
)
# some SD 1.x files name their text encoder so, and programs load it all the same
_OLD_CLIP = re.compile(r"cond_stage_model\.transformer\.(?!text_model\.)")


def find_missing(report: CheckpointReport) -> tuple[list[str], list[str]]:
    """Find what a checkpoint lacks.

    Returns:
        problems, a sentence for each incomplete network; remarks, a sentence for each thing to note.

    Raises:
        UserError: the file cannot be read.
    """
    if report.format == LORA:  # of any layers
        return [], []
    known = report.architecture in SUPPORTED
    shapes, broken = {}, {}
    if report.format == DIFFUSERS_FOLDER:
        shapes, broken = _lay_out_folder(report.path, report.architecture if known else "SDXL base")
    elif known:
        try:
            shapes = _shapes_of_file(report.path, report.format)
        except UserError as error:
            broken = {UNET: f"{error}."}
    problems, remarks = list(broken.values()), []
    if known:
        missing, remarks = compare_with_published(report.architecture, shapes, broken)
        problems += missing
    else:
        remarks.append("No published model has this architecture, so missing tensors may go unnoticed.")
    return problems, remarks


def compare_with_published(
    architecture: str, shapes: Mapping[str, tuple[int, ...]], broken: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Compare names and shapes, in the layout of single files, with the published model's; see ``find_missing``.

    Args:
        architecture: one of ``architecture.SUPPORTED``.
        shapes: shapes of all tensors.
        broken: prefixes of networks that are present and are not to be judged.
    """
    shapes = {_OLD_CLIP.sub(CLIP, name): shapes[name] for name in shapes}
    model = _most_alike(_SIZES.get(architecture, (architecture,)), shapes)
    problems, absent, published = [], [], set()
    for prefix, network in NETWORKS[model].items():
        expected = network_names(network)
        published |= {prefix + name for name in expected}
        there = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        if there:
            problems += _differences(network, there, expected)
        elif prefix not in broken:
            absent.append(network)
    remarks = []
    if absent and len(absent) < len(NETWORKS[model]) - 1:  # a U-Net alone is meant so
        remarks.append(f"It has no {' and no '.join(absent)}: programs must load that from another file.")
    if others := sorted(name for name in shapes.keys() - published if not _USUAL.fullmatch(name.removeprefix(UNET))):
        remarks.append(f"{len(others)} tensors do not belong to {model}: {list_names(others)}.")
    return problems, remarks


def _most_alike(models: Collection[str], shapes: Collection[str]) -> str:
    unet = {name.removeprefix(UNET) for name in shapes if name.startswith(UNET)}
    return min(models, key=lambda model: len(unet ^ network_names(NETWORKS[model][UNET]).keys()))


def _differences(network: str, there: Shapes, expected: Shapes) -> list[str]:
    faults = []
    for name, shape in expected.items():
        if name not in there:
            if not name.startswith(_OPTIONAL.get(network, ())):
                faults.append(shorten(name, 100))
        elif not _same_shape(name, there[name], shape):
            faults.append(f"{shorten(name, 100)} (its shape is {shorten(str(there[name]))} instead of {shape})")
    if not faults:
        return []
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return [
        f"{network}: {len(faults)} of {len(expected)} tensors are missing or have another shape: "
        f"{', '.join(faults[:3])}{more}."
    ]


def _same_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if name == "input_blocks.0.0.weight":  # has more inputs with a mask, or a picture to edit
        shape = (*shape[:1], *expected[1:2], *shape[2:])
    return shape == expected


# ----------------------------------------------------------------------------------------------------------------------
# Names and shapes in a single file's layout


def _shapes_of_file(path: Path, form: str) -> Shapes:
    shapes = {name: entry.shape for name, entry in read_header(path).tensors.items() if name not in MARKS}
    if form == DIFFUSERS_UNET:
        shapes = _lay_out(shapes, unet_layout)
    if form in (BARE_UNET, DIFFUSERS_UNET):
        shapes = {UNET + name: shape for name, shape in shapes.items()}
    return shapes


def _lay_out_folder(folder: Path, model: str) -> tuple[Shapes, dict[str, str]]:
    """The tensors of all networks present; and prefix -> what is wrong, of those that no single file can hold."""
    shapes, broken = {}, {}
    networks = NETWORKS[_SIZES.get(model, (model,))[0]]
    for part, (prefix, network) in zip(_FOLDERS, networks.items(), strict=False):
        if not (folder / part).is_dir():
            continue
        try:
            there = {name: tensor.shape for name, tensor in read_weights(folder / part).items()}
            laid_out = _lay_out(there, _LAYOUTS.get(network, unet_layout))
        except UserError as error:
            broken[prefix] = f"{part}: {error}."
        else:
            shapes |= {prefix + name: shape for name, shape in laid_out.items()}
    return shapes, broken


def _lay_out(shapes: Shapes, layout: Callable[[Collection[str]], Layout]) -> Shapes:
    return {name: _shape(recipe, shapes) for name, recipe in layout(shapes).items()}


def _shape(recipe: Recipe, shapes: Shapes) -> tuple[int, ...]:
    shape, *others = (shapes[name] for name in recipe.sources)
    if others:
        if not shape or any(other[1:] != shape[1:] or not other for other in others):
            raise UserError(f"the shapes of {list_names(recipe.sources)} do not fit together")
        shape = (sum(rows for rows, *_ in (shape, *others)), *shape[1:])
    if recipe.transposed:
        return shape[::-1]
    return (*shape, 1, 1) if recipe.convolution and len(shape) == 2 else shape
