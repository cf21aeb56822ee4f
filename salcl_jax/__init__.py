"""Saliency-guided contrastive pre-training on scene photos, in JAX."""

__version__ = "0.1.0"
