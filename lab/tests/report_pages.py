"""A small report with everything in it, and names that would break a page that does not escape them."""

import itertools

import tiny
import torch
from frames_model import FramesModel
from paroattn_lab.quality.evaluation_records import evaluation_records
from paroattn_lab.quality.head_study import study_heads, study_records
from paroattn_lab.quality.pairs import Variant, evaluate_variants
from paroattn_lab.report import write_report

EVIL = """<script>alert("x")</script> & 'quoted' </title> <b>$x$</b> [red]"""
SHOWN = f"sparse {EVIL}"


def report_inputs():
    """What `write_report` takes, made by really evaluating two plans of the tiny pipeline on two pairs."""
    model = FramesModel(f"tiny {EVIL}", fps=6)
    # Two blocks a side: the four masks that keep the diagonal, so that neighbours in step, layer or head differ.
    masks = torch.eye(2, dtype=torch.bool).repeat(2, 2, 2, 1, 1)
    for bucket, layer, head in itertools.product(range(2), repeat=3):
        code = (layer + 2 * head + 3 * bucket) % 4
        masks[bucket, layer, head, 0, 1], masks[bucket, layer, head, 1, 0] = bool(code & 1), bool(code & 2)
    whole = tiny.make_plan(model.pipe)
    sparse = tiny.make_plan(model.pipe, masks, edges=(0.0, 0.5), precision="int8")
    object.__setattr__(sparse, "provenance", {"method": "paroattn", "prompts": [EVIL], "seed": 0, "density": 0.3})
    plans = {"all blocks": whole, SHOWN: sparse}
    variants = [
        Variant("all blocks", plan=whole),
        Variant("paroattn", 0.3, "int8", sparse, label=SHOWN),
    ]
    prompts = [f"first {EVIL}", "second"]
    pairs = list(zip(prompts, (1, 2), strict=True))
    evaluation = evaluate_variants(model, variants, pairs, progress=False)
    study = study_heads(model, plans, pairs[0], shown=SHOWN, progress=False)
    return {
        "model": model,
        "records": study_records(evaluation_records(model, evaluation), study),
        "plans": plans,
        "videos": evaluation.videos,
        "study": study,
        "prompts": prompts,
    }


def write(path, inputs):
    write_report(path, **{name: inputs[name] for name in ("records", "plans", "videos", "study")})
