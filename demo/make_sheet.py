"""Make the files of demo/pictures from their sources.

    python demo/make_sheet.py PACKAGE

PACKAGE is the unpacked npm package emoji-datasource-google 16.0.0, whose pictures are Google's Noto emoji (Apache-2.0).
The photographs come with scikit-image and are in the public domain (CC0, NASA).
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

OUT = Path(__file__).resolve().parent / "pictures"
SIDE, COLUMNS = 64, 20  # pixels per side of a picture, pictures per row
SUBCATEGORIES = (
    *("animal-mammal", "animal-bird", "animal-marine", "animal-reptile", "animal-amphibian", "animal-bug"),
    *("plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared", "food-sweet", "drink"),
    *("transport-ground", "transport-air", "transport-water", "musical-instrument"),
)
BESIDE = ("PENCIL",)
WORDS = {  # Unicode's name: word for captions, where they differ
    "steam locomotive": "train",
    "train": "electric train",
    "ear of maize": "corn",
    "aubergine": "eggplant",
    "honeybee": "bee",
    "bug": "caterpillar",
    "lady beetle": "ladybird",
    "red apple": "apple",
    "automobile": "car",
    "slice of pizza": "pizza",
    "passenger ship": "cruise ship",
}
PHOTOGRAPHS = {  # name: file of scikit-image, shorter side in pixels
    "stars": ("hubble_deep_field.jpg", 160),
    "brick": ("brick.png", 96),
    "grass": ("grass.png", 96),
    "gravel": ("gravel.png", 96),
}


def name_of(entry: dict, taken: set[str]) -> str:
    """The word for captions: "fox" for FOX FACE, unless another picture has that name."""
    name = entry["name"].lower()
    short = name.removesuffix(" face")
    return WORDS.get(name, name if short in taken else short)


def main(package: Path) -> None:
    entries = [
        entry
        for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8"))
        if entry["has_img_google"] and (entry["subcategory"] in SUBCATEGORIES or entry["name"] in BESIDE)
    ]
    order = {name: number for number, name in enumerate(SUBCATEGORIES)}
    entries.sort(key=lambda entry: (order.get(entry["subcategory"], len(order)), entry["sort_order"]))
    full_names = {entry["name"].lower() for entry in entries}
    names = [name_of(entry, full_names) for entry in entries]
    assert len(set(names)) == len(names)

    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(entries) // COLUMNS) * SIDE))
    for number, entry in enumerate(entries):
        with Image.open(package / "img" / "google" / "64" / entry["image"]) as picture:
            row, column = divmod(number, COLUMNS)
            sheet.paste(picture.convert("RGBA").resize((SIDE, SIDE)), (column * SIDE, row * SIDE))
    sheet.save(OUT / "emoji.webp", lossless=True, quality=100, method=6)
    (OUT / "emoji.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")

    data = Path(find_spec("skimage").submodule_search_locations[0]) / "data"
    for name, (file, shorter) in PHOTOGRAPHS.items():
        with Image.open(data / file) as picture:
            scale = shorter / min(picture.size)
            size = tuple(round(scale * side) for side in picture.size)
            picture.convert("RGB").resize(size, Image.Resampling.BOX).save(OUT / f"{name}.webp", lossless=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
