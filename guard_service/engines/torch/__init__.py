"""Llama Guard 3 in torch: checkpoints in the Hugging Face layout, text (1B, 8B) and vision (11B).

Nothing heavy is imported before a checkpoint is opened (`engine.open_checkpoint`).
"""
