"""Writes the example workflows as ComfyUI loads them (JSON) and as pictures of them (SVG).

python make.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TITLE, ROW, WIDTH = 30, 22, 300
COLOURS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "VIDEO": "#7de3c8", "PARO_PLAN": "#58d68d", "STRING": "#9ac59a",
}  # fmt: skip


@dataclass
class Node:
    """A node: its type, inputs that are linked and outputs as (name, type), widgets by name, and where it stands."""

    kind: str
    title: str
    at: tuple[int, int]
    inputs: list[tuple[str, str]] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    widgets: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return max(len(self.inputs), len(self.outputs))

    @property
    def height(self) -> int:
        return TITLE + ROW * (self.rows + len(self.widgets)) + 12

    def input_at(self, number: int) -> tuple[int, int]:
        return self.at[0], self.at[1] + TITLE + ROW * number + ROW // 2 + 4

    def output_at(self, number: int) -> tuple[int, int]:
        return self.at[0] + WIDTH, self.at[1] + TITLE + ROW * number + ROW // 2 + 4


@dataclass
class Workflow:
    """Nodes by a name of their own, and links "name.output" -> "name.input"."""

    nodes: dict[str, Node]
    links: list[tuple[str, str]]

    def _ends(self) -> list[tuple[str, int, str, int, str]]:
        found = []
        for source, target in self.links:
            (from_node, output), (to_node, name) = source.split("."), target.split(".")
            outputs, inputs = self.nodes[from_node].outputs, self.nodes[to_node].inputs
            start = [key for key, _ in outputs].index(output)
            end = [key for key, _ in inputs].index(name)
            if outputs[start][1] != inputs[end][1]:
                raise ValueError(f"{source} is a {outputs[start][1]}, {target} takes a {inputs[end][1]}")
            found.append((from_node, start, to_node, end, outputs[start][1]))
        return found

    def as_json(self) -> dict[str, Any]:
        """The workflow as ComfyUI's editor saves it."""
        ends, ids = self._ends(), {name: number for number, name in enumerate(self.nodes, 1)}
        links = [[i, ids[a], out, ids[b], to, kind] for i, (a, out, b, to, kind) in enumerate(ends, 1)]
        nodes = []
        for order, (name, node) in enumerate(self.nodes.items()):
            inputs: list[dict[str, Any]] = [
                {
                    "name": key,
                    "type": kind,
                    "link": next((link[0] for link in links if link[3:5] == [ids[name], number]), None),
                }
                for number, (key, kind) in enumerate(node.inputs)
            ]
            outputs = [
                {
                    "name": key,
                    "type": kind,
                    "links": [link[0] for link in links if link[1:3] == [ids[name], number]],
                    "slot_index": number,
                }
                for number, (key, kind) in enumerate(node.outputs)
            ]
            nodes.append(
                {
                    "id": ids[name],
                    "type": node.kind,
                    "title": node.title,
                    "pos": list(node.at),
                    "size": [WIDTH, node.height],
                    "flags": {},
                    "order": order,
                    "mode": 0,
                    "inputs": inputs,
                    "outputs": outputs,
                    "properties": {"Node name for S&R": node.kind},
                    "widgets_values": list(node.widgets.values()),
                }
            )
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def as_svg(self) -> str:
        """A picture of the workflow."""
        width = max(node.at[0] for node in self.nodes.values()) + WIDTH + 30
        height = max(node.at[1] + node.height for node in self.nodes.values()) + 30
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="13">',
            f'<rect width="{width}" height="{height}" fill="#212121"/>',
        ]
        for a, start, b, end, kind in self._ends():
            (x1, y1), (x2, y2) = self.nodes[a].output_at(start), self.nodes[b].input_at(end)
            bend = max(40, abs(x2 - x1) // 2)
            parts.append(
                f'<path d="M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}" fill="none" '
                f'stroke="{COLOURS[kind]}" stroke-width="2.5" opacity="0.85"/>'
            )
        for node in self.nodes.values():
            parts += self._drawn(node)
        return "\n".join([*parts, "</svg>", ""])

    def _drawn(self, node: Node) -> list[str]:
        (x, y), own = node.at, "Paro" in node.kind
        parts = [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{node.height}" rx="8" fill="#353535" '
            f'stroke="{"#58d68d" if own else "#555"}" stroke-width="{2.5 if own else 1}"/>',
            f'<text x="{x + 12}" y="{y + 20}" fill="#fff" font-weight="bold">{escape(node.title)}</text>',
        ]
        for number, (name, kind) in enumerate(node.inputs):
            cx, cy = node.input_at(number)
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="5" fill="{COLOURS[kind]}"/>')
            parts.append(f'<text x="{cx + 12}" y="{cy + 4}" fill="#ccc">{escape(name)}</text>')
        for number, (name, kind) in enumerate(node.outputs):
            cx, cy = node.output_at(number)
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="5" fill="{COLOURS[kind]}"/>')
            parts.append(f'<text x="{cx - 12}" y="{cy + 4}" fill="#ccc" text-anchor="end">{escape(name)}</text>')
        top = y + TITLE + ROW * node.rows + 6
        for number, (name, value) in enumerate(node.widgets.items()):
            line = top + ROW * number
            text = str(value).replace("\n", " ")
            text = text if len(text) < 28 else text[:26] + "…"
            parts.append(
                f'<rect x="{x + 10}" y="{line}" width="{WIDTH - 20}" height="{ROW - 3}" rx="5" fill="#242424"/>'
            )
            parts.append(f'<text x="{x + 18}" y="{line + 14}" fill="#999" font-size="12">{escape(name)}</text>')
            parts.append(
                f'<text x="{x + WIDTH - 18}" y="{line + 14}" fill="#eee" font-size="12" text-anchor="end">'
                f"{escape(text)}</text>"
            )
        return parts


def _loader(kind: str, title: str, at: tuple[int, int], output: tuple[str, str], **widgets: Any) -> Node:
    return Node(kind, title, at, [], [output], widgets)


def _unet(title: str, at: tuple[int, int], name: str) -> Node:
    return _loader("UNETLoader", title, at, ("MODEL", "MODEL"), unet_name=name, weight_dtype="default")


def _vae(at: tuple[int, int], name: str) -> Node:
    return _loader("VAELoader", "Load VAE", at, ("VAE", "VAE"), vae_name=name)


def _plan(at: tuple[int, int], name: str) -> Node:
    outputs = [("plan", "PARO_PLAN"), ("about", "STRING")]
    return Node("LoadParoPlan", "Load PARO plan", at, [], outputs, {"plan": name})


def _apply(at: tuple[int, int], part: str, other_sizes: str = "dense", title: str = "Apply PARO plan") -> Node:
    widgets = {"part": part, "start": 0.0, "end": 1.0, "other_sizes": other_sizes, "repair": False}
    return Node("ApplyParoPlan", title, at, [("model", "MODEL"), ("plan", "PARO_PLAN")], [("MODEL", "MODEL")], widgets)


def _report(at: tuple[int, int], title: str = "PARO report") -> Node:
    return Node(
        "ParoReport",
        title,
        at,
        [("model", "MODEL"), ("samples", "LATENT")],
        [("samples", "LATENT"), ("report", "STRING")],
    )


def _text(title: str, at: tuple[int, int], text: str) -> Node:
    return Node("CLIPTextEncode", title, at, [("clip", "CLIP")], [("CONDITIONING", "CONDITIONING")], {"text": text})


def _shift(at: tuple[int, int], shift: float, title: str = "ModelSamplingSD3") -> Node:
    return Node("ModelSamplingSD3", title, at, [("model", "MODEL")], [("MODEL", "MODEL")], {"shift": shift})


_SAMPLED = [("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent_image", "LATENT")]
_PROMPT = "a red fox runs through fresh snow, low sun, film grain"
_DECODE = [("samples", "LATENT"), ("vae", "VAE")]


def _sampler(at: tuple[int, int], steps: int, cfg: float, scheduler: str = "simple") -> Node:
    widgets = {
        "seed": 0, "control_after_generate": "fixed", "steps": steps, "cfg": cfg, "sampler_name": "euler",
        "scheduler": scheduler, "denoise": 1.0,
    }  # fmt: skip
    return Node("KSampler", "KSampler", at, _SAMPLED, [("LATENT", "LATENT")], widgets)


def _slice(title: str, at: tuple[int, int], first: bool, steps: int, border: int, cfg: float) -> Node:
    widgets = {
        "add_noise": "enable" if first else "disable", "noise_seed": 0, "control_after_generate": "fixed",
        "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple",
        "start_at_step": 0 if first else border, "end_at_step": border if first else 10000,
        "return_with_leftover_noise": "enable" if first else "disable",
    }  # fmt: skip
    return Node("KSamplerAdvanced", title, at, _SAMPLED, [("LATENT", "LATENT")], widgets)


def _video(at: tuple[int, int], frames: int, width: int, height: int) -> Node:
    widgets = {"width": width, "height": height, "length": frames, "batch_size": 1}
    return Node("EmptyHunyuanLatentVideo", "Empty video latent", at, [], [("LATENT", "LATENT")], widgets)


def _umt5(at: tuple[int, int]) -> Node:
    name = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    return _loader("CLIPLoader", "Load CLIP", at, ("CLIP", "CLIP"), clip_name=name, type="wan", device="default")


def _saved_video(at: tuple[int, int], name: str) -> dict[str, Node]:
    x, y = at
    return {
        "create": Node("CreateVideo", "Create Video", at, [("images", "IMAGE")], [("VIDEO", "VIDEO")], {"fps": 16.0}),
        "save": Node(
            "SaveVideo", "Save Video", (x, y + 130), [("video", "VIDEO")], [],
            {"filename_prefix": f"video/{name}", "format": "auto", "codec": "auto"},
        ),
    }  # fmt: skip


def wan21() -> Workflow:
    """Text to video with Wan 2.1 1.3B."""
    nodes = {
        "unet": _unet("Load Wan 2.1", (30, 30), "wan2.1_t2v_1.3B_fp16.safetensors"),
        "plan": _plan((30, 160), "wan21-1.3b-480p.safetensors"),
        "clip": _umt5((30, 300)),
        "vae": _vae((30, 450), "wan_2.1_vae.safetensors"),
        "latent": _video((30, 560), 81, 832, 480),
        "shift": _shift((370, 30), 8.0),
        "apply": _apply((370, 160), "whole"),
        "positive": _text("Prompt", (370, 370), _PROMPT),
        "negative": _text("Negative prompt", (370, 490), "blurry, static, subtitles"),
        "sampler": _sampler((710, 160), 30, 6.0),
        "report": _report((1050, 160)),
        "decode": Node("VAEDecode", "VAE Decode", (1050, 300), _DECODE, [("IMAGE", "IMAGE")]),
        **_saved_video((1390, 160), "wan21"),
    }
    links = [
        ("unet.MODEL", "shift.model"), ("shift.MODEL", "apply.model"), ("plan.plan", "apply.plan"),
        ("clip.CLIP", "positive.clip"), ("clip.CLIP", "negative.clip"), ("apply.MODEL", "sampler.model"),
        ("positive.CONDITIONING", "sampler.positive"), ("negative.CONDITIONING", "sampler.negative"),
        ("latent.LATENT", "sampler.latent_image"), ("apply.MODEL", "report.model"),
        ("sampler.LATENT", "report.samples"), ("report.samples", "decode.samples"), ("vae.VAE", "decode.vae"),
        ("decode.IMAGE", "create.images"), ("create.VIDEO", "save.video"),
    ]  # fmt: skip
    return Workflow(nodes, links)


def wan22() -> Workflow:
    """Text to video with the two models of Wan 2.2 A14B, which share a plan."""
    nodes = {
        "high": _unet("Load Wan 2.2, high noise", (30, 30), "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"),
        "low": _unet("Load Wan 2.2, low noise", (30, 150), "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
        "plan": _plan((30, 270), "wan22-a14b-720p.safetensors"),
        "clip": _umt5((30, 400)),
        "vae": _vae((30, 540), "wan_2.1_vae.safetensors"),
        "latent": _video((30, 640), 81, 1280, 720),
        "shift_high": _shift((370, 30), 8.0),
        "shift_low": _shift((370, 150), 8.0),
        "positive": _text("Prompt", (370, 400), _PROMPT),
        "negative": _text("Negative prompt", (370, 520), "blurry, static, subtitles"),
        "apply_high": _apply((710, 30), "high noise", title="Apply PARO plan, high noise"),
        "apply_low": _apply((710, 220), "low noise", title="Apply PARO plan, low noise"),
        "first": _slice("First sampler: high noise", (1050, 30), True, 20, 10, 3.5),
        "second": _slice("Second sampler: low noise", (1390, 30), False, 20, 10, 3.5),
        "report_high": _report((1390, 430), "PARO report, high noise"),
        "report_low": _report((1730, 30), "PARO report, low noise"),
        "decode": Node("VAEDecode", "VAE Decode", (1730, 170), _DECODE, [("IMAGE", "IMAGE")]),
        **_saved_video((1730, 290), "wan22"),
    }
    links = [
        ("high.MODEL", "shift_high.model"), ("low.MODEL", "shift_low.model"), ("shift_high.MODEL", "apply_high.model"),
        ("shift_low.MODEL", "apply_low.model"), ("plan.plan", "apply_high.plan"), ("plan.plan", "apply_low.plan"),
        ("clip.CLIP", "positive.clip"), ("clip.CLIP", "negative.clip"), ("apply_high.MODEL", "first.model"),
        ("positive.CONDITIONING", "first.positive"), ("negative.CONDITIONING", "first.negative"),
        ("latent.LATENT", "first.latent_image"), ("apply_low.MODEL", "second.model"),
        ("positive.CONDITIONING", "second.positive"), ("negative.CONDITIONING", "second.negative"),
        ("first.LATENT", "report_high.samples"), ("apply_high.MODEL", "report_high.model"),
        ("report_high.samples", "second.latent_image"), ("second.LATENT", "report_low.samples"),
        ("apply_low.MODEL", "report_low.model"), ("report_low.samples", "decode.samples"), ("vae.VAE", "decode.vae"),
        ("decode.IMAGE", "create.images"), ("create.VIDEO", "save.video"),
    ]  # fmt: skip
    return Workflow(nodes, links)


def flux() -> Workflow:
    """Text to image with Flux, at other sizes than the plan's, too."""
    clip = _loader(
        "DualCLIPLoader", "Load CLIPs", (30, 300), ("CLIP", "CLIP"), clip_name1="t5xxl_fp8_e4m3fn.safetensors",
        clip_name2="clip_l.safetensors", type="flux", device="default",
    )  # fmt: skip
    nodes = {
        "unet": _unet("Load Flux", (30, 30), "flux1-dev.safetensors"),
        "plan": _plan((30, 160), "flux1-dev-2048.safetensors"),
        "clip": clip,
        "vae": _vae((30, 470), "ae.safetensors"),
        "latent": Node(
            "EmptySD3LatentImage", "Empty latent", (30, 580), [], [("LATENT", "LATENT")],
            {"width": 2048, "height": 2048, "batch_size": 1},
        ),
        "apply": _apply((370, 30), "whole", "adapt"),
        "positive": _text("Prompt", (370, 240), _PROMPT),
        "guidance": Node(
            "FluxGuidance", "FluxGuidance", (370, 360), [("conditioning", "CONDITIONING")],
            [("CONDITIONING", "CONDITIONING")], {"guidance": 3.5},
        ),
        "negative": Node(
            "ConditioningZeroOut", "ConditioningZeroOut", (370, 480), [("conditioning", "CONDITIONING")],
            [("CONDITIONING", "CONDITIONING")],
        ),
        "sampler": _sampler((710, 30), 28, 1.0),
        "report": _report((1050, 30)),
        "decode": Node("VAEDecode", "VAE Decode", (1050, 170), _DECODE, [("IMAGE", "IMAGE")]),
        "save": Node(
            "SaveImage", "Save Image", (1050, 300), [("images", "IMAGE")], [], {"filename_prefix": "flux"}
        ),
    }  # fmt: skip
    links = [
        ("unet.MODEL", "apply.model"), ("plan.plan", "apply.plan"), ("clip.CLIP", "positive.clip"),
        ("positive.CONDITIONING", "guidance.conditioning"), ("positive.CONDITIONING", "negative.conditioning"),
        ("apply.MODEL", "sampler.model"), ("guidance.CONDITIONING", "sampler.positive"),
        ("negative.CONDITIONING", "sampler.negative"), ("latent.LATENT", "sampler.latent_image"),
        ("apply.MODEL", "report.model"), ("sampler.LATENT", "report.samples"), ("report.samples", "decode.samples"),
        ("vae.VAE", "decode.vae"), ("decode.IMAGE", "save.images"),
    ]  # fmt: skip
    return Workflow(nodes, links)


WORKFLOWS = {
    "wan21_text_to_video": wan21(),
    "wan22_two_samplers": wan22(),
    "flux_text_to_image": flux(),
}


def main() -> None:
    """Write all files."""
    for name, workflow in WORKFLOWS.items():
        (HERE / f"{name}.json").write_text(json.dumps(workflow.as_json(), indent=1) + "\n")
        (HERE / f"{name}.svg").write_text(workflow.as_svg())


if __name__ == "__main__":
    main()
