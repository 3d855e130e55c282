#!/usr/bin/env bash
# A forward pass under FakeTensorMode computes nothing, or so one would guess. With a real nn.BatchNorm2d in training mode
# and a fake input, torch 2.13.0 counts the batch for real: `num_batches_tracked` goes up, while the running statistics stay.
# The counter's in-place add has only real arguments, so the mode lets it run; the statistics' update has a fake one.
# A dry run (shape inference, memory estimates, `vf.explain`) that leaves the buffers in place changes a checkpoint, and with
# momentum=None the next averages. `torch.func.functional_call` with fake parameters and buffers leaves all as it was.
#
# Seen on 2026-11-30 with torch 2.13.0:
#   in place: counter 1, mean moved False
#   functional_call: counter 0, mean moved False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def counted(fake_state: bool) -> str:
    norm = torch.nn.BatchNorm2d(4)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.ones(2, 4, 3, 3)
        if fake_state:
            state = {n: mode.from_tensor(t) for n, t in (*norm.named_parameters(), *norm.named_buffers())}
            torch.func.functional_call(norm, state, (x,))
        else:
            norm(x)
    moved = bool((norm.running_mean != 0).any())
    return f"counter {norm.num_batches_tracked.item()}, mean moved {moved}"


print("in place:", counted(False))
print("functional_call:", counted(True))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
in place: counter 1, mean moved False
functional_call: counter 0, mean moved False
SEEN
echo "as described"
