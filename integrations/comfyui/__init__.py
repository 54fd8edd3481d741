"""paroattn in ComfyUI: nodes that run a model's self-attention as a plan says."""

from . import plans

plans.register_folder()

from .nodes import NODES, ParoExtension  # noqa: E402 - the list of plans needs the folder

NODE_CLASS_MAPPINGS = {node.define_schema().node_id: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.define_schema().node_id: node.define_schema().display_name for node in NODES}


async def comfy_entrypoint() -> ParoExtension:
    """What versions of ComfyUI with the V3 schema call."""
    return ParoExtension()


__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "comfy_entrypoint"]
