"""A captured program against its model, before anyone relies on it."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from regraft.program import Program, RegraftError

LENGTH, PADDING, PROMPT = 6, 2, 5
TOLERANCE = 1e-3


def agree(model: PreTrainedModel, program: Program) -> None:
    """Raise RegraftError unless a padded prompt and a step after it give the model's logits.

    A model may run other code for an empty cache or for one token than for what it was captured
    with. Differences up to 1e-3 of the logits' scale (32 eps of a coarser dtype) are rounding:
    trained models amplify it, on special tokens most.
    """
    past = [example[:, :, :0] for example in program.examples[4:]]
    ids = torch.cat([program.examples[0]] * 2, 1)[:, :LENGTH]
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    named = "position_ids" in inspect.signature(model.forward).parameters
    extra = {"position_ids": positions} if named else {}
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
    expected = output.logits.float()
    limit = max(TOLERANCE, 32 * torch.finfo(output.logits.dtype).eps) * expected.abs().max()
    for start, stop, what in ((0, PROMPT, "a prompt"), (PROMPT, LENGTH, "one token")):
        try:
            logits, *past = program(
                ids[:, start:stop], mask[:, :stop], positions[:, start:stop],
                torch.arange(stop - start, device=ids.device), *past,
            )  # fmt: skip
        except (RuntimeError, IndexError, ValueError) as error:
            raise RegraftError(
                f"{type(model).__name__} was captured but cannot run {what}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        seen = mask[:, start:stop].bool()
        difference = (logits.float() - expected[:, start:stop])[seen].abs().max()
        if not difference <= limit:
            raise RegraftError(
                f"{type(model).__name__} runs other code for {what} than for several tokens after "
                f"others: the captured logits differ by {difference / expected.abs().max():.1e} "
                "of their scale"
            )
