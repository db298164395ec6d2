"""GLM 4 of 2024: GLM 4 without norms after attention and MLP."""

from bitwright.models.architecture import Relative

FAMILIES = (
    Relative(
        model_types=("glm",),
        of="glm4",
        parts={"attention_post_norm": None, "mlp_post_norm": None},
    ),
)
