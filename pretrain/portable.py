"""A release's encoder in forms that run where voxelith is not: torch.export and ONNX.

    encoder.pt2 or encoder.onnx   weights and steps: image [B, C, D, H, W] to named outputs
    encoder.json                  what goes in and comes out, what must be done to a scan before,
                                  whose weights these are, and how far the outputs are from ours

Preprocessing is not part of it: it asks for a whole scan, and the network sees windows. A form is
compared with the encoder on the release's golden scan and on random images, of other sizes where
it takes them, before it appears.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from data_prep.errors import CorruptionError, InputError
from data_prep.files import atomic_folder, file_digest, write_json
from data_prep.volume import as_known, read_channels
from pretrain.backbones.backbone import Backbone
from pretrain.backbones.vit import TokenBackbone
from pretrain.encoder import padded_to
from pretrain.release import Release, golden_modality, relative_error
from pretrain.run_folder import versions

FACTS = "encoder.json"
TORCH_TOLERANCE = 1e-5
"""Of each output, relative to its largest value, in float32 on a CPU."""
ONNX_TOLERANCE = 1e-4
"""The same of onnxruntime, whose kernels are others."""
PROTOBUF_LIMIT = 2**31 - 2**26
"""Bytes of weights that still go into one ONNX file, with room for the graph."""

Images = list[Tensor]


class PortableEncoder(nn.Module):
    """What is exported: an image [B, C, D, H, W] to all that the encoder says of it.

    `map_1` to `map_n` are the feature maps, finest first; `cls` [B, E] is the class token after the
    final norm, where there is one; `vector` [B, E] is the mean over the cells of the last map.
    """

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Returns the outputs by name."""
        told: dict[str, Tensor] = {}
        if has_class_token(self.encoder):
            maps, prefix = self.encoder.maps_and_prefix(image)
            told["cls"] = prefix[:, 0]
        else:
            maps = self.encoder(image)
        named = {f"map_{number}": found for number, found in enumerate(maps, start=1)}
        return named | told | {"vector": _spatial_mean(maps[-1]).flatten(1)}


def has_class_token(encoder: Backbone) -> TypeGuard[TokenBackbone]:
    """Whether the first prefix token is a class token; registers alone are none."""
    return isinstance(encoder, TokenBackbone) and getattr(encoder, "cls_token", None) is not None


def write_torch_export(release: Release, output: Path) -> dict[str, Any]:
    """Writes the encoder as a program of torch.export, which torch alone runs.

    Args:
        release: a verified one.
        output: folder that is made.

    Returns:
        What encoder.json says.

    Raises:
        InputError: `output` exists, or torch.export cannot take the backbone.
        CorruptionError: the program gives other features than the encoder.
    """
    with atomic_folder(output) as folder:
        module = load_portable(release)
        return save_program(release, module, folder / "encoder.pt2")


def write_onnx(release: Release, output: Path) -> dict[str, Any]:
    """Writes the encoder as ONNX; as `write_torch_export`.

    Weights are in the file itself, unless they are more than its format holds (2 GiB).

    Raises:
        InputError: as there, or the packages for it are not installed.
        CorruptionError: as there.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise InputError(
            f"form=onnx: {error.name} is not installed; pip install 'voxelith[onnx]'"
        ) from error
    with atomic_folder(output) as folder:
        module = load_portable(release)
        encoder = module.encoder
        program = export_program(release, module).run_decompositions(_ONNX_STEPS)
        weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        file = folder / "encoder.onnx"
        try:
            made = torch.onnx.export(
                program,
                input_names=["image"],
                output_names=list(output_facts(encoder)),
                dynamo=True,
                verbose=False,
            )
            assert made is not None  # it is where dynamo is True
            made.save(file, external_data=weights > PROTOBUF_LIMIT)
        except Exception as error:
            raise _refused(release, "ONNX", error) from error
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_outputs()]

        def run(image: Tensor) -> dict[str, Tensor]:
            found = session.run(names, {"image": image.numpy()})
            return {name: torch.from_numpy(v) for name, v in zip(names, found, strict=True)}

        errors = compare(release, module, run, ONNX_TOLERANCE)
        packages = {part.__name__: part.__version__ for part in (onnx, onnxscript, onnxruntime)}
        return _write_facts(release, module, file, errors, ONNX_TOLERANCE, packages)


def load_portable(release: Release) -> PortableEncoder:
    """The release's encoder with its weights, ready to be exported."""
    encoder = release.build_encoder()
    release.load(encoder)
    return PortableEncoder(encoder).eval().requires_grad_(False)


