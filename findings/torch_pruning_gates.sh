#!/usr/bin/env bash
# A gate that computes one factor a pixel, or slides along the channels, has no channels to prune, or so one would guess.
# Torch-Pruning 1.6.1 follows channels through means over them and through reshapes. Asked to take two of a layer's 32
# channels, it takes one of the two inputs [mean, maximum] of CBAM's spatial convolution; all 32 channels, if an ECA
# reshapes [N, C] to [N, 1, C] by `view`; and two of the one channel of ECA's convolution, if it does so by indexing. The
# last runs. The others fail at the next call; nothing is said before. Look at `out_channels` and `in_channels` after
# pruning, and at the gate once before you train on.
#
# Seen on 2026-12-01 with torch 2.13.0:
#   no gate: 30 channels, runs
#   ECA by indexing: 30 channels, gate -1 inputs, runs
#   ECA by view: 0 channels, gate -1 inputs, RuntimeError
#   spatial gate: 30 channels, gate 0 inputs, RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torch-pruning==1.6.1
cat > "$folder/run.py" <<'PYTHON'
import torch
import torch_pruning as tp
from torch import nn


class ECA(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


class ECAByView(ECA):
    def forward(self, x):
        return x * self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).view(x.shape[0], -1, 1, 1).sigmoid()


class Spatial(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


def pruned(name: str, gate: nn.Module) -> str:
    net, x = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), gate, nn.Conv2d(32, 8, 1)), torch.randn(1, 3, 8, 8)
    graph = tp.DependencyGraph().build_dependency(net, x)
    graph.get_pruning_group(net[0], tp.prune_conv_out_channels, idxs=[1, 6]).prune()
    inputs = f" gate {gate.conv.in_channels} inputs," if hasattr(gate, "conv") else ""
    try:
        net(x)
        outcome = "runs"
    except RuntimeError:
        outcome = "RuntimeError"
    return f"{name}: {net[0].out_channels} channels,{inputs} {outcome}"


print(pruned("no gate", nn.Identity()))
print(pruned("ECA by indexing", ECA()))
print(pruned("ECA by view", ECAByView()))
print(pruned("spatial gate", Spatial()))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
no gate: 30 channels, runs
ECA by indexing: 30 channels, gate -1 inputs, runs
ECA by view: 0 channels, gate -1 inputs, RuntimeError
spatial gate: 30 channels, gate 0 inputs, RuntimeError
SEEN
echo "as described"
