#!/usr/bin/env bash
# Guess: importing Ultralytics leaves Pillow as it is, so that PIL.Image.open of a file that is no image raises
# PIL.UnidentifiedImageError, which programs that read folders of photographs catch. It does not: the import replaces
# PIL.Image.open for the whole process. The replacement takes any unreadable file for HEIF, tries to install pi-heif with
# pip, and, where it may not or cannot (YOLO_AUTOINSTALL=false, no network), raises ModuleNotFoundError instead. Each such
# file tries again.
#
# Seen on 2026-12-01 with ultralytics 8.4.190 and pillow 13.0.0:
#   before the import: UnidentifiedImageError
#   Image.open is Pillow's own after the import: False
#   after the import: ModuleNotFoundError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 pillow==13.0.0 numpy opencv-python-headless pyyaml requests psutil
"${pip[@]}" --no-deps ultralytics==8.4.190 torchvision==0.28.0
cat > "$folder/run.py" <<'PYTHON'
from pathlib import Path

from PIL import Image

Path("notes.jpg").write_text("not an image")


def error() -> str:
    try:
        Image.open("notes.jpg")
    except Exception as found:
        return type(found).__name__
    return "none"


own = Image.open
print("before the import:", error())
import ultralytics.utils.patches  # noqa: E402, F401

print("Image.open is Pillow's own after the import:", Image.open is own)
print("after the import:", error())
PYTHON
cd "$folder"
YOLO_AUTOINSTALL=false YOLO_OFFLINE=1 YOLO_CONFIG_DIR="$folder" "$folder/venv/bin/python" run.py 2>/dev/null | grep -E "^(before|after|Image)" | tee seen
diff seen - <<'SEEN'
before the import: UnidentifiedImageError
Image.open is Pillow's own after the import: False
after the import: ModuleNotFoundError
SEEN
echo "as described"
