"""transformers: classifiers, segmentation, detection, depth, audio."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from _libraries.case import Case, Library, named, noise, of_images


def _built(kind: str, task: str, **options: Any) -> nn.Module:
    config = named(f"transformers.{kind}Config")(**options)
    return named(f"transformers.{kind}{task}")(config)


def _images(kind: str, task: str, side: int, other: int | None = None, **options: Any) -> Case:
    return of_images(_built(kind, task, **options), side, other)


def _classifier(kind: str, side: int = 96, other: int | None = 128, **options: Any) -> Case:
    return _images(kind, "ForImageClassification", side, other, **options)


def _resnet(**options: Any) -> Any:
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
    return named("transformers.ResNetConfig")(**(small | {"layer_type": "basic"} | options))


_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _resnet_backbone() -> Case:
    model = named("transformers.ResNetBackbone")(_resnet(out_features=_STAGES))
    return of_images(model, 64, 96)


def _upernet(backbone: str = "ResNet") -> Case:
    config = named(f"transformers.{backbone}Config")(
        out_features=_STAGES, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128]
    )
    return _images(
        "UperNet", "ForSemanticSegmentation", 64, 96, backbone_config=config, hidden_size=64,
        auxiliary_in_channels=64, auxiliary_channels=32,
    )  # fmt: skip


def _dpt() -> Case:
    return _images(
        "DPT", "ForSemanticSegmentation", 64, None, image_size=64, patch_size=16, hidden_size=48,
        num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 24, 32, 48],
        fusion_hidden_size=32, use_batch_norm_in_fusion_residual=True,
    )  # fmt: skip


_DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 10,
}  # fmt: skip


def _detr(kind: str, levels: tuple[str, ...] = ("stage4",), **options: Any) -> Case:
    given = _DETR | {"backbone_config": _resnet(out_features=list(levels))} | options
    model = _built(kind, "ForObjectDetection", **given)

    return of_images(model, 128, 160)


def _audio(kind: str, task: str = "Model", **options: Any) -> Case:
    model = _built(kind, task, **options)
    return Case(model, (noise(1, 4000),), (noise(2, 6000),))


_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


LIBRARY = Library(
    "transformers",
    {
        "mobilenet_v1": partial(_classifier, "MobileNetV1"),
        "mobilenet_v2": partial(_classifier, "MobileNetV2"),
        "resnet": partial(_classifier, "ResNet"),
        "regnet": partial(_classifier, "RegNet"),
        "levit": partial(_classifier, "Levit", 224, None),
        "efficientnet": partial(
            _classifier, "EfficientNet", width_coefficient=0.5, depth_coefficient=0.5,
            hidden_dim=640,
        ),
        "bit": partial(_classifier, "Bit", depths=[1, 1, 1, 1]),
        "convnext": partial(_classifier, "ConvNext", depths=[1, 1, 2, 1]),
        "convnext_v2": partial(_classifier, "ConvNextV2", depths=[1, 1, 2, 1]),
        "poolformer": partial(_classifier, "PoolFormer"),
        "mobilevit": partial(_classifier, "MobileViT"),
        "mobilevit_v2": partial(_classifier, "MobileViTV2", width_multiplier=0.5),
        "cvt": partial(_classifier, "Cvt", depth=[1, 2, 3]),
        "pvt_v2": partial(_classifier, "PvtV2"),
        "segformer": partial(_classifier, "Segformer"),
        "focalnet": partial(_classifier, "FocalNet", depths=[1, 1, 1, 1]),
        "swiftformer": partial(_classifier, "SwiftFormer", depths=[1, 1, 2, 1]),
        "hgnet_v2": partial(_classifier, "HGNetV2"),
        "textnet": partial(_classifier, "TextNet"),
        "pp_lcnet": partial(_classifier, "PPLCNet"),
        "mobilenet_v2_segmentation": partial(
            _images, "MobileNetV2", "ForSemanticSegmentation", 96, 128
        ),
        "mobilevit_segmentation": partial(_images, "MobileViT", "ForSemanticSegmentation", 96, 128),
        "mobilevit_v2_segmentation": partial(
            _images, "MobileViTV2", "ForSemanticSegmentation", 96, 128, width_multiplier=0.5
        ),
        "segformer_segmentation": partial(_images, "Segformer", "ForSemanticSegmentation", 96, 128),
        "upernet_resnet": _upernet,
        "upernet_convnext": partial(_upernet, "ConvNext"),
        "resnet_backbone": _resnet_backbone,
        "dpt_segmentation": _dpt,
        "glpn_depth": partial(_images, "GLPN", "ForDepthEstimation", 96, 128),
        "superpoint": partial(_images, "SuperPoint", "ForKeypointDetection", 64, None),
        "detr": partial(_detr, "Detr"),
        "conditional_detr": partial(_detr, "ConditionalDetr"),
        "dab_detr": partial(
            _detr, "DabDetr", hidden_size=32, backbone_config=None
        ),
        "deformable_detr": partial(
            _detr, "DeformableDetr", ("stage2", "stage3", "stage4"), num_feature_levels=4,
            decoder_layers=2,
        ),
        "wav2vec2_conformer": partial(
            _audio, "Wav2Vec2Conformer", conv_dim=(16, 16, 16), conv_stride=(5, 2, 2),
            conv_kernel=(10, 3, 3), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            **_TRANSFORMER,
        ),
    },
)  # fmt: skip