def save_program(release: Release, module: PortableEncoder, file: Path) -> dict[str, Any]:
    """Writes a program of torch.export with encoder.json beside it, reads it back and compares.

    Raises:
        InputError: torch.export cannot take the backbone.
        CorruptionError: the program gives other features than the encoder.
    """
    torch.export.save(export_program(release, module), file)
    errors = compare(release, module, torch.export.load(file).module(), TORCH_TOLERANCE)
    return _write_facts(release, module, file, errors, TORCH_TOLERANCE, {})


def export_program(release: Release, module: PortableEncoder) -> ExportedProgram:
    """The program, for any batch and for the sizes that `sizes` tells.

    Raises:
        InputError: torch.export cannot take the backbone.
    """
    dimensions: dict[int, Any] = {0: Dim("batch", min=1)}
    for axis, size in enumerate(sizes(release, module.encoder), start=2):
        if "multiple_of" in size:
            cells = Dim(f"cells_{axis}", min=2)
            dimensions[axis] = size["multiple_of"] * cells if size["multiple_of"] > 1 else cells
    # A batch of one would be taken for a constant.
    image = torch.zeros(2, module.encoder.in_channels, *release.crop_size)
    try:
        with torch.no_grad():
            program = torch.export.export(module, (image,), dynamic_shapes={"image": dimensions})
    except Exception as error:
        raise _refused(release, "torch.export", error) from error
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine, line by line
    return program


def sizes(release: Release, encoder: Backbone) -> list[dict[str, int]]:
    """What D, H and W of an image may be: multiples of a stride, or fixed.

    An axis of a single cell, as that of slices, stays one; two cells are the least of any other.
    """
    return [
        {"multiple_of": stride, "at_least": 2 * stride}
        if encoder.any_size and side > stride
        else {"fixed": side}
        for side, stride in zip(release.crop_size, encoder.strides[-1], strict=True)
    ]


def compare(
    release: Release,
    module: PortableEncoder,
    run: Callable[[Tensor], dict[str, Tensor]],
    tolerance: float,
) -> dict[str, float]:
    """The largest error of each output, relative to its largest value, over `trial_images`.

    Raises:
        CorruptionError: one is above the tolerance, or outputs are missing.
    """
    errors: dict[str, float] = {}
    for image in trial_images(release, module.encoder):
        with torch.no_grad():
            expected = module(image)
            try:
                found = run(image)
            except Exception as error:
                raise _refused(release, f"the program of {list(image.shape)}", error) from error
        for name, value in expected.items():
            errors[name] = max(errors.get(name, 0.0), relative_error(found.get(name), value))
    wrong = {name: off for name, off in errors.items() if off > tolerance}
    if wrong:
        said = ", ".join(f"{name} by {off:.1e}" for name, off in wrong.items())
        raise CorruptionError(
            f"{release.path}: the exported encoder differs from the release's: {said} (relative to "
            f"the largest value), allowed {tolerance:.0e}; nothing was written"
        )
    return errors


def trial_images(release: Release, encoder: Backbone) -> Images:
    """The golden scan's first window, and random images: of the fewest cells, and of more."""
    draws = torch.Generator().manual_seed(0)
    allowed = list(zip(sizes(release, encoder), release.crop_size, strict=True))
    least = [size.get("at_least", side) for size, side in allowed]
    more = [side + size.get("multiple_of", 0) for size, side in allowed]
    images = [golden_window(release, encoder)]
    for batch, shape in ((3, least), (1, more)):
        images.append(torch.randn(batch, encoder.in_channels, *shape, generator=draws))
    return images


