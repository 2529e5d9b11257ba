"""The context tower of one of several devices, as vLLM lays it out, on the meta device and without the other devices.
`python divided_tower.py FOLDER SIZE RANK` prints the number of parameters of each layer, and of what is not in layers.
"""

import json
import re
import sys
from collections import Counter

import torch
import torch.distributed as dist
import vllm.distributed.parallel_state as groups
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype


def alone(size: int, rank: int) -> None:
    """Has this process believe that the other devices are there: PyTorch's fake group answers for them."""
    new_group = dist.new_group
    dist.new_group = lambda ranks=None, timeout=None, backend=None, **more: new_group(ranks, backend="fake", **more)
    groups.in_the_same_node_as = lambda group, source_rank=0: [True] * group.size()
    MessageQueue.create_from_process_group = staticmethod(lambda *args, **more: None)
    base = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
    type(current_platform).get_device_communicator_cls = classmethod(lambda cls: base)
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())


def main() -> None:
    folder, size, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    arguments = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        tensor_parallel_size=size,
        distributed_executor_backend="external_launcher",
        dtype="bfloat16",
    )
    config = arguments.create_engine_config()
    alone(size, rank)
    with set_current_vllm_config(config):
        init_distributed_environment(size, rank, "env://", 0, backend="fake")
        initialize_model_parallel(size, 1)
        with torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config)
    found = Counter[str]()
    for name, parameter in model.named_parameters():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        found["other" if layer is None else layer[1]] += parameter.numel()
    sys.stdout.write(f"PARAMETERS {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
