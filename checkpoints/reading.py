"""What a program looks at in a checkpoint, what it takes the checkpoint for, and whether that is right."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import DIFFUSERS_FOLDER, SINGLE_FILE
from .latent_scaling import LatentScaling

SDXL_FAMILY = frozenset({"SDXL base", "SSD-1B", "Vega", "KOALA"})


@dataclass(frozen=True)
class Marked:
    """What programs look at.

    Attributes:
        form: one of architecture.py's formats.
        names: names of the tensors, including "v_pred" and "ztsnr".
        scheduler_config: of a diffusers folder, else empty.
        has_yaml: True if a .yaml file of the same name lies beside the file.
        latent_scaling: scaling of its latents, if it differs from the published one.
    """

    file_name: str
    form: str
    architecture: str
    names: Collection[str]
    metadata: Mapping[str, str]
    scheduler_config: Mapping[str, Any]
    has_yaml: bool = False
    latent_scaling: LatentScaling | None = None

    @property
    def is_single_file(self) -> bool:
        return self.form == SINGLE_FILE

    @property
    def is_folder(self) -> bool:
        return self.form == DIFFUSERS_FOLDER


@dataclass(frozen=True)
class Taken:
    """What a program takes a checkpoint for.

    Attributes:
        prediction_type: "v_prediction", "epsilon" or "flow_prediction"; None if the program does not load such a file,
            or looks where this package does not: into the weights, or a configuration file.
        zero_terminal_snr: True if it samples with a zero-SNR schedule; None where the prediction type is.
        why: where it looked, in words.
    """

    prediction_type: str | None
    zero_terminal_snr: bool | None
    why: str


@dataclass(frozen=True)
class ProgramRow:
    """One program's reading of a checkpoint, compared with what the checkpoint is.

    Attributes:
        right: True if the reading is what the checkpoint is; None if the checkpoint does not say enough, or the program
            looks elsewhere.
        change: what to do about it, "" if nothing.
    """

    program: str
    taken: Taken
    right: bool | None
    change: str

    def __str__(self) -> str:
        taken = self.taken
        if taken.prediction_type is None:
            reading = taken.why
        else:
            snr = "zero SNR" if taken.zero_terminal_snr else "no zero SNR"
            reading = f"{taken.prediction_type}, {snr} ({taken.why})"
        return f"{self.program}: {reading}." + (f" {self.change}" if self.change else "")


def scales_by_one_number(marked: Marked) -> bool | None:
    """``Program.scales_latents`` of a program that runs diffusers on folders.

    The names in a single file's metadata are this package's own.  One number for all channels is the scaling_factor of
    the VAE's config, which every pipeline applies.
    """
    if not marked.is_folder:
        return False
    is_one_number = marked.latent_scaling is not None and marked.latent_scaling.scaling_factor is not None
    return True if is_one_number else None


@dataclass(frozen=True)
class Program:
    """A program that loads checkpoints: one entry in programs.py.

    Attributes:
        read: what it takes a checkpoint for, as its source does.
        remedy: what the user does about a wrong reading, given the options of ``ztsnr mark`` that say what it is.
        looks_at, what_to_do: the same two in general, as Markdown for docs/checkpoints.md.
        scales_latents: True if it applies the latent scaling that a checkpoint names, False if it ignores it, None if
            that is not known here; asked only about checkpoints that name one.
    """

    name: str
    read: Callable[[Marked], Taken]
    remedy: Callable[[Marked, str], str]
    looks_at: str
    what_to_do: str
    scales_latents: Callable[[Marked], bool | None] = scales_by_one_number

    def row(self, marked: Marked, prediction_type: str | None, zero_terminal_snr: bool | None) -> ProgramRow:
        """Its reading, compared with what the checkpoint is by all its marks together; None if nothing says."""
        taken = self.read(marked)
        right = _is_right(taken, prediction_type, zero_terminal_snr)
        change = self.remedy(marked, _mark_options(prediction_type, zero_terminal_snr)) if right is False else ""
        scales = marked.latent_scaling is None or self.scales_latents(marked)
        if taken.prediction_type is not None and not scales:
            right = False if scales is False else right and None
            change = f"{change} {_LATENTS[scales]}".strip()
        return ProgramRow(self.name, taken, right, change)


_LATENTS = {
    False: "It ignores this checkpoint's latent scaling, so colours are wrong: load a file with the node Load "
    "Checkpoint (ZTSNR), an SDXL folder with diffusers.",
    None: "It is not known whether it applies the folder's latent scaling.",
}


def _is_right(taken: Taken, prediction_type: str | None, zero_terminal_snr: bool | None) -> bool | None:
    if taken.prediction_type is None or prediction_type is None:
        return None
    if taken.prediction_type != prediction_type:
        return False
    if prediction_type == "epsilon":  # which cannot have zero SNR
        zero_terminal_snr = bool(zero_terminal_snr)
    return None if zero_terminal_snr is None else taken.zero_terminal_snr == zero_terminal_snr


def _mark_options(prediction_type: str | None, zero_terminal_snr: bool | None) -> str:
    """The options of ``ztsnr mark`` that say what a checkpoint is."""
    if prediction_type != "v_prediction":
        return "--no-v-pred --no-ztsnr"
    return {True: "--v-pred --ztsnr", False: "--v-pred --no-ztsnr", None: "--v-pred"}[zero_terminal_snr]