def golden_window(release: Release, encoder: Backbone) -> Tensor:
    """The first window [1, C, D, H, W] that `Encoder.features` sees of the golden scan."""
    scans = [release.path / "golden_input.nii.gz"] * encoder.in_channels
    volume = as_known(read_channels(scans, golden_modality(release.modalities)), release.modalities)
    image = torch.from_numpy(release.preprocess.apply(volume).array.copy())[None]
    shape = [max(n, k) for n, k in zip(image.shape[2:], release.crop_size, strict=True)]
    d, h, w = release.crop_size
    return padded_to(image, shape)[:, :, :d, :h, :w].contiguous()


def output_facts(encoder: Backbone) -> dict[str, dict[str, Any]]:
    """What each output is, in the order in which they come."""
    told: dict[str, dict[str, Any]] = {
        f"map_{number}": {"axes": "B,E,d,h,w", "channels": channels, "stride": list(stride)}
        for number, (channels, stride) in enumerate(
            zip(encoder.channels, encoder.strides, strict=True), start=1
        )
    }
    last, width = list(told)[-1], encoder.channels[-1]
    if has_class_token(encoder):
        told["cls"] = {"axes": "B,E", "channels": width, "what": "class token"}
    told["vector"] = {
        "axes": "B,E",
        "channels": width,
        "what": f"mean over the cells of {last}: of a scan that fills the window, its vector",
    }
    return told


def _write_facts(
    release: Release,
    module: PortableEncoder,
    file: Path,
    errors: dict[str, float],
    tolerance: float,
    packages: dict[str, str],
) -> dict[str, Any]:
    encoder = module.encoder
    d, h, w = sizes(release, encoder)
    facts = {
        "file": {"name": file.name, "sha256": file_digest(file)},
        "release": {"name": release.name, "digest": release.digest},
        "input": {
            "name": "image",
            "axes": "B,C,D,H,W",
            "dtype": "float32",
            "channels": encoder.in_channels,
            "sizes": {"D": d, "H": h, "W": w},
            "what": "a scan after `preprocess`, or a window of it",
        },
        "outputs": {
            name: {**told, "error": errors[name]} for name, told in output_facts(encoder).items()
        },
        "tolerance": tolerance,
        "crop_size": list(release.crop_size),
        "modalities": list(release.modalities),
        "spacing_mm": release.preprocess.spacing_mm,
        "preprocess": release.preprocess.to_dict(),
        "versions": versions() | packages,
    }
    write_json(file.parent / FACTS, facts)
    return facts


def _refused(release: Release, form: str, error: BaseException) -> InputError:
    while error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split("\n\n")[0].split())[:400]
    return InputError(
        f"{release.path}: {form} cannot have backbone {release.config['backbone']['name']}: "
        f"{type(error).__name__}: {reason}; if the backbone chooses its steps by the size of a "
        "crop, it must say any_size = False"
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention step by step: of windows it has five axes, ONNX knows four."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    """Instance norm whose sums go axis by axis.

    onnxruntime sums all voxels in one float32: of 64x96x96 that are mostly air, 2e-4 are lost.
    """
    centred = x - _spatial_mean(x)
    made = centred * (_spatial_mean(centred.square()) + eps).rsqrt()
    if weight is None or bias is None:
        return made
    shape = (-1, *(1 for _ in x.shape[2:]))
    return made * weight.view(shape) + bias.view(shape)


def _spatial_mean(x: Tensor) -> Tensor:
    for axis in range(x.dim() - 1, 1, -1):
        x = x.mean(axis, keepdim=True)
    return x


_ONNX_STEPS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.instance_norm.default: _instance_norm,
}
"""Operations that ONNX gets in other words; `compare` sees whether they mean the same."""
