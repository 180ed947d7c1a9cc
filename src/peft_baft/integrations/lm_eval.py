"""A model class for EleutherAI's lm-evaluation-harness that applies edits to the same tokens as generation does.

The harness scores a context and its continuation as one text and reads the logits of the continuation. Its own class does not
state where the context ends, so a BaFT adapter would edit the end of the continuation. Here every request states it.

Importing this file registers the model under the name `baft-hf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from peft_baft.adapter import find_context, prompt_lengths
from peft_baft.loading import locate_model

NAME = "baft-hf"
CAUSAL = "causal"
# The key in the harness's cache (None: do not cache), the tokens of the context, and those of the continuation.
Request = tuple[Any, list[int], list[int]]
# The input tokens of a forward, the number of prompt tokens, and the number of last tokens that predict the continuation.
Text = tuple[tuple[int, ...], int, int]


@register_model(NAME)
class BaftLM(HFLM):
    """`HFLM` for causal language models with an adapter. It accepts the same arguments.

    Args:
        pretrained: as for `HFLM`; also `smollm2`, a GGUF file, or a folder with one.
        peft: the adapter's folder or Hub id. Omit it if `pretrained` is a model that already has its adapter.

    Raises:
        ValueError: the model is not a causal language model.
    """

    def __init__(self, pretrained: str | PreTrainedModel | PeftModel, **kwargs: Any) -> None:
        if isinstance(pretrained, str):
            pretrained, gguf = locate_model(pretrained)
            if gguf is not None:
                kwargs.setdefault("gguf_file", gguf)
                kwargs.setdefault("dtype", "float32")
        super().__init__(pretrained, **kwargs)
        if self.backend != CAUSAL:
            raise ValueError(
                f"{NAME} only supports causal language models, not {type(self.model).__name__}."
            )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding would produce it."""
        texts = [self._text(request) for request in requests]
        # Continuations of one token with the same context have the same input, which is run once. Long texts first, as in `HFLM`.
        different = sorted(set(texts), key=lambda text: (-len(text[0]), text))
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size(requests)
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        places: dict[Text, list[int]] = {}
        for number, text in enumerate(texts):
            places.setdefault(text, []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(different), int(size)):
            batch = different[start : start + int(size)]
            for text, logits in zip(batch, self._continuation_logits(batch), strict=True):
                for number in places[text]:
                    answers[number] = self._answer(requests[number], logits)
                    bar.update()
        bar.close()
        return [answers[number] for number in range(len(requests))]

    def _text(self, request: Request) -> Text:
        """Join a request's tokens, without the last one, which predicts nothing; truncate on the left if they are too long."""
        key, context, continuation = request
        ids = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
        prompt = max(0, len(ids) + 1 - len(continuation))
        # If a whole text is scored, window by window, only the prefix token that the harness adds is prompt.
        if key is None and context != [self.prefix_token_id]:
            prompt = 0
        return ids, prompt, min(len(continuation), len(ids))

    def _continuation_logits(self, texts: Sequence[Text]) -> Iterator[Tensor]:
        """Run a batch and yield the logits of each text's continuation, (tokens of the continuation, vocabulary)."""
        width = max(len(ids) for ids, _, _ in texts)
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (tokens, _, _) in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        lengths = [prompt for _, prompt, _ in texts]
        has_edits = find_context(self.model) is not None
        kind, precision = self.device.type, self.mixed_precision_dtype
        with (
            torch.no_grad(),
            torch.autocast(kind, dtype=precision, enabled=precision is not None),
            prompt_lengths(self.model, lengths) if has_edits else nullcontext(),
        ):
            logits = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device)
            ).logits
        for row, (tokens, _, count) in enumerate(texts):
            yield logits[row, len(tokens) - count : len(tokens)]

    def _answer(self, request: Request, logits: Tensor) -> tuple[float, bool]:
        """Score one continuation, and add the result to the harness's cache."""
        key, _, continuation = request
        wanted = torch.tensor(continuation[-len(logits) :], device=logits.device)
        likely = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
        total = float(likely.gather(1, wanted[:, None]).sum())
        answer = (total, bool((logits.argmax(-1) == wanted).all()))
        if key is not None:  # windows of a whole text are not cached
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return answer
