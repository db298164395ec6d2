"""The states of tokens before the first block that is left of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.loading.model import Model
from bitwright.models.matrix_rows import MatrixRows
from bitwright.models.operations import Float32
from bitwright.runs.journal import Journal
from bitwright.runs.states import ChunkPlan, States, read_states


def opened_states(
    model: Model,
    tokens: NDArray[np.int32],
    plan: ChunkPlan,
    journal: Journal,
    state: Mapping[str, Any] | None,
    name: str = "hidden",
    table: NDArray[Any] | MatrixRows | None = None,
) -> States | None:
    """Look tokens up in the embedding, or read the states that an interrupted run has left.

    Parameters
    ----------
    model
        Whose states.
    tokens
        ``[samples, length]`` int32.
    plan
        The chunks, and how many of them are in memory.
    journal, state
        Of the run; no state for a new one.
    name
        Of the states in the journal.
    table
        The embedding that tokens are looked up in; by default the model's as it is stored.

    Returns
    -------
    States or None
        None if the state has none of this name, as nobody asks for them any more.
    """
    hidden: Iterator[Float32]
    if state is not None:
        with journal.going_on():
            if name not in state["states"]:
                return None
            width = model.config.hidden_size
            place = journal.states_file(state["states"][name], 4 * plan.rows * width)
        hidden = read_states(place, plan, width)
    else:
        matrix, flat = model.embedding_table() if table is None else table, tokens.reshape(-1)
        hidden = (model.embed(flat[plan.place(number)], matrix) for number in plan.numbers)
    return States(plan, hidden)
