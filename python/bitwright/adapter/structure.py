"""Which modules of a model are what: its text decoder's blocks, and in these what chooses experts.

Names differ from family to family, and the same name means another thing in the next; so shapes decide.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

# How modules call the number of their experts, those that each token chooses and shared ones aside.
EXPERT_COUNT = re.compile(r"(?!.*shared)(.*_)?(n|num|total)_(.+_)?experts")


def decoder_blocks(model: Any, nn: Any) -> tuple[str, list[Any]] | None:
    """Return the blocks that text goes through, and the name of their list; None if there is none.

    They are a list of modules that all have linears, in what transformers calls the decoder: never in the
    encoder of images or sounds beside it. Of several lists it is that with as many blocks as the text
    part's config declares, and else the longest.

    Parameters
    ----------
    model
        As transformers has it; shapes are enough.
    nn
        The module ``torch.nn``.
    """
    decoder = model.get_decoder()
    lists: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in lists
        ):
            elements = list(module)
            if elements and all(_has_linear(element, nn) for element in elements):
                lists[name] = elements
    of_text = set(decoder.modules())
    inside = {name: each for name, each in lists.items() if model.get_submodule(name) in of_text}
    lists = inside or lists
    if not lists:
        return None
    declared = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    name = max(lists, key=lambda each: (len(lists[each]) == declared, len(lists[each])))
    return name, lists[name]


def routers(block: Any, nn: Any) -> set[Any]:
    """Return the modules with a matrix that chooses a block's experts, or weighs one that is shared.

    Such a matrix is the only one in its branch beside the experts, and has as many rows as there are
    experts, or one. What is called a gate elsewhere is a linear like others.
    """
    found = set()
    for scope in block.modules():
        rows = _expert_rows(scope, nn)
        if not rows:
            continue
        for branch in scope.children():
            matrices = [each for each in branch.modules() if _is_matrix(each, nn)]
            if len(matrices) == 1 and matrices[0].weight.shape[0] in rows:
                found.add(matrices[0])
    return found


def _expert_rows(scope: Any, nn: Any) -> set[int]:
    """Return how many rows a router in a module may have; none where there are no experts in it."""
    children = list(scope.children())
    counts = set()
    for module in (scope, *children):
        counts |= set(_declared_counts(module))
        if not isinstance(module, nn.modules.conv._ConvNd):
            counts |= {len(each) for each in module.parameters(recurse=False) if each.ndim == 3}
        if isinstance(module, nn.ModuleList) and all(_has_linear(each, nn) for each in module):
            counts.add(len(module))
    counts = {count for count in counts if count > 1}
    if any(isinstance(child, nn.Embedding) for child in children):  # chosen by two halves of a key
        counts |= {2 * math.isqrt(count) for count in counts}
    return counts and counts | {1}


def _declared_counts(module: Any) -> Iterator[int]:
    for name, value in vars(module).items():
        if type(value) is int and EXPERT_COUNT.fullmatch(name):
            yield value


def _is_matrix(module: Any, nn: Any) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _has_linear(module: Any, nn: Any) -> bool:
    return any(isinstance(each, nn.Linear) for each in module.modules())


def outside(model: Any, blocks: Sequence[Any], nn: Any) -> list[str]:
    """Return the names of the linears outside the blocks, embedding and head aside."""
    inside = {each for block in blocks for each in block.modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in inside and module not in ends
    ]
