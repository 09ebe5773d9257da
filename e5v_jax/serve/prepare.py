"""Items to what the device computes: prompts chosen, equal ones joined, texts tokenised."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from e5v_jax.data.inputs import InputError
from e5v_jax.families.base import Processor
from e5v_jax.prompts import PromptChoice
from e5v_jax.serve.items import Item
from e5v_jax.serve.waiting import Answer, BadItem, Part


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be computed once, and for whom."""

    item: Item
    prompts: PromptChoice
    answers: dict[Answer, None] = field(default_factory=dict)


def choose_parts(
    choose: Callable[..., PromptChoice], items: Sequence[Item], answers: Sequence[Answer]
) -> dict[bytes, Asked]:
    """Find what is to be computed for items, by its key; ``choose`` takes their options.

    An item whose options are bad has its answer failed.
    """
    asked: dict[bytes, Asked] = {}
    for item, answer in zip(items, answers, strict=True):
        try:
            prompts = choose(
                prompt_name=item.prompt_name,
                instruction=item.instruction,
                max_length=item.max_length,
                truncate=item.truncate,
            )
        except ValueError as error:
            answer.fail(BadItem(str(error)))
            continue
        apart = item.apart() if prompts.adds else (item,)
        answer.missing = len(apart)
        for part in apart:
            asked.setdefault(part.key, Asked(part, prompts)).answers[answer] = None
    return asked


def tokenise(processor: Processor, asked: Mapping[bytes, Asked]) -> list[Part]:
    """Measure what is asked for; what cannot be embedded fails the answers that need it."""
    groups: dict[PromptChoice, list[tuple[bytes, Asked]]] = {}
    for key, one in asked.items():
        groups.setdefault(one.prompts, []).append((key, one))
    parts: list[Part] = []
    for prompts, group in groups.items():

        def fail(error: InputError, group: Sequence[tuple[bytes, Asked]] = group) -> None:
            for answer in group[error.position][1].answers:
                answer.fail(BadItem(error.reason))

        inputs = [one.item.input for _, one in group]
        for measured in processor.measure(inputs, prompts, on_error=fail):
            key, one = group[measured.position]
            try:  # here, not where it would end the engine
                processor.padded_length(measured.length, measured.shape_key)
            except ValueError as error:
                fail(InputError(measured.position, str(error)))
                continue
            parts.append(Part(key, measured, one.item.size, answers=one.answers))
    # the other half of one that failed is for nobody
    for part in parts:
        part.answers = {answer: None for answer in part.answers if not answer.future.done()}
    return [part for part in parts if part.answers]
