"""What people see of shared plans: the card of their repository (README.md) and a picture of each plan's densities.

`hub` checks that huggingface_hub and Pillow, which this needs, are installed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from paroattn.errors import InputError
from paroattn.files import write_atomically
from paroattn.plan_summary import PlanSummary

BEGIN, END = "<!-- paroattn plans: written anew with each plan that is added -->", "<!-- end of paroattn plans -->"
_NEW_CARD = "---\nlibrary_name: paroattn\n---\n\n# Plans for paroattn\n\n"
_LONGEST = 100  # characters of a text that a stranger wrote
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis
_PIXELS, _LARGEST_CELL = 640, 24  # of the longer side of a heat map, and of one head
_MARGIN, _BAR = 40, 12  # pixels around the heat map, and of the width of the colour scale


def updated_card(
    card: bytes | None,
    plans: Iterable[PlanSummary],
    files: Collection[str],
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The card of a repository, with the part about plans written anew; what else it says stays.

    Args:
        card: as it was, None if there was none.
        plans: all that are to be listed.
        files: names of the repository's files, of which "NAME.png" is the picture of "NAME.safetensors".
        repo: name of the repository, for the example.
        base_model: name of the repository of the model that the plans are for.
        license: of the plans, such as "apache-2.0".

    Raises:
        InputError: a card whose metadata cannot be read.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        new = ModelCard(_NEW_CARD if card is None else card.decode("utf-8-sig"))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the card, README.md, begins with metadata that cannot be read ({reason}); correct it"
        ) from error
    data, section = new.data, _section(plans, files, repo)
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), "paroattn", "sparse-attention"]))
    if base_model is not None:
        data["base_model"] = base_model
    if license is not None:
        data["license"] = license
    before, begin, rest = new.text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new.text = f"{before}{section}{after}" if begin else f"{before.rstrip()}\n\n{section}\n"
    return str(new)


def _section(plans: Iterable[PlanSummary], files: Collection[str], repo: str) -> str:
    plans = sorted(plans, key=lambda plan: plan.name)
    rows = "\n".join(_row(plan) for plan in plans)
    pictures = [plan.name for plan in plans if picture_name(plan.name) in files]
    shown = "\n".join(f"\n{_plain(name)}\n\n![densities]({quote(picture_name(name))})" for name in pictures)
    return f"""{BEGIN}
Plans say which blocks of a model's attention are computed, in which token order and precision. Each is for one
size, given in tokens. The nearest one for a pipeline:

```python
import paroattn

plan = paroattn.Plan.from_pretrained("{repo}", model=paroattn.identify(pipe), density=0.3)
with paroattn.apply(pipe, plan):
    ...
```

| plan | model | layers x heads | frames x height x width | density | precision | measured | prompts | steps |
|---|---|---|---|---|---|---|---|---|
{rows}

## Densities

The share of blocks that each head computes, over all steps.
{shown}
{END}"""


def _row(plan: PlanSummary) -> str:
    measured = ", ".join(f"{_plain(name)} {figure:g}" for name, figure in sorted(plan.quality.items()))
    cells = (
        f"[{_plain(plan.name)}]({quote(plan.name)})",
        _plain(plan.model.class_name),
        f"{plan.model.layers} x {plan.model.heads}",
        plan.grid.name.replace("x", " x "),
        "" if plan.density is None else f"{plan.density:.3g}",
        str(plan.precision),
        measured,
        "" if plan.prompts is None else str(plan.prompts),
        str(plan.steps),
    )
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """A stranger's text in Markdown: nothing in it is markup, a link, a line's end or the end of a table's cell."""
    kept = "".join(character if character.isprintable() else " " for character in text[:_LONGEST])
    return re.sub(r"[^\w -]|_", lambda match: f"&#{ord(match.group())};", kept)


def save_picture(path: str | os.PathLike[str], densities: Tensor) -> None:
    """Write a heat map of densities as a PNG file: a row per layer, a column per head, colours from 0 to 1.

    Args:
        densities: [layers, heads], in [0, 1].
    """
    from PIL import Image, ImageDraw

    layers, heads = densities.shape
    cell = max(1, min(_LARGEST_CELL, _PIXELS // max(layers, heads)))
    width, height = heads * cell, max(layers * cell, 4 * _MARGIN)
    scale = torch.linspace(1, 0, height).unsqueeze(1)
    picture = Image.new("RGB", (width + 4 * _MARGIN, height + 2 * _MARGIN), "white")
    picture.paste(_coloured(densities).resize((width, layers * cell), Image.Resampling.NEAREST), (_MARGIN, _MARGIN))
    right, bottom = width + 2 * _MARGIN, _MARGIN + height
    picture.paste(_coloured(scale).resize((_BAR, height), Image.Resampling.NEAREST), (right, _MARGIN))
    draw = ImageDraw.Draw(picture)
    for x, y, text, anchor in (
        (_MARGIN, _MARGIN - 6, "head 0", "ls"),
        (_MARGIN - 6, _MARGIN, "0", "rt"),
        (_MARGIN - 6, _MARGIN + layers * cell, str(layers - 1), "rb"),
        (_MARGIN, _MARGIN + layers * cell + 6, f"{layers} layers, {heads} heads", "lt"),
        (right + _BAR + 6, _MARGIN, "1", "lt"),
        (right + _BAR + 6, bottom, "0", "lb"),
        (right, _MARGIN - 6, "density", "ls"),
    ):
        draw.text((x, y), text, "black", anchor=anchor)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def _coloured(shares: Tensor) -> Any:
    """A picture with a pixel for each share in [0, 1] of a matrix."""
    from PIL import Image

    places = shares.double().clamp(0, 1) * (len(_COLOURS) - 1)
    below = places.floor().long().clamp(max=len(_COLOURS) - 2)
    colours, part = torch.tensor(_COLOURS, dtype=torch.float64), (places - below).unsqueeze(-1)
    mixed = colours[below] * (1 - part) + colours[below + 1] * part
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())


def picture_name(plan: str) -> str:
    """Name of the picture of a plan's file."""
    return f"{plan.removesuffix('.safetensors')}.png"
