"""Mistral 3: a Mistral, Ministral 3 or Mistral Small 4 that sees images."""

from bitwright.models.architecture import Wrapper, beside

FAMILIES = (
    Wrapper(
        model_types=("mistral3",),
        texts=("mistral", "ministral3", "mistral4"),
        names=(
            beside("language_model.model", "language_model.lm_head"),
            beside("model.language_model"),
        ),
        harmless=(
            "vision_config",
            "image_token_index",
            "image_token_id",
            "projector_hidden_act",
            "vision_feature_layer",
            "multimodal_projector_bias",
            "spatial_merge_size",
        ),
    ),
)
