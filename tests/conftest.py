"""One thread a process: on two cores, contention between test processes costs more than it gains."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "WINNOW_TEST_GPU" not in os.environ:  # set, the kernels' own tests run compiled, on a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are the CPU's: gloo, fork, bit-equal results
    os.environ["TRITON_INTERPRET"] = "1"  # before anyone imports triton, as deepspeed does: it is read there

import torch
from hypothesis import settings

settings.register_profile("winnow", max_examples=200, deadline=None)
settings.register_profile("deep", max_examples=10_000, deadline=None)  # pytest --hypothesis-profile=deep
settings.load_profile("winnow")

torch.set_num_threads(1)
