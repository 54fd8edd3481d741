"""Mask rules of other papers, written anew, to be compared at the same density with the same operator."""

from paroattn_lab.baselines.dynamic import DYNAMIC_BASELINES, DynamicHandle, apply_dynamic
from paroattn_lab.baselines.static import STATIC_BASELINES, static_baseline

__all__ = ["DYNAMIC_BASELINES", "STATIC_BASELINES", "DynamicHandle", "apply_dynamic", "static_baseline"]
