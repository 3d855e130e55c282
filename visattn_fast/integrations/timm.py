"""timm's attention modules, and the residual blocks around them."""

from __future__ import annotations

from . import timm_blocks, timm_cbam, timm_gates, timm_grn, timm_swin

RECIPES = [*timm_gates.RECIPES, *timm_cbam.RECIPES, *timm_grn.RECIPES, *timm_swin.RECIPES, *timm_blocks.RECIPES]
