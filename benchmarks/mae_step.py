"""Our masked autoencoder's step beside MONAI's MaskedAutoEncoderViT at equal sizes, in one run.

    python benchmarks/mae_step.py [--crop 96 96 96] [--batch 2] [--device cpu] [--output FILE]

Both have the same width, depth, heads, MLP, patch, mask ratio, decoder, class token and biases, the
paper's loss on per-patch normalised targets, and AdamW without clipping. The steps take turns, so
that a busy machine slows both; each ratio is of two neighbours. MONAI's net has no loss and no
optimiser of its own: the paper's loss is written here as its users write it, and the optimiser is
torch.optim.AdamW as they call it; ours is the one that our loop makes. Forward and backward pass
are also timed alone, where the optimiser has no part.

What differs is how the same result is had: MONAI embeds all patches and rebuilds all of them, ours
embeds the visible ones and rebuilds the hidden ones; MONAI's attention writes out its scores, ours
is fused, and so is our AdamW. Parameters and operations of both are printed, so that equality can
be seen. The fewer the tokens, the more of the time is matrix products that both do alike.
The peak of memory is that of all tensors of one step, weights and optimiser included; what lives
within an operation, such as a matrix product's workspace, is not seen.
Ours in bf16, and compiled, is timed beside it; MONAI's net (1.6.1) stops in bf16 autocast, where it
writes bf16 tokens into float32 mask tokens.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from line import ROOT
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from torch import Tensor

from data_prep.files import write_json
from pretrain.backbones.vit import ViT3D
from pretrain.bench import machine, spread
from pretrain.estimate import StorageCounter, counted_flops
from pretrain.loop import compile_parts
from pretrain.objective import Batch
from pretrain.objectives.mae import MAE
from pretrain.optim import make_optimizer
from pretrain.run_folder import versions
from pretrain.settings import LoopSettings

Loss = Callable[[], Tensor]
PARTS = ("step", "forward and backward")


def main() -> None:
    chosen = _arguments()
    device = torch.device(chosen.device)
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    image = torch.randn(chosen.batch, 1, *chosen.crop, device=device)
    monai, ours = _monai(chosen).to(device), _ours(chosen).to(device)
    forward = {"monai": _monai_loss(monai, image, chosen), "ours": _our_loss(ours, image)}
    work = {
        name: {
            "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
            "flops_per_step": counted_flops(lambda name=name: forward[name]().backward()),
        }
        for name, net in (("monai", monai), ("ours", ours))
    }
    for name, cost in work.items():
        print(
            f"{name:<6} {cost['parameters'] / 1e6:.2f} M parameters, "
            f"{cost['flops_per_step'] / 1e9:.1f} GFLOP a step"
        )

    adamw = {"monai": _plain_adamw(monai), "ours": _our_adamw(ours)}
    steps = {
        "monai float32": _step(forward["monai"], adamw["monai"], device),
        "ours float32": _step(forward["ours"], adamw["ours"], device),
        "ours bf16": _step(forward["ours"], _our_adamw(ours), device, bf16=True),
    }
    if chosen.compile:
        compiled = _ours(chosen).to(device)
        compile_parts(compiled)
        loss, optimizer = _our_loss(compiled, image), _our_adamw(compiled)
        steps["ours float32 compiled"] = _step(loss, optimizer, device)
        steps["ours bf16 compiled"] = _step(loss, optimizer, device, bf16=True)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in PARTS} for name in steps
    }
    for repeat in range(chosen.discard + chosen.repeats):
        for name, step in steps.items():
            for part, spent in zip(PARTS, step(), strict=True):
                if repeat >= chosen.discard:
                    seconds[name][part].append(spent)

    peaks = {  # compiled code hides from this count what it keeps
        name: _peak(step, *((monai, adamw["monai"]) if "monai" in name else (ours, adamw["ours"])))
        for name, step in steps.items()
        if "compiled" not in name
    }

    base = seconds["monai float32"]
    against = {
        name: {
            part: spread([m / o for m, o in zip(base[part], spent[part], strict=True)])
            for part in PARTS
        }
        for name, spent in seconds.items()
        if spent is not base
    }
    for name, spent in seconds.items():
        whole = spread(spent["step"])
        line = f"{name:<22} {whole['median']:.4f} s ({whole['low']:.4f} to {whole['high']:.4f})"
        if name in against:
            ratio, inner = (against[name][part] for part in PARTS)
            line += (
                f"; {ratio['median']:.2f}x as fast as MONAI ({ratio['low']:.2f} to "
                f"{ratio['high']:.2f}), without optimiser {inner['median']:.2f}x"
            )
        if name in peaks:
            line += f"; peak {peaks[name] / 2**20:.0f} MiB"
        print(line)
    result = {
        "sizes": {name: value for name, value in vars(chosen).items() if name != "output"},
        "work": work,
        "seconds_per_step": {name: spread(spent["step"]) for name, spent in seconds.items()},
        "speed_over_monai": against,
        "peak_bytes": peaks,
        "seconds": seconds,
        "machine": {**machine(device), "load_before": load},
        "versions": versions(),
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output, result)
    print(f"{chosen.output}: written")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crop", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 6")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--decoder-width", type=int, default=384, help="a multiple of 6")
    parser.add_argument("--decoder-depth", type=int, default=4)
    parser.add_argument("--decoder-heads", type=int, default=12)
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--discard", type=int, default=3, help="steps of each before the first")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    results = ROOT / "docs" / "results"
    parser.add_argument("--output", type=Path, default=results / "mae_step.json")
    return parser.parse_args()


def _monai(chosen: argparse.Namespace) -> MaskedAutoEncoderViT:
    return MaskedAutoEncoderViT(
        in_channels=1,
        img_size=chosen.crop,
        patch_size=chosen.patch,
        hidden_size=chosen.width,
        mlp_dim=4 * chosen.width,
        num_layers=chosen.depth,
        num_heads=chosen.heads,
        masking_ratio=chosen.mask_ratio,
        decoder_hidden_size=chosen.decoder_width,
        decoder_mlp_dim=4 * chosen.decoder_width,
        decoder_num_layers=chosen.decoder_depth,
        decoder_num_heads=chosen.decoder_heads,
        qkv_bias=True,
    )


def _ours(chosen: argparse.Namespace) -> MAE:
    encoder = ViT3D(
        patch_size=chosen.patch,
        embed_dim=chosen.width,
        depth=chosen.depth,
        num_heads=chosen.heads,
        cls_token=True,
    )
    return MAE(
        encoder=encoder,
        decoder_dim=chosen.decoder_width,
        decoder_depth=chosen.decoder_depth,
        decoder_heads=chosen.decoder_heads,
        mask_ratio=chosen.mask_ratio,
    )


def _monai_loss(net: MaskedAutoEncoderViT, image: Tensor, chosen: argparse.Namespace) -> Loss:
    p = chosen.patch
    grid = [side // p for side in chosen.crop]

    def loss() -> Tensor:
        prediction, hidden = net(image)  # [B, N, P], 1 = hidden
        x = image.reshape(len(image), 1, grid[0], p, grid[1], p, grid[2], p)
        target = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(len(image), -1, p**3)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(-1)
        return (error * hidden).sum() / hidden.sum()

    return loss


def _our_loss(objective: MAE, image: Tensor) -> Loss:
    samples, device = len(image), image.device
    batch = Batch(
        image=image,
        valid=torch.ones(samples, 1, *image.shape[2:], dtype=torch.bool, device=device),
        spacing=torch.ones(samples, 3, device=device),
        seeds=torch.arange(samples, device=device),
    )

    def loss() -> Tensor:
        batch.seeds = batch.seeds + samples  # another mask in each step
        found: Tensor = objective(batch, 0.5).loss
        return found

    return loss


def _plain_adamw(net: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)


def _our_adamw(net: torch.nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(
        net, LoopSettings(crop_size=(1, 1, 1), steps=1, batch_size=1, lr=1e-4, weight_decay=0.05)
    )


def _step(
    forward: Loss,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    bf16: bool = False,
) -> Callable[[], tuple[float, float]]:
    """Steps, and returns the seconds of all of it and of its forward and backward pass."""

    def step() -> tuple[float, float]:
        began = _now(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = forward()
        loss.backward()
        middle = _now(device)
        optimizer.step()
        return _now(device) - began, middle - began

    return step


def _peak(
    step: Callable[[], object], net: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Most bytes that tensors hold at once in a step that follows another one."""
    with StorageCounter() as storages:
        state = [list(one.values()) for one in optimizer.state.values()]
        storages.count([*net.parameters(), *net.buffers(), *state])
        net.zero_grad()
        storages.peak = storages.live
        step()
        return storages.peak


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
