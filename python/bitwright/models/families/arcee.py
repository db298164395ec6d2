"""AFM of Arcee: a Llama whose MLP has no gate and squares what it does not cut off."""

from bitwright.models.architecture import Mlp, Relative

FAMILIES = (
    Relative(
        model_types=("arcee",),
        of="llama",
        rules={
            "defaults": {
                "hidden_size": 2560,
                "intermediate_size": 18432,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "hidden_act": "relu2",
            },
        },
        parts={"mlp": Mlp(gate=None)},
    ),
)
