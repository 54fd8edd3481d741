"""Plan files: those of the registered models folder, by name, and no others."""

from __future__ import annotations

import contextlib
import os

import folder_paths

from paroattn import InputError, Plan

FOLDER = "paroattn_plans"
"""Under ComfyUI's models folder, or where extra_model_paths.yaml says."""


def register_folder() -> None:
    """Make the folder known to ComfyUI, and make it, so that users find it."""
    path = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, path)
    folders, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (folders, {".safetensors"})
    with contextlib.suppress(OSError):  # a folder that may not be written is empty, as the node's list shows
        os.makedirs(path, exist_ok=True)


def plan_names() -> list[str]:
    """Names of the files in the folder."""
    return list(folder_paths.get_filename_list(FOLDER))


def path_of(name: str) -> str:
    """The path of a plan.

    Raises:
        InputError: a name that the list does not have. Workflows come from strangers: a path is no name.
    """
    names = plan_names()
    path = folder_paths.get_full_path(FOLDER, name) if name in names else None
    if path is None:
        known = ", ".join(names) or "none"
        raise InputError(
            f"plan is {name!r}; there are {known} in models/{FOLDER}. Put the plan's file there and refresh the list."
        )
    return path


def load(name: str) -> Plan:
    """Read and validate a plan by name; raises `InputError` or `PlanError`, in one line."""
    return Plan.load(path_of(name))


def describe(plan: Plan) -> str:
    """What a plan is for, in a few lines."""
    model, precisions = plan.model, sorted(set(map(str, plan.precisions)))
    return "\n".join(
        (
            f"model: {model.class_name}, {model.layers} layers of {model.heads} heads with {model.head_dim} channels",
            f"grid: {plan.grid}",
            f"density: {plan.density():.3f}, precision: {', '.join(precisions)}",
            f"schedule: {len(plan.schedule)} steps, noise levels {plan.schedule[0]:.3f} to {plan.schedule[-1]:.3f}, "
            f"{plan.buckets} step buckets",
        )
    )
