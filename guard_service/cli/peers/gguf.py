"""llama.cpp on a GGUF file, with its prompt cache: greedy until the verdict is out."""

from __future__ import annotations

from pathlib import Path

from guard_service.cli.peers import Answer, Question, needed

_CONTEXT = 2048


class Gguf:
    """Keeps keys and values of the last prompt and computes from the first token that differs."""

    def __init__(self, file: Path, threads: int) -> None:
        llama_cpp = needed("llama_cpp", "peers")
        self._model = llama_cpp.Llama(
            str(file),
            n_ctx=_CONTEXT,
            n_batch=_CONTEXT,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=True,
            verbose=False,
        )

    def verdict(self, question: Question, decode: int) -> Answer:
        """See Peer."""
        model, ids = self._model, question.ids
        held = model.input_ids[: model.n_tokens].tolist()
        known: int = model.longest_token_prefix(held, ids[:-1])
        writing = model.generate(ids, temp=0.0, repeat_penalty=1.0)
        written = tuple(int(next(writing)) for _ in range(decode))
        writing.close()
        return Answer(len(ids) - known + decode - 1, written)
