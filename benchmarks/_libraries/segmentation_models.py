"""segmentation_models_pytorch: decoders for convolutional encoders, on four of these."""

from __future__ import annotations

from functools import partial

from _libraries.case import Case, Library, named, of_images

_DECODERS = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus",
    "PAN", "UPerNet", "Segformer",
)  # fmt: skip
_ENCODERS = ("resnet18", "vgg11_bn", "efficientnet-b0", "mobilenet_v2")
# Their decoders need a dilated encoder.
_IMPOSSIBLE = {
    ("DeepLabV3", "vgg11_bn"), ("DeepLabV3Plus", "vgg11_bn"), ("PAN", "vgg11_bn"),
}  # fmt: skip


def _model(decoder: str, encoder: str) -> Case:
    build = named(f"segmentation_models_pytorch.{decoder}")
    smallest = 128 if decoder == "PAN" else 64  # its attention pools three times at stride 16
    return of_images(build(encoder, encoder_weights=None), smallest, smallest + 32)


LIBRARY = Library(
    "segmentation-models-pytorch",
    {
        f"{decoder}-{encoder}": partial(_model, decoder, encoder)
        for decoder in _DECODERS
        for encoder in _ENCODERS
        if (decoder, encoder) not in _IMPOSSIBLE
    },
)
