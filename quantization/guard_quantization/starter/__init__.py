"""The starter guard: its tokenizer, teacher, student and release."""
