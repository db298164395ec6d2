"""Gradients of whole models next to those of torch's autograd through transformers."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shared_data import ARCH, TINY

import bitwright
from bitwright import _kernels
from bitwright.distill.losses import DistillationLoss, TopTokens, next_tokens
from bitwright.models.network import Network

REASON = 'needs pip install ".[transformers]"'
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def plain(name: str) -> str:
    """The name of a tensor, whatever comes before the decoder's."""
    return name.replace("language_model.", "").removeprefix("model.").removesuffix(".weight")


# Transformers loads the first only with their towers; of the others' own parts, which nothing trains, the
# kernels' tests have the gradients.
NOT_COMPARED = (
    *("mistral3-ministral3", "mistral3-mistral4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next", "gpt_oss", "lfm2", "lfm2_moe"),
    *("bamba", "granitemoehybrid", "granitemoehybrid-experts"),
    *("falcon_h1", "falcon_h1-gated", "mamba2", "nemotron_h"),
)


@pytest.mark.parametrize(
    "folder",
    [folder for folder in (*TINY, *ARCH) if folder.name not in NOT_COMPARED],
    ids=lambda folder: f"{folder.parent.name}-{folder.name}",
)
def test_gradients_are_those_of_autograd(folder: Any) -> None:
    model = bitwright.load_model(folder)
    vocabulary = model.config.vocab_size
    # Torch gives the row of the padding token, 0, no gradient.
    ids = np.random.default_rng(0).integers(1, vocabulary, (2, 40)).astype(np.int32)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = loaded(torch.tensor(ids.astype(np.int64))).logits[:, :-1]
    following = torch.tensor(ids[:, 1:].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, vocabulary), following.reshape(-1), reduction="sum"
    )
    loss.backward()
    wanted = {
        plain(name): each.grad.numpy()
        for name, each in loaded.named_parameters()
        if each.grad is not None
    }

    found: dict[str, NDArray[Any]] = {}

    def on_linear(name: str, inputs: NDArray[Any], above: NDArray[Any]) -> None:
        start = found.setdefault(name, np.zeros((above.shape[1], inputs.shape[1]), np.float32))
        _kernels.linear_backward_weight(above, inputs, start)

    def on_embedding(rows: NDArray[np.int32], above: NDArray[Any]) -> None:
        start = np.zeros((vocabulary, model.config.hidden_size), np.float32)
        np.add.at(found.setdefault(model.embedding_name, start), rows, above)

    vectors = {
        model.block_prefix(index) + name: np.zeros(shape, np.float32)
        for index, layout in enumerate(model.layouts)
        for name, shape in layout.vectors.items()
    }
    for name in model.final_operations().vectors:
        vectors[name] = np.zeros(model.config.hidden_size, np.float32)
    unused = TopTokens.of(np.zeros((ids.size, vocabulary), np.float32), 1)
    losses = Network(model).gradients(
        ids,
        DistillationLoss(unused.rows, next_tokens(ids), "cross_entropy"),
        on_linear,
        on_embedding=on_embedding,
        on_head=on_linear,
        vector_gradients=vectors,
    )
    assert losses.sum() == pytest.approx(float(loss.detach()), rel=1e-5)
    found = {plain(name): array for name, array in (found | vectors).items()}
    compared = 0
    for name, gradient in found.items():
        if name in wanted:  # not experts, which transformers has in one array
            assert gradient.shape == wanted[name].shape, name
            largest = max(float(np.abs(wanted[name]).max()), 1e-3)
            np.testing.assert_allclose(
                gradient, wanted[name], rtol=0, atol=2e-4 * largest, err_msg=name
            )
            compared += 1
    assert compared >= len(wanted) - 3 * len(model.layouts)  # experts, and what is named otherwise
