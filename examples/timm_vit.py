# SPDX-License-Identifier: Apache-2.0
"""timm: a ViT pre-trained by our script, then used in two ways: by mio_ext, and by timm alone.

The script is what one would type; `mio-pretrain` is the same where mio_ext is installed with its extra [train]:

    python train/pretrain.py --data folder:photos --backbone timm:vit_tiny_patch16_224 --image-size 64 \
        --optimizer adamw --learning-rate 1e-3 --weight-decay 0.05
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import timm
import torch

from mio_ext.encoder import load_encoder

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "pretrain.py"
MODEL = "test_vit"  # timm's smallest: one that trains in a second
OPTIONS = {
    "--backbone": f"timm:{MODEL}",
    "--data": "digits",  # which scikit-learn brings along
    "--image-size": "32",  # the digits have 8 pixels, and a ViT takes multiples of its patch, here 16
    "--optimizer": "adamw",  # the defaults, SGD with 0.5, are a ResNet's
    "--learning-rate": "1e-3",
    "--epochs": "4",
    "--warmup-epochs": "1",
    "--batch-size": "256",
    "--device": "cpu",
    "--log-every": "1",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "vit"
        given = [word for option in OPTIONS.items() for word in option]
        subprocess.run([sys.executable, SCRIPT, *given, "--no-evaluate", "--output", run], check=True)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for entry in (entry for entry in log if entry["event"] == "train"):
            print(f"loss {entry['loss']:.3f}")

        images = torch.rand(5, 1, 32, 32)
        encoder = load_encoder(run)  # knows model, size, mean and std
        features = encoder.features(images)

        # The exported file has timm's key names, so timm takes it as weights of its own.
        vit = timm.create_model(MODEL, num_classes=0, in_chans=1, img_size=32).eval()
        vit.load_state_dict(safetensors.torch.load_file(run / "encoder.safetensors"))
        with torch.inference_mode():
            plain = vit((images - encoder.mean) / encoder.std)
        print(f"features {list(features.shape)}, timm's own are equal: {torch.equal(features, plain)}")


if __name__ == "__main__":
    main()
