"""A checkpoint's stages: prune, distill, quantize, and what they stand on."""
