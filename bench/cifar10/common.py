"""What the scripts of this folder share: the checkout's diffnb, results as JSON, arguments of a command."""
import argparse, json, os, platform, sys, time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))        # the diffnb of this checkout, whether installed or not

import torch

import diffnb.train
from diffnb.core import DiffnbError, write_whole
from diffnb.workshop.datasets import load_data
from diffnb.sample import ddim, load_model
from diffnb.workshop.planning import time_steps
from diffnb.core import SingleProcess, checkpoints, last_checkpoint, pick_device, read_tensors, write_tensors
from diffnb.workshop.folder import free_to_change, make_config
from diffnb.workshop.run import train
from diffnb.workshop.settings import flattened, resolve, TrainConfig


# ---- results and arguments

def machine(device="auto"): # what every result says of where it was made
    device = pick_device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = (
            next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "CPU")
            if Path("/proc/cpuinfo").exists()
            else platform.processor())
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}

def save_json(path, facts): return write_whole(path, json.dumps(facts, indent=1))

def read_json(path): return json.loads(Path(path).read_text())

def arguments(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--out", type=Path, required=True, help="folder for what is written; the same folder continues what is in it")
    p.add_argument("--data-root", help="folder with cifar-10-batches-py; default: $DIFFNB_DATA, or ./data")
    p.add_argument("--device", default="auto")
    return p

def run_main(main):
    "Errors that the user can mend are told without a traceback."
    try:
        main()
    except DiffnbError as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")
